"""The reactor's thread outlives its owners' mistakes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvconnect.pipes import reactor
from kvconnect.pipes.reactor import Reactor

LIMIT_S = 10.0


@pytest.fixture
def loop() -> Iterator[Reactor]:
    one = Reactor("test-reactor")
    yield one
    one.close()


def test_an_owner_that_closes_its_descriptor_and_fails_stops_nobody_else(loop: Reactor) -> None:
    reading, writing = os.pipe()

    def fail(_events: int) -> None:
        os.close(reading)
        raise RuntimeError("an owner's mistake")

    loop.watch(reading, reactor.READ, fail)
    os.write(writing, b"x")
    ran = threading.Event()
    loop.call_later(0.1, ran.set)
    assert ran.wait(LIMIT_S)
    os.close(writing)


def test_a_descriptor_that_cannot_be_watched_is_not_remembered(loop: Reactor) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    os.close(reading)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.watch(reading, reactor.READ, lambda _: None)
    assert reading not in loop._ready


def test_edges_are_told_once_and_levels_as_long_as_they_last(loop: Reactor) -> None:
    counts, ends = {}, []
    for events in (reactor.READ, reactor.READ | reactor.EDGE):
        reading, writing = os.pipe()
        ends += [reading, writing]  # open until the end: a number used anew could get an event of the old one
        os.write(writing, b"x")
        seen = []
        loop.watch(reading, events, seen.append)
        done = threading.Event()
        loop.call_later(0.05, done.set)
        assert done.wait(LIMIT_S)
        loop.unwatch(reading)
        counts[events] = len(seen)
    for end in ends:
        os.close(end)
    assert counts[reactor.READ | reactor.EDGE] == 1 < counts[reactor.READ]
