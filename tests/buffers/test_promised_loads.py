"""Loads, and what their owner has promised: who is asked what, and when a load is over."""

import dataclasses
import pickle
from concurrent.futures import Future

import pytest
import torch

from kvconnect.buffers import mover
from kvconnect.buffers.promise import Promise
from kvconnect.clock import SYSTEM, Clock
from kvconnect.errors import BrokenError, DeadlineError, LoadError
from tests.buffers.engines import eventually
from tests.buffers.faults import claimed, granted


def unpromised(claim):
    """Return the claim as it was before its owner promised anything, or after all it promised ran out."""
    return dataclasses.replace(claim, promise=Promise())


def test_a_scheduler_that_is_gone_fails_the_confirmation(pair):
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    claim = unpromised(claimed(p, d, 2))
    p.end.close()
    with pytest.raises(LoadError):
        d.read(claim).wait(8)


def test_a_confirmation_whose_connection_broke_is_asked_for_again_once(pair, monkeypatch):
    p, d = pair
    client = d.workers[0]._client
    real, asked, failures = client.call, [], 1

    def call(endpoint, op, body, timeout_s):
        if op == "claim":  # without a promise beforehand, the owner is asked afterwards
            unheard = Future()
            unheard.set_exception(DeadlineError("no answer"))
            return unheard
        if op == "release":
            asked.append(op)
            if len(asked) <= failures:
                broken = Future()
                broken.set_exception(BrokenError("the connection was closed"))
                return broken
        return real(endpoint, op, body, timeout_s)

    monkeypatch.setattr(client, "call", call)
    d.read(unpromised(claimed(p, d, 1))).wait(8)
    assert len(asked) == 2
    asked.clear()
    failures = 2
    with pytest.raises(LoadError, match="connection was closed"):
        d.read(unpromised(claimed(p, d, 2))).wait(8)
    assert len(asked) == 2


def test_within_a_promised_lease_a_load_waits_for_no_confirmation(pair, monkeypatch):
    p, d = pair
    client = d.workers[0]._client
    real, told = client.call, []

    def call(endpoint, op, body, timeout_s):
        answer = real(endpoint, op, body, timeout_s)
        if op == "claim":  # at once: the real promise might come after so short a load
            answer = Future()
            answer.set_result(granted())
        if op != "release":
            return answer
        told.append(answer)
        return Future()

    monkeypatch.setattr(client, "call", call)
    d.read(unpromised(claimed(p, d, 1))).wait(8)
    assert eventually(lambda: told)[0].result(8) == {"answer": "ok"}
    eventually(p.freed)


@pytest.mark.parametrize("promise", [{"state": "ok", "lease_ms": 0}, {"state": "gone"}, {}, {"lease_ms": 9000}])
def test_without_a_promise_that_holds_till_the_end_the_owner_is_asked_what_was_read(pair, monkeypatch, promise):
    p, d = pair
    client = d.workers[0]._client
    real = client.call

    def call(endpoint, op, body, timeout_s):
        answer = Future()
        if op == "claim":
            answer.set_result(promise)
        elif op == "release":
            answer.set_result({"answer": "stale"})
        else:
            return real(endpoint, op, body, timeout_s)
        return answer

    monkeypatch.setattr(client, "call", call)
    with pytest.raises(LoadError, match="lease"):
        d.read(unpromised(claimed(p, d, 1))).wait(8)


def heard(claim):
    """Return the claim once its owner has granted it."""
    eventually(lambda: claim.promise.holds(1.0))
    return claim


def listening(d, monkeypatch, answers=None):
    """Return the list of what D's worker asks from now on; ``answers`` replaces the owner's by operation."""
    client = d.workers[0]._client
    real, asked = client.call, []

    def call(endpoint, op, body, timeout_s):
        asked.append(op)
        return (answers or {}).get(op) or real(endpoint, op, body, timeout_s)

    monkeypatch.setattr(client, "call", call)
    return asked


def test_a_load_under_a_promise_that_came_with_its_claim_asks_nothing_and_waits_for_no_answer(pair, monkeypatch):
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    claim = pickle.loads(pickle.dumps(heard(claimed(p, d, 2))))  # noqa: S301 - as vLLM hands it to its workers
    asked = listening(d, monkeypatch, {"release": Future()})
    d.read(claim, local=((20, 21, 22),)).wait(8)
    assert torch.equal(d.block(20), p.block(1))
    eventually(lambda: asked)
    assert asked == ["release"]


@pytest.fixture
def elsewhere(pair, monkeypatch):
    """Have P be on a host of its own, as far as clocks go."""

    class Elsewhere(Clock):
        identity = "another host's"

    p, d = pair
    monkeypatch.setattr(p.end._lender, "_clock", Elsewhere())
    return p, d


@pytest.mark.parametrize("verdict", ["ok", "stale"])
def test_a_load_from_another_host_asks_no_promise_and_waits_for_the_owners_last_word(elsewhere, monkeypatch, verdict):
    p, d = elsewhere
    d.read(claimed(p, d, 1)).wait(8)
    claim = claimed(p, d, 2)
    eventually(lambda: claim.promise.foreign)
    release = Future()
    asked = listening(d, monkeypatch, {"release": release})
    transfer = d.read(pickle.loads(pickle.dumps(claim)))  # noqa: S301 - as vLLM hands it to its workers
    eventually(lambda: "moved" in transfer.phases)
    eventually(lambda: asked)
    assert asked == ["release"]
    assert not transfer.done
    release.set_result({"answer": verdict})
    assert (transfer.error is None) == (verdict == "ok")


def test_a_reader_so_slow_that_its_promise_runs_out_hears_that_its_blocks_are_stale(pair, faulty, monkeypatch):
    monkeypatch.setattr(mover, "_ENOUGH_S", 0.0)
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    claim = heard(claimed(p, d, 2))
    slow = dataclasses.replace(claim, promise=Promise(SYSTEM.now() + 0.1))
    asked = listening(d, monkeypatch)
    faulty.clogs = True
    transfer = d.read(slow)
    (moving,) = eventually(lambda: faulty.started)
    d.end.abandon("r2")  # as if no renewal had reached P
    eventually(p.end.clear)
    eventually(lambda: not slow.promise.holds())
    moving.finish()
    with pytest.raises(LoadError, match="lease"):
        transfer.wait(8)
    assert asked == ["release"]


@pytest.mark.parametrize("answer", ["ok", "gone"])
def test_a_load_waits_for_the_promise_it_has_asked_for_rather_than_ask_again(pair, faulty, monkeypatch, answer):
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    promise, release = Future(), Future()
    claim = unpromised(heard(claimed(p, d, 2)))
    asked = listening(d, monkeypatch, {"claim": promise, "release": release})
    faulty.clogs = True
    transfer = d.read(claim)
    eventually(lambda: faulty.started)[0].finish()
    assert asked == ["claim"]
    assert not transfer.done
    promise.set_result({**granted(), "state": answer})
    assert transfer.done == (answer == "ok")
    assert asked == ["claim", "release"]
    release.set_result({"answer": "stale"})
    assert (transfer.error is None) == (answer == "ok")


def test_a_read_joins_the_question_that_its_own_scheduler_has_under_way(pair, monkeypatch):
    p, d = pair
    claim = unpromised(claimed(p, d))
    question = Future()
    claim.promise.ask(lambda: question)
    asked = listening(d, monkeypatch)
    transfer = d.read(claim)
    eventually(lambda: "moved" in transfer.phases)
    assert not transfer.done
    question.set_result(granted())
    transfer.wait(8)
    assert "claim" not in asked


@pytest.fixture
def immediate(faulty):
    """Pipes that any thread may ask."""
    faulty.traits = dataclasses.replace(faulty.traits, immediate=True)
    return faulty


def test_over_an_open_pipe_that_only_enqueues_a_read_is_launched_before_it_returns(immediate, pair):
    p, d = pair
    d.read(heard(claimed(p, d, 1))).wait(8)
    immediate.clogs = True
    claim = heard(claimed(p, d, 2))
    transfer = d.read(claim)
    (moving,) = immediate.started
    assert "launched" in transfer.phases
    moving.finish()
    assert transfer.done, "the end of a load waited for another thread"


def test_a_pipe_that_died_unheard_is_opened_anew_for_a_read_on_the_callers_own_thread(immediate, pair):
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    immediate.breaks = 1
    d.read(claimed(p, d, 2), local=((20, 21, 22),)).wait(8)
    assert torch.equal(d.block(20), p.block(1))
    assert immediate.opened == {"asks": 2, "serves": 2}
    immediate.breaks = 2
    with pytest.raises(LoadError, match="cut"):
        d.read(claimed(p, d, 3)).wait(8)


def test_a_read_on_the_callers_own_thread_ends_at_its_deadline(immediate, pair):
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    immediate.clogs = True
    transfer = d.read(heard(claimed(p, d, 2)))
    eventually(lambda: immediate.held)[0].finish(LoadError("cancelled"))
    with pytest.raises(DeadlineError, match=r"within 0.5 s"):
        transfer.wait(8)
