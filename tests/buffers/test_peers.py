"""Peers that do not fit, or are not there."""

import dataclasses
import itertools
import logging
import socket
import time

import pytest
import torch

from kvconnect.buffers import layouts, lender, links, peers
from kvconnect.buffers.base import Claim, Miss, Want
from kvconnect.buffers.recent import Recent
from kvconnect.control import ControlClient
from kvconnect.errors import HandshakeError, KVConnectError, LoadError
from tests.buffers.engines import Engine, engines, eventually, group, is_miss, key, layout, meet


@pytest.fixture
def pair():
    with engines() as both:
        yield both


def test_engines_that_differ_are_refused_by_field_once_in_the_log(caplog):
    with engines(consumer={"fingerprint": {"dtype": "float16"}}) as (p, d), caplog.at_level(logging.WARNING):
        for number in range(3):
            miss = d.find(f"r{number}", Want(key(1), ticket=p.offer()))
            is_miss(miss, "mismatch")
            assert "dtype differs: ours 'float16', theirs 'bfloat16'" in miss.detail
        logged = [r for r in caplog.records if r.name == "kvconnect.buffers.peers"]
        assert len(logged) == 1
        assert d.end.stats()["miss_mismatch"] == 3
        assert p.end.stats()["refused"] >= 1


def test_workers_may_differ_from_their_own_scheduler_but_not_from_their_counterparts():
    marks = {"blocks": "as rank 0 sees them"}
    with engines(marks=marks) as (p, d):
        d.read(d.find("r", Want(key(1), ticket=p.offer()))).wait(8)
        assert torch.equal(d.block(10), p.block(1))
    with engines(marks=marks, consumer={"marks": {"blocks": "otherwise"}}) as (p, d):
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        with pytest.raises(LoadError, match="blocks differs: ours 'otherwise', theirs 'as rank 0 sees them'"):
            d.read(claim).wait(8)


def test_refusals_are_logged_a_limited_number_of_times(monkeypatch, caplog):
    monkeypatch.setattr(lender, "_MAX_WAITING", 3)
    p = Engine("P", produces=True, group=group())
    client = ControlClient()
    hello = p.end._lender._me.to_wire()
    for number in range(8):
        body = {**hello, "engine": f"e{number}", "fingerprint": {"dtype": "other"}}
        with pytest.raises(HandshakeError):
            client.call(p.end._lender._at, "hello", body, 5).result(8)
    assert len([r for r in caplog.records if "does not fit" in r.message]) == 3
    assert p.end.stats()["refused"] == 8
    client.close()
    p.close()


def test_a_lease_of_a_moment_is_not_renewed_all_the_time(pair):
    p, d = pair
    p.end._lender._me = dataclasses.replace(p.end._lender._me, lease_s=0.001)
    renewals = []
    p.end._lender._server.handle("renew", lambda body: renewals.append(body) or {"gone": []})
    d.find("r", Want(key(1), ticket=p.offer()))
    until = time.monotonic() + 0.6
    eventually(lambda: time.monotonic() > until)
    assert len(renewals) <= 3


def test_a_ticket_of_an_engine_that_differs_is_a_mismatch_though_its_namespace_differs_too():
    with engines(consumer={"fingerprint": {"dtype": "float16"}}) as (p, d):
        for number in range(3):
            is_miss(d.find(f"r{number}", Want(key(1, namespace="other"), ticket=p.offer())), "mismatch")


@pytest.mark.parametrize(
    ("shape", "named"), [(layout(piece=1024), "layer 0"), (layout(layers=4), "layer 3")], ids=["bytes", "layers"]
)
def test_memory_of_another_shape_is_refused_by_layer(shape, named):
    with engines(consumer={"shape": shape}) as (p, d):
        miss = d.find("r", Want(key(1), ticket=p.offer()))
        is_miss(miss, "mismatch")
        assert named in miss.detail


def test_a_peer_met_before_our_workers_were_known_is_checked_when_they_are():
    with engines(consumer={"shape": layout(layers=4), "introduce": False}) as (p, d):
        assert isinstance(d.find("early", Want(key(1), ticket=p.offer())), Claim)
        d.end.introduce([worker.describe() for worker in d.workers])
        d.end._client.flush()
        miss = d.find("late", Want(key(2), ticket=p.offer(2, ((5,),))))
        is_miss(miss, "mismatch")
        assert "layer 3" in miss.detail


def test_more_blocks_or_other_places_are_no_mismatch():
    with engines(consumer={"shape": layout(blocks=32)}) as (p, d):
        d.read(d.find("r", Want(key(1), ticket=p.offer()))).wait(8)


def test_another_number_of_workers_is_refused():
    with engines(consumer={"parts": 2}) as (p, d):
        miss = d.find("r", Want(key(1), ticket=p.offer()))
        is_miss(miss, "mismatch")
        assert "number of workers differs: ours 2, theirs 1" in miss.detail


def test_engines_without_a_common_pipe_are_refused():
    with engines(producer={"pipe": "tcp"}) as (p, d):
        miss = d.find("r", Want(key(1), ticket=p.offer()))
        is_miss(miss, "mismatch")
        assert "no pipe joins" in miss.detail


@pytest.mark.parametrize("pipes", [{"inproc": 5}, {"inproc": {"pid": []}}, {"inproc": {}}, 7])
def test_a_peer_that_describes_nonsense_is_a_mismatch_every_time(pipes):
    with engines() as (p, d):
        p.end.introduce([{**p.workers[0].describe(), "pipes": pipes}])
        for number in range(2):
            is_miss(d.find(f"r{number}", Want(key(1), ticket=p.offer())), "mismatch")


def test_a_check_that_breaks_is_a_mismatch_every_time(monkeypatch):
    with engines() as (p, d):
        monkeypatch.setattr(layouts, "check_shapes", lambda *_: {}["missing"])
        for number in range(2):
            miss = d.find(f"r{number}", Want(key(1), ticket=p.offer()), 3)
            is_miss(miss, "mismatch")
            assert "KeyError" in miss.detail


def test_one_caller_that_fails_does_not_keep_a_meeting_from_the_others(pair, caplog):
    p, d = pair
    at, heard = p.offer()["at"], []
    peers = d.end._taker._peers
    d.end._client.soon(lambda: [peers.meet(at, then) for then in ([].pop, heard.append)])
    assert eventually(lambda: heard)[0].hello is not None
    assert "a call after meeting" in caplog.text


def test_a_look_by_ticket_always_ends(monkeypatch):
    with engines(consumer={"connect_timeout_s": 0.1, "lookup_timeout_s": 0.1}) as (p, d):
        monkeypatch.setattr(d.end._taker._peers, "meet", lambda *_: None)
        is_miss(d.find("r", Want(key(1), ticket=p.offer()), 3), "timeout")


def test_a_dead_peer_is_a_miss_at_once(pair):
    p, d = pair
    ticket = p.offer()
    p.close()
    started = time.monotonic()
    is_miss(d.find("r", Want(key(1), ticket=ticket)), "unreachable")
    assert time.monotonic() - started < 2


def test_a_silent_peer_costs_one_time_out_not_one_a_request(pair):
    p, _ = pair
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ticket = {**p.offer(), "at": f"127.0.0.1:{silent.getsockname()[1]}"}
        d = Engine("D", consumes=True, group=group(), connect_timeout_s=0.5)
        started = time.monotonic()
        is_miss(d.find("first", Want(key(1), ticket=ticket)), "unreachable")
        assert time.monotonic() - started > 0.4
        started = time.monotonic()
        for number in range(20):
            is_miss(d.find(f"r{number}", Want(key(1), ticket=ticket)), "unreachable")
        assert time.monotonic() - started < 0.4
        d.close()


def test_a_silent_producer_delays_content_lookups_once():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        peer = f"127.0.0.1:{silent.getsockname()[1]}"
        d = Engine("D", consumes=True, group=group(), peers=(peer,), connect_timeout_s=5, lookup_timeout_s=0.3)
        started = time.monotonic()
        is_miss(d.find("r", Want(key(1))), "timeout")
        assert time.monotonic() - started < 2
        d.close()


def test_a_restarted_producer_is_met_afresh_and_its_old_tickets_are_gone(pair):
    p, d = pair
    meet(p, d)
    ticket = p.offer()
    port = int(ticket["at"].rpartition(":")[2])
    p.close()
    again = Engine("P", produces=True, port=port, group=group())
    _old_is_refused(d, ticket)
    claim = eventually(lambda: _claimed(d, again))
    d.read(claim).wait(8)
    assert torch.equal(d.block(10), again.block(1))
    again.close()


def test_a_restarted_producer_is_asked_at_once_though_its_address_has_just_failed(pair):
    p, d = pair
    meet(p, d)
    ticket = p.offer()
    p.close()
    numbers = itertools.count()
    eventually(lambda: isinstance(d.find(f"dead{next(numbers)}", Want(key(1), ticket=ticket)), Miss))
    again = Engine("P", produces=True, port=int(ticket["at"].rpartition(":")[2]), group=group())
    assert isinstance(d.find("new", Want(key(1), ticket=again.offer())), Claim)
    again.close()


def _old_is_refused(d, ticket):
    answer = d.find("old", Want(key(1), ticket=ticket))
    if isinstance(answer, Claim):
        with pytest.raises(KVConnectError):
            d.read(answer, local=((30, 31, 32),)).wait(8)
    d.end.abandon("old")


def _claimed(d, again):
    answer = d.find("new", Want(key(1), ticket=again.offer()))
    if not isinstance(answer, Claim):
        d.end.abandon("new")
        return None
    return answer


def test_no_number_of_made_up_addresses_makes_memory_grow(monkeypatch):
    monkeypatch.setattr(peers, "_MAX_PEERS", 4)
    with engines() as (p, d):
        ticket = p.offer()
        for number in range(12):
            d.find(f"r{number}", Want(key(1), ticket={**ticket, "at": f"nowhere-{number}"}))
        assert len(d.end._taker._peers._peers) <= 5
        assert isinstance(d.find("r", Want(key(1), ticket=ticket)), Claim)


def test_no_number_of_failed_links_makes_memory_grow(monkeypatch):
    monkeypatch.setattr(links, "_MAX_LINKS", 4)
    monkeypatch.setattr(links, "RETRY_S", 0.0)
    with engines() as (p, d):
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        for number in range(12):
            with pytest.raises(LoadError):
                d.read(dataclasses.replace(claim, data={**claim.data, "incarnation": f"i{number}"})).wait(8)
        assert len(d.workers[0]._links._links) <= 5
        d.read(claim).wait(8)


def test_what_was_noticed_lately_is_no_news_and_the_oldest_is_forgotten():
    recent = Recent(2)
    assert [recent.add(item) for item in "aababcca"] == [True, False, True, False, False, True, False, True]
    assert len(recent) == 2
    recent.forget(lambda item: item == "a")
    assert recent.add("a")
