"""The loop: who works, and how often it looks: often while things move, never while nothing is under way."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest

from kvconnect.cuda import driver
from kvconnect.errors import BrokenError
from kvconnect.pipes.nccl_loop import LATELY_S, LONGEST_S, SHORTEST_S, Loop, OnDevice, Pace, Place
from kvconnect.testing.peers import LIMIT_S


class Line:
    """Has nothing to do until it is told that it is over."""

    def __init__(self):
        self.looks, self.over, self.idle = 0, False, threading.Event()
        self.pace = Pace.WAITING
        self.failed, self.started = [], []

    def start(self):
        self.started.append(threading.current_thread().name)

    def step(self, now):
        self.looks += 1
        if self.over:
            self.idle.set()
            return Pace.IDLE
        return self.pace

    def fail(self, error):
        self.failed.append(error)


def test_what_waits_for_long_is_looked_at_seldom_and_what_is_over_not_at_all():
    loop, line, long_s = Loop("kvconnect-test-loop"), Line(), 0.5
    loop.post(line, lambda: None)
    threading.Event().wait(long_s)
    most = LATELY_S / SHORTEST_S + long_s / LONGEST_S
    assert 10 < line.looks < 1.5 * most
    line.over = True
    assert line.idle.wait(LIMIT_S)
    looks = line.looks
    threading.Event().wait(0.1)
    assert line.looks == looks
    assert not line.failed


def test_what_was_begun_by_another_thread_is_looked_at_often_as_well():
    loop, line = Loop("kvconnect-test-loop"), Line()
    loop.post(line, lambda: None)
    threading.Event().wait(10 * LATELY_S)
    looks = line.looks
    with loop._turn:  # the loop's thread finds nothing to call
        loop._wake()
    threading.Event().wait(LATELY_S)
    assert line.looks - looks > 2 * LATELY_S / LONGEST_S


def test_what_nobody_waits_for_is_looked_at_seldom_from_the_beginning():
    loop, line = Loop("kvconnect-test-loop"), Line()
    line.pace = Pace.PATIENT
    loop.post(line, lambda: None)
    threading.Event().wait(LATELY_S / 2)
    assert line.looks < 2 + LATELY_S / LONGEST_S
    line.over = True
    assert line.idle.wait(LIMIT_S)


def test_work_is_started_by_the_thread_that_brings_it():
    loop, line = Loop("kvconnect-test-loop"), Line()
    line.over = True
    mine, called = threading.current_thread().name, []
    for _ in range(50):
        line.idle.clear()
        loop.bring(line, lambda: called.append(threading.current_thread().name))
        assert line.idle.wait(LIMIT_S)
        threading.Event().wait(0.002)
    assert len(called) == len(line.started) == 50
    assert called.count(mine) > 25, "the loop's thread is at it now and then, not always"


def test_what_may_end_something_is_left_to_the_loop():
    loop, line, called = Loop("kvconnect-test-loop"), Line(), []
    line.over = True
    loop.post(line, lambda: called.append(threading.current_thread().name))
    assert line.idle.wait(LIMIT_S)
    assert called == ["kvconnect-test-loop"]


def test_what_comes_while_a_thread_is_at_it_is_done_behind_it_and_in_order():
    loop, line = Loop("kvconnect-test-loop"), Line()
    entered, go_on, done, order = threading.Event(), threading.Event(), threading.Event(), []

    def first():
        loop.bring(line, lambda: order.append("brought within"))
        entered.set()
        go_on.wait(LIMIT_S)
        order.append("first")

    thread = threading.Thread(target=lambda: loop.bring(line, first))
    thread.start()
    assert entered.wait(LIMIT_S)
    loop.post(line, lambda: order.append("second"))  # returns, though the first still runs
    loop.bring(line, done.set)
    assert not order
    go_on.set()
    assert done.wait(LIMIT_S)
    thread.join(LIMIT_S)
    assert order == ["first", "brought within", "second"]


def test_a_thread_that_cannot_work_there_leaves_it_to_the_loop():
    class Elsewhere(Place):
        @contextlib.contextmanager
        def visited(self):
            raise BrokenError("no way in")
            yield

    loop, line, called = Loop("kvconnect-test-loop", Elsewhere()), Line(), []
    line.over = True
    loop.bring(line, lambda: called.append(threading.current_thread().name))
    assert line.idle.wait(LIMIT_S)
    assert called == line.started == ["kvconnect-test-loop"]


def test_what_cannot_be_started_ends_the_line_and_not_the_loop():
    loop, line, other = Loop("kvconnect-test-loop"), Line(), Line()
    line.over = other.over = True

    def fail():
        raise RuntimeError("no")

    line.start = fail
    loop.bring(line, lambda: None)
    loop.bring(other, lambda: None)
    assert other.idle.wait(LIMIT_S)
    assert line.idle.wait(LIMIT_S)
    assert [type(error) for error in line.failed] == [BrokenError]


def test_a_thread_that_visits_a_device_leaves_with_its_own_and_makes_no_context(monkeypatch):
    current, made = threading.local(), {7}
    failed = type("CUDADriverError", (RuntimeError,), {})

    def set_device(device):
        current.device, current.context = device, 10 + device
        made.add(device)

    cuda = SimpleNamespace(
        driver=SimpleNamespace(ctxGetCurrent=lambda: getattr(current, "context", 0), CUDADriverError=failed),
        runtime=SimpleNamespace(getDevice=lambda: current.device, setDevice=set_device, CUDARuntimeError=failed),
    )
    monkeypatch.setattr(driver, "cupy", lambda: SimpleNamespace(cuda=cuda))
    place = OnDevice(1)
    with pytest.raises(BrokenError, match="not prepared"), place.visited():
        pass
    thread = threading.Thread(target=place.inhabit)
    thread.start()
    thread.join(LIMIT_S)
    for before, after in ((0, 11), (11, 11), (17, 17)):
        current.context, current.device = before, max(before - 10, 0)
        with contextlib.suppress(KeyError), place.visited():
            assert current.context == 11
            raise KeyError
        assert current.context == after
    assert made == {1, 7}, "a thread without a context counts device 0 as its own"
