"""Until when an owner's word counts, here and in another process."""

import pickle
from concurrent.futures import Future

import pytest

from kvconnect.buffers.promise import Promise
from kvconnect.clock import SYSTEM
from kvconnect.errors import DeadlineError
from kvconnect.pipes import host


def answered(body):
    answer = Future()
    answer.set_result(body)
    return answer


def test_a_promise_counts_from_before_the_question():
    promise, answer = Promise(), Future()
    before = SYSTEM.now()
    promise.ask(lambda: answer)
    asked = SYSTEM.now()
    answer.set_result({"state": "ok", "lease_ms": 5000})
    assert before < promise.until < asked + 5
    assert promise.holds(4)
    assert not promise.holds(5)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"state": "gone", "lease_ms": 5000},
        {"lease_ms": 5000},
        {"state": "ok"},
        {"state": "ok", "lease_ms": 0},
        {"state": "ok", "lease_ms": "5000"},
        {"state": "ok", "lease_ms": True},
        {"state": "ok", "lease_ms": -5},
        {"state": "ok", "lease_ms": 1 << 40},
        {"state": "ok", "lease_ms": 1e300},
    ],
)
def test_only_a_grant_with_a_lease_is_a_promise(body):
    promise = Promise()
    promise.ask(lambda: answered(body))
    assert not promise.holds()


def test_a_question_without_an_answer_promises_nothing():
    promise, answer = Promise(), Future()
    promise.ask(lambda: answer)
    answer.set_exception(DeadlineError("late"))
    assert not promise.holds()


def test_a_promise_is_only_ever_prolonged():
    promise = Promise()
    now = SYSTEM.now()
    promise.prolong({"lease_ms": 9000}, now)
    promise.prolong({"lease_ms": 1000}, now)
    assert promise.holds(8)


def test_another_process_of_the_host_gets_what_is_known_and_another_host_nothing(monkeypatch):
    promise = Promise(SYSTEM.now() + 9)
    promise.ask(Future)
    data = pickle.dumps(promise)
    copy = pickle.loads(data)  # noqa: S301 - as vLLM hands it to its workers
    assert copy.until == promise.until
    assert copy.question is None
    monkeypatch.setattr(host, "identity", lambda: {"host": "elsewhere"})
    assert not pickle.loads(data).holds()  # noqa: S301 - likewise
