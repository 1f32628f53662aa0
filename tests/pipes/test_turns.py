"""Transfers take turns."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvconnect.errors import ClosedError
from kvconnect.pipes import turns as module
from kvconnect.pipes.turns import Turns

WAIT_S = 10.0


@pytest.fixture
def one() -> Iterator[Turns]:
    turns = Turns("test-turns-one", 1)
    yield turns
    turns.close()


def test_two_transfers_take_turns_chunk_by_chunk(one: Turns) -> None:
    seen, gate, over = [], threading.Event(), threading.Event()
    left = {"a": 5, "b": 2}

    def step(name: str) -> bool:
        gate.wait(WAIT_S)
        seen.append(name)
        left[name] -= 1
        if not any(left.values()):
            over.set()
        return left[name] > 0

    one.add(lambda: step("a"))
    one.add(lambda: step("b"))
    gate.set()
    assert over.wait(WAIT_S)
    assert "".join(seen) == "ababaaa"


def test_a_small_transfer_waits_for_at_most_one_chunk_per_thread() -> None:
    turns = Turns("test-turns-fair", 2)
    chunks, small_at, over = [0], [], threading.Event()
    lock = threading.Lock()

    def large() -> bool:
        with lock:
            chunks[0] += 1
            if chunks[0] == 50:
                turns.add(small)  # 100 large steps of four transfers are still to come
        return chunks[0] < 150

    def small() -> bool:
        with lock:
            small_at.append(chunks[0])
        over.set()
        return False

    for _ in range(4):
        turns.add(large)
    assert over.wait(WAIT_S)
    turns.close()
    # In front of it: the three other transfers in the queue, and one chunk per thread under way.
    assert small_at[0] - 50 <= 3 + 2


def test_a_step_that_raises_is_dropped_and_the_thread_goes_on(one: Turns, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    def bad() -> bool:
        raise RuntimeError("a bug")

    def good() -> bool:
        over.set()
        return False

    one.add(bad)
    one.add(good)
    assert over.wait(WAIT_S)
    assert "a bug" in caplog.text


def test_close_ends_the_threads_and_refuses_more() -> None:
    turns = Turns("test-turns-close", 3)
    begun = threading.Event()

    def endless() -> bool:
        begun.set()
        return True

    turns.add(endless)
    assert begun.wait(WAIT_S)
    turns.close()
    turns.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("test-turns-close")]
    with pytest.raises(ClosedError):
        turns.add(endless)


def test_threads_start_with_the_first_step_and_are_fixed_in_number() -> None:
    turns = Turns("test-turns-count", 2)
    names = lambda: [t.name for t in threading.enumerate() if t.name.startswith("test-turns-count")]  # noqa: E731
    assert names() == []
    done = [threading.Event() for _ in range(20)]
    for event in done:
        turns.add(lambda event=event: bool(event.set()))
    assert all(event.wait(WAIT_S) for event in done)
    assert sorted(names()) == ["test-turns-count-0", "test-turns-count-1"]
    turns.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    done = threading.Event()
    module.shared().add(lambda: bool(done.set()))
    assert done.wait(WAIT_S)
    pid = os.fork()
    if pid == 0:
        over = threading.Event()
        module.shared().add(lambda: bool(over.set()))
        os._exit(0 if over.wait(WAIT_S) else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
