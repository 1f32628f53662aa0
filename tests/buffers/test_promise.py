"""Until when an owner's word counts, here and in another process."""

import pickle
from concurrent.futures import Future

import pytest

from kvconnect.buffers.promise import Promise
from kvconnect.clock import SYSTEM, Clock
from kvconnect.errors import DeadlineError
from tests.buffers.faults import granted


def answered(body):
    answer = Future()
    answer.set_result(body)
    return answer


def test_a_promise_counts_from_before_the_question():
    promise, answer = Promise(), Future()
    before = SYSTEM.now()
    promise.ask(lambda: answer)
    asked = SYSTEM.now()
    answer.set_result(granted(5000))
    assert before < promise.until < asked + 5
    assert promise.holds(4)
    assert not promise.holds(5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "gone"},
        {"state": None},
        {"lease_ms": None},
        {"lease_ms": 0},
        {"lease_ms": "5000"},
        {"lease_ms": True},
        {"lease_ms": -5},
        {"lease_ms": 1 << 40},
        {"lease_ms": 1e300},
    ],
)
def test_only_a_grant_with_a_lease_is_a_promise(wrong):
    promise = Promise()
    promise.ask(lambda: answered({**granted(), **wrong}))
    assert not promise.holds()
    promise.ask(lambda: answered(granted()))
    assert promise.holds()


@pytest.mark.parametrize(
    "other",
    [
        {"clock": None},
        {"clock": ""},
        {"clock": "another host's"},
        {"now": None},
        {"now": 5},
        {"now": float("nan")},
        {"now": SYSTEM.now() - 1},
        {"now": SYSTEM.now() + 1e6},
    ],
)
def test_an_owner_by_another_clock_promises_nothing_and_is_not_asked_again(other):
    promise = Promise()
    assert not promise.foreign
    promise.ask(lambda: answered({**granted(), **other}))
    assert not promise.holds()
    assert promise.foreign
    assert pickle.loads(pickle.dumps(promise)).foreign  # noqa: S301 - as vLLM hands it to its workers


def test_a_clock_without_a_name_is_nobody_elses():
    class Nameless(Clock):
        identity = ""

    promise = Promise(clock=Nameless())
    promise.ask(lambda: answered({**granted(), "clock": ""}))
    assert not promise.holds()


def test_a_question_without_an_answer_promises_nothing():
    promise, answer = Promise(), Future()
    promise.ask(lambda: answer)
    answer.set_exception(DeadlineError("late"))
    assert not promise.holds()


def test_a_promise_is_only_ever_prolonged():
    promise = Promise()
    now = SYSTEM.now()
    promise.prolong(granted(9000), now)
    promise.prolong(granted(1000), now)
    assert promise.holds(8)


def test_another_process_of_the_host_gets_what_is_known_and_another_host_nothing(monkeypatch):
    promise = Promise(SYSTEM.now() + 9)
    promise.ask(Future)
    data = pickle.dumps(promise)
    copy = pickle.loads(data)  # noqa: S301 - as vLLM hands it to its workers
    assert copy.until == promise.until
    assert copy.question is None
    monkeypatch.setattr(Clock, "identity", "elsewhere")
    assert not pickle.loads(data).holds()  # noqa: S301 - likewise
