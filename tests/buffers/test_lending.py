"""One engine's blocks lent to another: found by ticket, label or content, read, confirmed, given back."""

import json
import threading
import time
from concurrent.futures import Future

import pytest
import torch

from kvconnect.buffers.base import Claim, Miss, Want
from kvconnect.clock import SYSTEM
from kvconnect.errors import BrokenError, KVConnectError, LoadError, StaleError
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from tests.buffers.engines import Engine, engines, eventually, group, is_miss, key, meet


@pytest.fixture
def pair():
    with engines() as both:
        yield both


# -- by ticket --------------------------------------------------------------------------


def test_a_ticket_is_read_and_the_blocks_come_back(pair):
    p, d = pair
    ticket = json.loads(json.dumps(p.offer(blocks=((5, 2, 9),))))
    claim = d.find("r", Want(key(1), ticket=ticket))
    assert isinstance(claim, Claim)
    assert claim.blocks == ((5, 2, 9),)
    d.read(claim, local=((11, 12, 13),)).wait(8)
    for remote, local in ((5, 11), (2, 12), (9, 13)):
        assert torch.equal(d.block(local), p.block(remote))
    assert not d.block(14).any(), "a block that was not asked for was written"
    assert p.freed() == [((5, 2, 9),)]
    assert not p.end.awaits_takers()
    assert p.end.stats()["released"] == 1


def test_a_ticket_of_a_peer_that_was_met_is_answered_at_once(pair):
    p, d = pair
    meet(p, d)
    d.end.look("r", Want(key(1), ticket=p.offer()))
    assert isinstance(d.end.found("r"), Claim)


def test_reading_some_of_the_blocks_releases_them_all(pair):
    p, d = pair
    claim = d.find("r", Want(key(1), ticket=p.offer(blocks=((4, 5, 6),))))
    d.read(claim, remote=((6,),), local=((20,),)).wait(8)
    assert torch.equal(d.block(20), p.block(6))
    assert p.freed() == [((4, 5, 6),)]


def test_a_ticket_for_other_content_is_not_believed(pair):
    p, d = pair
    ticket = p.offer(1)
    is_miss(d.find("r", Want(key(2), ticket=ticket)), "absent")
    is_miss(d.find("s", Want(key(1, length=31), ticket=ticket)), "absent")
    is_miss(d.find("t", Want(key(1, namespace="other"), ticket=ticket)), "absent")
    assert p.end.drain_released() == []


def test_a_ticket_that_does_not_fit_leads_to_its_peer_for_the_content(pair):
    p, d = pair
    ticket = p.offer(1)
    p.offer(2, ((7, 8),))
    assert d.find("second prompt", Want(key(2), ticket=ticket)).blocks == ((7, 8),)


@pytest.mark.parametrize("field", ["v", "at", "engine", "incarnation", "entry", "generation", "digest", "blocks"])
def test_a_ticket_that_cannot_be_read_falls_back_to_the_content(pair, field):
    p, d = pair
    ticket = p.offer(1)
    ticket[field] = {"no": "ticket"}
    assert isinstance(d.find("r", Want(key(1), ticket=ticket)), Claim)
    assert d.end.stats()["bad_tickets"] == 1


def test_blocks_that_were_tampered_with_are_stale():
    with engines(lease_s=60.0) as (p, d):
        meet(p, d)
        ticket, other = p.offer(1, ((1, 2),)), p.offer(2, ((3, 4),))
        ticket["blocks"] = other["blocks"]
        d.end.look("r", Want(key(1), ticket=ticket))
        claim = d.end.commit("r")
        with pytest.raises(StaleError):
            d.read(claim).wait(8)
        assert p.end.stats()["stale"] == 1
        assert not claim.promise.holds()
        d.end.look("in time", Want(key(1), ticket=ticket))
        eventually(lambda: isinstance(d.end.found("in time"), Miss))


def test_an_entry_name_that_was_tampered_with_is_never_read_as_the_other(pair):
    p, d = pair
    ticket, other = p.offer(1, ((1, 2),)), p.offer(2, ((3, 4),))
    ticket["entry"] = other["entry"]
    d.end.look("r", Want(key(1), ticket=ticket))
    answer = eventually(lambda: d.end.found("r"))
    if isinstance(answer, Claim):
        with pytest.raises(StaleError):
            d.read(answer).wait(8)


def test_blocks_outside_the_claim_are_not_read(pair):
    p, d = pair
    claim = d.find("r", Want(key(1), ticket=p.offer(blocks=((1, 2),))))
    with pytest.raises(LoadError, match="does not cover"):
        d.read(claim, remote=((3,),), local=((20,),)).wait(8)
    assert not d.block(20).any()


def test_children_of_one_request_share_the_entry(pair):
    p, d = pair
    ticket = p.offer()
    claims = [d.find(f"{child}_r", Want(key(1), ticket=ticket)) for child in range(2)]
    assert claims[0].grant != claims[1].grant
    d.read(claims[0]).wait(8)
    assert p.end.drain_released() == []
    d.read(claims[1], local=((20, 21, 22),)).wait(8)
    assert p.freed() == [((1, 2, 3),)]


def test_one_entry_goes_to_one_of_two_engines(pair):
    p, d = pair
    other = Engine("D2", consumes=True, group=group())
    ticket = p.offer()
    claims = [engine.find("r", Want(key(1), ticket=ticket)) for engine in (d, other)]
    outcomes = []
    for engine, claim in zip((d, other), claims, strict=True):
        try:
            assert isinstance(claim, Claim)
            engine.read(claim).wait(8)
            outcomes.append("ok")
        except (AssertionError, LoadError):
            outcomes.append("no")
    other.close()
    assert sorted(outcomes) == ["no", "ok"]


def test_every_rank_releases_its_part():
    with engines(parts=2) as (p, d):
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        d.read(claim, rank=0).wait(8)
        assert p.end.drain_released() == []
        d.read(claim, rank=1).wait(8)
        assert p.freed() == [((1, 2, 3),)]
        for rank in range(2):
            assert torch.equal(d.block(10, rank), p.block(1, rank))


# -- by label and content -------------------------------------------------------------------


def test_without_producers_the_answer_is_there_at_once():
    d = Engine("D", consumes=True, group=group())
    settled = time.monotonic() + 0.1  # a directory that is this new is read once more
    eventually(lambda: time.monotonic() > settled)
    d.find("first", Want(key(1)))
    d.end.look("r", Want(key(1)))
    is_miss(d.end.found("r"), "no_producer")
    d.close()


def test_content_is_found_at_an_engine_of_this_host(pair):
    p, d = pair
    p.offer(1, asked=False)
    claim = d.find("r", Want(key(1)))
    d.read(claim).wait(8)
    assert p.freed() == [((1, 2, 3),)]
    is_miss(d.find("again", Want(key(1))), "absent")


def test_content_is_found_at_a_configured_peer():
    p = Engine("P", produces=True, group=group())
    d = Engine("D", consumes=True, group=group(), peers=(p.offer(9)["at"],))
    p.offer(1)
    assert isinstance(d.find("r", Want(key(1))), Claim)
    d.close()
    p.close()


def test_a_label_is_preferred_but_never_believed_alone(pair):
    p, d = pair
    p.offer(1, ((1,),), label="a")
    p.offer(1, ((2,),), label="b")
    assert d.find("r", Want(key(1), label="b")).blocks == ((2,),)
    is_miss(d.find("s", Want(key(2), label="a")), "absent")


def test_content_lookup_can_be_switched_off():
    with engines(content_lookup=False) as (p, d):
        ticket = p.offer()
        d.end.look("r", Want(key(1)))
        is_miss(d.end.found("r"), "no_producer")
        assert isinstance(d.find("s", Want(key(1), ticket=ticket)), Claim)


# -- giving back, leases ----------------------------------------------------------------------


def test_an_abandoned_claim_is_offered_again(pair):
    p, d = pair
    ticket = p.offer(asked=False)
    d.find("r", Want(key(1), ticket=ticket))
    eventually(lambda: p.end.unasked_blocks() == 0)
    d.end.abandon("r")
    d.end.abandon("r")
    d.end.abandon("never seen")
    eventually(lambda: p.end.unasked_blocks() == 3)
    assert isinstance(d.find("r", Want(key(1), ticket=ticket)), Claim)


def test_closing_a_consumer_gives_its_claims_back(pair):
    p, d = pair
    d.find("r", Want(key(1), ticket=p.offer(asked=False)))
    eventually(lambda: p.end.unasked_blocks() == 0)
    d.close()
    eventually(lambda: p.end.unasked_blocks() == 3, 2)


def test_a_claim_outlives_its_lease_until_it_is_settled():
    with engines(lease_s=0.6) as (p, d):
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        until = time.monotonic() + 1.5
        eventually(lambda: time.monotonic() > until)
        assert p.end.drain_released() == []
        d.read(claim).wait(8)
        d.end.settle("r")
        assert p.freed() == [((1, 2, 3),)]


def test_renewals_prolong_what_the_owner_has_promised():
    with engines(lease_s=0.9) as (p, d):
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        eventually(claim.promise.holds)
        first = claim.promise.until
        assert first <= SYSTEM.now() + 0.9
        eventually(lambda: claim.promise.until > first, 2)
        renewed = claim.promise.until
        p.end._lender._ledger.abandon(claim.grant, SYSTEM.now())
        until = time.monotonic() + 0.7
        eventually(lambda: time.monotonic() > until)
        assert claim.promise.until <= renewed + 0.5, "a promise was prolonged that the owner had ended"


def test_what_was_settled_unread_comes_back_before_the_lease_ends():
    with engines(lease_s=3.0) as (p, d):
        d.find("r", Want(key(1), ticket=p.offer()))
        eventually(lambda: p.end.stats()["taken"])
        d.end.settle("r")
        eventually(p.end.drain_released, 2.5)
        assert p.end.stats()["failed"] == 1


def answers_late(engine, op, delay_s):
    """Have ``engine`` carry out ``op`` at once and answer late."""
    handlers = engine.end._lender._server._handlers
    real = handlers[op]

    def slow(body):
        later, answer = Future(), real(body)
        threading.Timer(delay_s, lambda: later.set_result(answer)).start()
        return later

    handlers[op] = slow


def test_a_claim_that_is_granted_too_late_is_given_back():
    with engines(consumer={"lookup_timeout_s": 0.2}) as (p, d):
        meet(p, d)
        answers_late(p, "claim", 0.6)
        ticket = p.offer(asked=False)
        d.end.look("r", Want(key(1), ticket=ticket))
        assert isinstance(d.end.found("r"), Claim)
        is_miss(eventually(lambda: found if isinstance(found := d.end.found("r"), Miss) else None), "unreachable")
        eventually(lambda: p.end.unasked_blocks() == 3, 2)


def test_an_offer_that_is_granted_too_late_is_given_back():
    with engines(consumer={"lookup_timeout_s": 0.2}) as (p, d):
        meet(p, d)
        answers_late(p, "claim", 0.6)
        p.offer(asked=False)
        assert isinstance(d.find("r", Want(key(1))), Miss)
        eventually(lambda: p.end.unasked_blocks() == 3, 2)


def test_a_claim_in_use_that_is_granted_too_late_is_renewed():
    with engines(consumer={"lookup_timeout_s": 0.2}, lease_s=0.9) as (p, d):
        meet(p, d)
        answers_late(p, "claim", 0.6)
        d.end.look("r", Want(key(1), ticket=p.offer()))
        claim = d.end.commit("r")
        until = time.monotonic() + 1.8
        eventually(lambda: time.monotonic() > until)
        assert p.end.drain_released() == []
        d.read(claim).wait(8)


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_claim_in_use_whose_connection_broke_is_asked_for_again_and_kept(monkeypatch, carried_out):
    with engines(lease_s=0.9) as (p, d):
        meet(p, d)
        client = d.end._client
        real, broken = client.call, []

        def call(endpoint, op, body, timeout_s):
            if op != "claim" or broken:
                return real(endpoint, op, body, timeout_s)
            if carried_out:
                real(endpoint, op, body, timeout_s)
            broken.append(Future())
            broken[0].set_exception(BrokenError("the connection was closed"))
            return broken[0]

        monkeypatch.setattr(client, "call", call)
        d.end.look("r", Want(key(1), ticket=p.offer()))
        claim = d.end.commit("r")
        until = time.monotonic() + 1.8
        eventually(lambda: time.monotonic() > until)
        assert broken
        assert p.end.drain_released() == []
        d.read(claim).wait(8)
        assert p.end.stats()["taken"] == 2, "with the one that `meet` took"


def test_an_entry_that_nobody_takes_expires():
    with engines(lease_s=0.3) as (p, d):
        ticket = p.offer()
        assert p.freed() == [((1, 2, 3),)]
        d.find("r", Want(key(1), ticket=ticket))
        # What the ticket says is the answer until its owner has been heard.
        eventually(lambda: isinstance(d.end.found("r"), Miss))
        is_miss(d.end.found("r"), "gone")
        assert p.end.stats()["expired"] == 1


def test_a_reader_of_blocks_that_were_reclaimed_hears_that_they_are_stale(pair):
    p, d = pair
    meet(p, d)
    ticket = p.offer(asked=False)
    p.end.reclaim(1)
    assert p.end.drain_released() == [((1, 2, 3),)]
    d.end.look("r", Want(key(1), ticket=ticket))
    claim = d.end.commit("r")
    assert isinstance(claim, Claim), "the ticket was not answered from its own content"
    with pytest.raises(StaleError):
        d.read(claim).wait(8)
    assert isinstance(d.end.found("r"), Claim), "an answer changed after it was final"


def test_a_claim_that_is_refused_before_anybody_acts_on_it_is_a_miss(pair):
    p, d = pair
    meet(p, d)
    ticket = p.offer(asked=False)
    p.end.reclaim(1)
    d.end.look("r", Want(key(1), ticket=ticket))
    assert isinstance(d.end.found("r"), Claim)
    eventually(lambda: d.end.stats().get("miss_gone"))
    is_miss(d.end.found("r"), "gone")
    is_miss(d.end.commit("r"), "gone")
    is_miss(d.end.commit("nobody looked"), "absent")


def test_a_cache_reset_leaves_claimed_entries(pair):
    p, d = pair
    meet(p, d)
    claimed = p.offer(1, ((1,),))
    p.offer(2, ((2,),))
    d.find("r", Want(key(1), ticket=claimed))
    eventually(lambda: p.end.stats()["taken"] == 2)
    assert not p.end.clear()
    assert p.end.drain_released() == [((2,),)]
    d.end.abandon("r")
    eventually(p.end.clear)


def test_roles_are_kept_apart(pair):
    p, d = pair
    with pytest.raises(KVConnectError, match="consumer only"):
        d.offer()
    p.end.look("r", Want(key(1)))
    is_miss(p.end.found("r"), "not_consumer")


def test_an_engine_may_be_both():
    options = {"group": group(), "produces": True, "consumes": True}
    a, b = Engine("A", **options), Engine("B", **options)
    claim = b.find("r", Want(key(1), ticket=a.offer()))
    b.read(claim).wait(8)
    assert torch.equal(b.block(10), a.block(1))
    claim = a.find("r", Want(key(2), ticket=b.offer(2, ((20, 21),))))
    a.read(claim, local=((40, 41),)).wait(8)
    assert torch.equal(a.block(40), b.block(20))
    b.close()
    a.close()


def test_scheduler_calls_never_wait_for_the_network(pair):
    p, d = pair
    ticket = {**p.offer(), "at": "10.255.255.1:9"}
    slowest = 0.0
    for number in range(50):
        for call in (
            lambda number=number: d.end.look(f"r{number}", Want(key(1), ticket=ticket, label="x")),
            lambda number=number: d.end.found(f"r{number}"),
            lambda number=number: d.end.abandon(f"r{number}"),
            lambda number=number: p.offer(number),
            p.end.drain_released,
            lambda: p.end.reclaim(1),
        ):
            started = time.perf_counter()
            call()
            slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.2, "a call on the scheduling thread took too long"


def test_closing_leaves_nothing_behind():
    with engines() as (p, d):  # process-wide threads and memory of the first use stay
        meet(p, d)
    before = Holdings.now()
    with engines() as (p, d):
        meet(p, d)
        directory = p.end._directory.path
        assert list(directory.iterdir())
    assert_nothing_left(before)
    assert not list(directory.iterdir())
