"""Calls that may block, on a fixed few threads."""

import threading
import weakref

import pytest

from kvconnect.buffers.crew import Crew

LIMIT_S = 10.0


@pytest.fixture
def crew():
    crew = Crew("test-crew", 3)
    yield crew
    crew.close()


@pytest.fixture
def gate():
    """What hangs until the test's end."""
    gate = threading.Event()
    yield gate
    gate.set()


def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("test-crew"))


def done_after(crew, lane=None):
    """Return an event that is set by a call submitted now."""
    done = threading.Event()
    assert crew.submit(done.set, lane)
    return done


def test_calls_of_one_lane_run_one_after_another_and_in_order(crew):
    inside, order = threading.Lock(), []

    def call(number):
        assert inside.acquire(blocking=False), "two at once"
        order.append(number)
        inside.release()

    for number in range(200):
        crew.submit(lambda number=number: call(number), "lane")
    assert done_after(crew, "lane").wait(LIMIT_S)
    assert order == list(range(200))


def test_a_lane_that_hangs_holds_one_thread_however_many_of_its_calls_wait(crew, gate):
    for lane in ("a", "b"):
        for _ in range(5):
            crew.submit(lambda: gate.wait(LIMIT_S), lane)
    for lane in ("c", "d", None):
        assert done_after(crew, lane).wait(LIMIT_S)
    behind = done_after(crew, "a")
    assert not behind.wait(0.05)
    gate.set()
    assert behind.wait(LIMIT_S)


def test_lanes_take_turns(gate):
    crew, order = Crew("test-crew", 1), []
    crew.submit(lambda: gate.wait(LIMIT_S))
    for lane in ("long", "long", "long", "short"):
        crew.submit(lambda lane=lane: order.append(lane), lane)
    gate.set()
    crew.close()
    assert order == ["long", "short", "long", "long"]


def test_threads_start_as_they_are_needed_and_never_more_than_were_allowed(crew, gate):
    assert threads() == []
    assert done_after(crew).wait(LIMIT_S)
    assert threads() == ["test-crew-0"]
    for _ in range(20):
        crew.submit(lambda: gate.wait(LIMIT_S))
    assert threads() == ["test-crew-0", "test-crew-1", "test-crew-2"]


def test_a_call_that_fails_ends_neither_its_lane_nor_its_thread(crew, caplog):
    for _ in range(5):
        crew.submit(lambda: 1 / 0, "lane")
    assert done_after(crew, "lane").wait(LIMIT_S)
    assert caplog.text.count("ZeroDivisionError") == 5


def test_an_idle_thread_keeps_nothing_of_its_last_call(crew):
    class Thing:
        def call(self):
            pass

    thing = Thing()
    gone = threading.Event()
    weakref.finalize(thing, gone.set)
    crew.submit(thing.call, "lane")
    del thing
    assert gone.wait(LIMIT_S)


def test_closing_makes_what_was_submitted_and_takes_no_more(crew):
    made = []
    for number in range(50):
        crew.submit(lambda number=number: made.append(number), number % 2)
    crew.close()
    assert sorted(made) == list(range(50))
    assert threads() == []
    assert not crew.submit(lambda: made.append("late"))


def test_closing_waits_for_calls_that_hang_only_so_long(crew, gate):
    for _ in range(3):
        crew.submit(lambda: gate.wait(LIMIT_S))
    closing = threading.Thread(target=crew.close, args=(0.2,))
    closing.start()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert len(threads()) == 3
