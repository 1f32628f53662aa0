"""Time, as leases and deadlines count it."""

import pickle
import time
from concurrent.futures import Future

import pytest

from kvconnect import clock
from kvconnect.buffers.promise import Promise
from kvconnect.clock import SYSTEM, Clock
from kvconnect.control import ControlClient, ControlServer
from kvconnect.errors import DeadlineError


class Hand(Clock):
    """A clock that is set by hand."""

    identity = "by hand"

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    def poll_ms(self, when):
        return 0 if when <= self.time else 5


def test_a_host_that_sleeps_does_not_stop_the_clock(monkeypatch):
    # CLOCK_MONOTONIC stands still meanwhile, and the owner, on a host that is awake, reuses its blocks.
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: 1000.0, time.CLOCK_MONOTONIC: 10.0}.__getitem__)
    promise = Promise(10.0 + 30.0)
    assert not promise.holds()


def test_a_promise_by_another_clock_says_nothing_in_another_process():
    hand = Hand()
    promise = Promise(hand.now() + 1e9, hand)
    assert promise.holds()
    assert not pickle.loads(pickle.dumps(promise)).holds()  # noqa: S301 - as vLLM hands it to its workers
    assert pickle.loads(pickle.dumps(Promise(SYSTEM.now() + 9))).holds(8)  # noqa: S301 - likewise


def test_containers_of_a_host_share_a_clock_unless_their_time_is_shifted(tmp_path, monkeypatch):
    for name in ("here", "shifted", "old kernel"):
        (tmp_path / name).symlink_to({"here": "time:[1]", "shifted": "time:[2]"}.get(name, "nowhere"))
    (tmp_path / "old kernel").unlink()
    (tmp_path / "boot").write_text("b00t\n")
    names = []
    for name in ("here", "shifted", "old kernel"):
        files = {"/proc/sys/kernel/random/boot_id": tmp_path / "boot", "/proc/self/ns/time": tmp_path / name}
        monkeypatch.setattr(clock, "Path", files.__getitem__)
        names.append(clock._of_this_host.__wrapped__())
    assert names == ["b00t time:[1]", "b00t time:[2]", "b00t"]
    monkeypatch.setattr(clock, "Path", lambda _: tmp_path / "missing")
    assert not clock._of_this_host.__wrapped__()


def test_deadlines_of_calls_are_those_of_the_injected_clock():
    hand, server = Hand(), ControlServer()
    server.handle("never", lambda _: Future())
    client = ControlClient(clock=hand)
    try:
        called = client.call(server.endpoint, "never", {}, 50.0)
        with pytest.raises(TimeoutError):
            called.result(0.1)
        hand.time += 51.0
        with pytest.raises(DeadlineError):
            called.result(8)
    finally:
        client.close()
        server.close()
