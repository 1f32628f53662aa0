"""The control channel's thread: who has something is asked, nobody else."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar

import pytest
import zmq

from kvconnect.loop import Loop

LIMIT_S = 10.0


class _Counting(zmq.Socket):  # type: ignore[type-arg]
    """Counts how often each socket was asked whether it has something."""

    asked: ClassVar[Counter[int]] = Counter()

    def getsockopt(self, option: int) -> Any:
        if option == zmq.EVENTS:
            self.asked[id(self)] += 1
        return super().getsockopt(option)


@pytest.fixture
def loop() -> Iterator[Loop]:
    with closing(Loop("kvconnect-test-loop")) as loop:
        yield loop


def _pairs(loop: Loop, count: int) -> list[tuple[Any, Any]]:
    """Return sockets of the loop, each with the one that it hears."""
    pairs = []
    for number in range(count):
        near, far = _Counting(loop.context, zmq.PAIR), loop.context.socket(zmq.PAIR)
        near.bind(f"inproc://pair-{number}")
        far.connect(f"inproc://pair-{number}")
        pairs.append((near, far))
    return pairs


def test_a_message_costs_the_same_however_many_sockets_there_are(loop: Loop) -> None:
    pairs, heard = _pairs(loop, 200), threading.Semaphore(0)
    for near, _ in pairs:
        loop.watch(near, lambda near=near: heard.release() if near.recv(zmq.NOBLOCK) else None)  # type: ignore[misc]
    loop.start()
    busy, far = pairs[7]
    try:
        far.send(b"first")
        assert heard.acquire(timeout=LIMIT_S)
        for _ in range(3):  # until all have been asked that are asked once, since they are new
            turn = threading.Event()
            loop.soon(turn.set)
            assert turn.wait(LIMIT_S)
        _Counting.asked.clear()
        for _ in range(50):
            far.send(b"next")
            assert heard.acquire(timeout=LIMIT_S)
        assert set(_Counting.asked) == {id(busy)}
        assert _Counting.asked[id(busy)] <= 4 * 50
    finally:
        for _, far in pairs:
            far.close()


def test_messages_that_come_while_a_socket_is_used_otherwise_are_heard(loop: Loop) -> None:
    """What announces them may have been taken by a send: without another look they would wait for the next one."""
    [(near, far)], got, sent = _pairs(loop, 1), [], threading.Event()

    def hear() -> None:
        got.append(near.recv(zmq.NOBLOCK))  # one at a time: more may be there
        if len(got) == 101:
            sent.set()

    loop.watch(near, hear)
    loop.start()
    try:
        for number in range(101):
            far.send(str(number).encode())
            loop.soon(lambda: loop.send(near, [b"x"]))
        assert sent.wait(LIMIT_S), f"only {len(got)} were heard"
        assert got == [str(number).encode() for number in range(101)]
    finally:
        far.close()


def test_a_socket_that_a_handler_closes_is_not_asked_again(loop: Loop) -> None:
    (one, to_one), (other, to_other) = _pairs(loop, 2)
    called: list[str] = []

    def close_both(name: str) -> None:
        called.append(name)
        loop.unwatch(one)
        loop.unwatch(other)

    loop.watch(one, lambda: close_both("one"))
    loop.watch(other, lambda: close_both("other"))
    to_one.send(b"")
    to_other.send(b"")
    loop.start()
    done = threading.Event()
    loop.later(0.2, done.set)
    assert done.wait(LIMIT_S)
    to_one.close()
    to_other.close()
    assert len(called) == 1
