"""Both ends of a store buffer in engines without a model: what is stored, taken, given up and lost."""

import dataclasses
import secrets
import threading
import time
import tracemalloc

import msgpack
import pytest

from kvconnect.buffers import store_parts
from kvconnect.buffers.base import Claim, Miss, Want
from kvconnect.buffers.store import MAX_MANIFEST_BYTES
from kvconnect.buffers.store_manifest import Manifest, Part, name_of, sum_of
from kvconnect.control import ControlClient, wait_for
from kvconnect.errors import (
    BrokenError,
    BufferFullError,
    ConfigError,
    DeadlineError,
    HandshakeError,
    IntegrityError,
    LoadError,
)
from kvconnect.testing.layouts import separate_layers, shared_region
from tests.buffers.engines import eventually, is_miss
from tests.buffers.stores import LAYOUT, Stall, StoreEngine, key, pair


def test_every_worker_reads_what_its_counterpart_has_written_whatever_its_strides(store):
    layouts = [separate_layers(4, 40, 2, 300, groups=2), separate_layers(2, 40, 3, 500, groups=2)]
    others = [shared_region(4, 40, 2, 300, groups=2), shared_region(2, 40, 3, 500, groups=2)]
    lent = ((7, 3, 30, 31), (0, 0, 12, 9, 2))  # a sliding window has left null blocks behind
    p = StoreEngine(store, layouts=layouts, consumes=False)
    d = StoreEngine(store, layouts=others, produces=False)
    assert p.put(1, lent)
    claim = d.claim()
    assert claim.blocks == ((1, 2, 3, 4), (0, 0, 1, 2, 3))
    # As where our own cache has the first block, and the window has moved on.
    remote, local = ((2, 3, 4), (3, 1)), ((20, 5, 6), (1, 39))
    for rank in range(2):
        d.reads(claim, remote, local, rank).wait(8)
        assert d.stream(rank, local).equal(p.stream(rank, ((3, 30, 31), (2, 12))))
    d.close()
    p.close()


def test_a_pipeline_stage_without_a_layer_of_a_group_has_nothing_of_it(store):
    stages = [separate_layers(2, 16, 1, 100, groups=1), separate_layers(3, 16, 1, 100, groups=2)]
    with pair(store, layouts=stages) as (p, d):
        assert p.put(1, ((1, 2), (5,)))
        claim = d.claim()
        for rank in range(2):
            d.reads(claim, local=((8, 9), (3,)), rank=rank).wait(8)
        assert d.stream(1, ((8, 9), (3,))).equal(p.stream(1, ((1, 2), (5,))))


def test_an_entry_is_taken_once_and_dropped_when_it_was_read(store):
    with pair(store) as (p, d):
        p.put()
        claim = d.claim()
        d.reads(claim).wait(8)
        d.end.settle("r")
        assert is_miss(d.find(request="again"), "absent")
        eventually(lambda: not d.end._store.entries())


def test_requests_of_one_engine_share_an_entry(store):
    with pair(store) as (p, d):
        p.put()
        first, second = d.claim(request="0_r"), d.claim(request="1_r")
        d.end.settle("0_r")
        d.reads(second).wait(8)
        assert first.grant == second.grant
        d.end.abandon("1_r")
        assert is_miss(d.find(request="again"), "absent"), "one of them has used it"


def test_what_was_abandoned_is_offered_again(store):
    with pair(store) as (p, d):
        p.put()
        d.claim()
        d.end.abandon("r")
        assert isinstance(eventually(lambda: _claimed(d)), Claim)


def _claimed(d):
    name = secrets.token_hex(4)
    found = d.find(request=name)
    return found if isinstance(found, Claim) else None


def test_who_has_a_ticket_waits_for_what_is_still_being_written(store, stall):
    with pair(store) as (p, d):
        hang = stall("put")
        ticket = p.end.offer(key(1), ((1, 2, 3),), label=None, asked=True)
        d.end.look("r", Want(key(1), ticket=ticket))
        assert is_miss(d.find(request="without"), "absent")
        assert d.end.found("r") is None
        hang.gate.set()
        assert isinstance(eventually(lambda: d.end.found("r")), Claim)


def test_what_a_dead_taker_had_is_offered_again_after_its_lease(store):
    with pair(store, lease_s=0.6) as (p, d):
        p.put()
        assert d.end._store.take(name_of(key(1)), "dead", 0.3) is not None
        assert is_miss(d.find(request="early"), "absent")
        assert eventually(lambda: _claimed(d))


def test_a_claim_is_kept_for_as_long_as_its_request_waits(store):
    with pair(store, lease_s=0.6) as (p, d):
        p.put()
        claim = d.claim()
        other = StoreEngine(store, produces=False, lease_s=0.6)
        threading.Event().wait(1.5)
        assert is_miss(other.find(), "absent")
        other.close()
        assert d.end.commit("r") == claim
        d.reads(claim).wait(8)


def test_readers_share_an_entry_that_stays(store):
    store = dataclasses.replace(store, options={**store.options, "mode": "share"})
    with pair(store) as (p, d):
        assert p.put()
        assert not p.put(), "it is there already"
        assert p.count("not_stored_present") == 1
        for request in ("a", "b"):
            claim = d.claim(request=request)
            d.reads(claim).wait(8)
            d.end.settle(request)
        assert d.stream(0, ((10, 11, 12),)).equal(p.stream(0, ((1, 2, 3),)))


def test_the_oldest_make_room_for_what_comes(store):
    three = 3 * LAYOUT.nbytes([(1, 2, 3)]) + 2000
    store = dataclasses.replace(store, options={**store.options, "capacity_bytes": three})
    with pair(store) as (p, d):
        for number in range(5):
            assert p.put(number)
        assert [isinstance(d.find(number, str(number)), Claim) for number in range(5)] == [
            False,
            False,
            True,
            True,
            True,
        ]
        assert not p.put(9, (tuple(range(1, 20)),)), "it never fits"
        assert p.count("not_stored_no_room") == 1


def test_segments_that_do_not_belong_together_are_not_joined(store):
    two = separate_layers(3, 32, 2, 700, groups=2)
    share = dataclasses.replace(store, options={**store.options, "mode": "share"})
    first, whole = key(1, 16), key(2, 32)
    with pair(share) as (p, d):
        p.end.offer(first, ((1,),), label=None, asked=True)
        eventually(lambda: p.count("stored"))
        other = StoreEngine(share, layouts=[two], consumes=False)
        # As of nobody but who writes to the store by hand: a second segment with one group more.
        other.end.offer(whole, ((2,), (3,)), label=None, asked=True, before=[(first, ((1,), (4,)))])
        eventually(lambda: other.count("stored"))
        d.end._looks._shapes = ()
        d.end.look("r", Want(whole, prefixes=(first,)))
        found = eventually(lambda: d.end.found("r"))
        assert (found.key, len(found.blocks)) == (first, 1)
        other.close()


def test_what_was_of_use_is_kept_longest(store):
    three = 3 * LAYOUT.nbytes([(1, 2, 3)]) + 2000
    options = {**store.options, "mode": "share", "capacity_bytes": three}
    with pair(dataclasses.replace(store, options=options)) as (p, d):
        for number in range(3):
            assert p.put(number)
        threading.Event().wait(0.02)
        d.claim(0)
        assert not p.put(1), "to be offered again is to be of use, too"
        eventually(lambda: sum(entry.used > entry.made + 0.01 for entry in p.end._store.entries()) == 2)
        assert p.put(3)
        assert [isinstance(d.find(number, f"again {number}"), Claim) for number in range(4)] == [
            True,
            True,
            False,
            True,
        ]


def test_a_store_is_not_listed_for_each_prompt(store, monkeypatch, store_class):
    lists, real = [], store_class.entries
    monkeypatch.setattr(store_class, "entries", lambda self: lists.append(1) or real(self))
    with pair(store) as (p, _):
        for number in range(20):
            assert p.put(number)
        assert len(lists) <= 4


def test_what_is_too_old_is_not_handed_out(store):
    store = dataclasses.replace(store, options={**store.options, "max_age_s": 0.2})
    with pair(store) as (p, d):
        p.put()
        threading.Event().wait(0.3)
        assert isinstance(d.find(), Miss)


def test_a_reader_of_an_entry_that_was_dropped_gets_a_failed_load(store):
    store = dataclasses.replace(store, options={**store.options, "mode": "share"})
    with pair(store) as (p, d):
        p.put()
        claim = d.claim()
        p.end._store.drop(name_of(key(1)))
        with pytest.raises(LoadError, match="gone"):
            d.reads(claim).wait(8)
        assert d.workers[0].stats() == {"load_failed_load": 1}


def test_other_workers_memory_is_a_miss_and_stays_for_others(store):
    p = StoreEngine(store, consumes=False)
    d = StoreEngine(store, produces=False, layouts=[separate_layers(3, 32, 2, 701)])
    p.put()
    assert is_miss(d.find(), "mismatch")
    eventually(lambda: [entry.taken for entry in p.end._store.entries()] == [False])
    d.close()
    p.close()


# -- giving up ------------------------------------------------------------------------


@pytest.fixture
def stall(store_class, monkeypatch):
    stalls = []

    def make(method):
        stalls.append(Stall(monkeypatch, store_class, method))
        return stalls[-1]

    yield make
    for each in stalls:
        each.gate.set()


def test_blocks_return_at_once_when_the_engine_needs_them_although_the_store_hangs(store, stall):
    with pair(store) as (p, d):
        hang = stall("put")
        p.end.offer(key(1), ((1, 2, 3),), label=None, asked=False)
        assert hang.entered.wait(5)
        assert (p.end.unasked_blocks(), p.end.lent_blocks(), p.end.awaits_takers()) == (3, 3, True)
        assert p.end.drain_released() == []
        assert p.end.reclaim(1) == 3
        assert p.end.reclaim(1) == 0, "they are on their way already"
        assert p.freed() == [((1, 2, 3),)]
        hang.gate.set()
        assert p.count("not_stored_reclaimed") == 1
        assert is_miss(d.find(), "absent")
        assert not p.end.awaits_takers()


def test_a_store_that_hangs_is_waited_for_once_until_it_answers(store, stall):
    with pair(store, lookup_timeout_s=0.5) as (p, d):
        p.put()
        hang = stall("take")
        assert is_miss(d.find(request="first"), "timeout")
        begun = time.monotonic()
        assert all(is_miss(d.find(request=f"next {n}"), "unreachable") for n in range(20))
        assert time.monotonic() - begun < 0.4, "somebody waited for a store that is known to hang"
        hang.gate.set()
        eventually(lambda: isinstance(d.find(request=secrets.token_hex(4)), Claim))


def test_blocks_stay_the_stores_while_a_worker_reads_them(store, monkeypatch):
    entered, gate, real = threading.Event(), threading.Event(), store_parts._lift

    def lift(*arguments):
        entered.set()
        assert gate.wait(30)
        real(*arguments)

    with pair(store) as (p, _):
        monkeypatch.setattr(store_parts, "_lift", lift)
        p.end.offer(key(1), ((1, 2, 3),), label=None, asked=False)
        assert entered.wait(5)
        assert p.end.reclaim(3) == 3
        threading.Event().wait(0.3)
        assert p.end.drain_released() == []
        gate.set()
        assert p.freed() == [((1, 2, 3),)]


def test_what_was_asked_for_gives_way_only_after_its_time(store, stall):
    with pair(store) as (p, _):
        hang = stall("put")
        p.end.offer(key(1), ((1, 2, 3),), label=None, asked=True)
        assert hang.entered.wait(5)
        assert p.end.reclaim(3) == 0
        assert p.end.reclaim(3, 60.0) == 0
        assert p.end.reclaim(3, 0.0) == 3
        p.freed()
        hang.gate.set()


def test_no_more_is_on_its_way_than_the_options_say(store, stall):
    limit = 2 * LAYOUT.nbytes([(1, 2, 3)])
    store = dataclasses.replace(store, options={**store.options, "writing_bytes": limit})
    with pair(store) as (p, _):
        hang = stall("put")
        for number in range(4):
            p.end.offer(key(number), ((number + 1, 20, 21),), label=None, asked=True)
        assert p.freed() == [((3, 20, 21),), ((4, 20, 21),)]
        assert p.count("not_stored_busy") == 2
        assert p.end.offer(key(8), ((5,),), label=None, asked=True)["coming"] is False
        hang.gate.set()
        eventually(lambda: p.count("stored") == 2)


def test_a_store_that_hangs_costs_a_request_its_lookup_timeout(store, stall):
    with pair(store, lookup_timeout_s=0.2) as (p, d):
        p.put()
        hang = stall("take")
        start = time.monotonic()
        assert is_miss(d.find(), "timeout")
        assert time.monotonic() - start < 2
        d.end.abandon("r")
        hang.gate.set()
        assert eventually(lambda: _claimed(d)), "what came too late was given back"


def test_a_load_ends_in_time_and_a_cancelled_one_at_once(store, stall):
    with pair(store, transfer_timeout_s=1.0) as (p, d):
        p.put()
        claim = d.claim()
        hang = stall("get")
        late, cancelled = d.reads(claim), d.reads(claim)
        assert hang.entered.wait(5)
        cancelled.cancel()
        with pytest.raises(LoadError, match="cancelled"):
            cancelled.wait(0.5)
        with pytest.raises(DeadlineError):
            late.wait(5)
        before = d.stream(0, ((10, 11, 12),))
        hang.gate.set()
        threading.Event().wait(0.2)
        assert d.stream(0, ((10, 11, 12),)).equal(before), "blocks were written that are the engine's again"


def test_blocks_return_when_a_worker_has_died(store, stall):
    with pair(store) as (p, d):
        hang = stall("put")
        p.end.offer(key(1), ((1, 2, 3),), label=None, asked=True)
        assert hang.entered.wait(5)
        p.workers[0]._server.close()
        hang.gate.set()
        assert p.end.clear() is False
        assert p.freed() == [((1, 2, 3),)]
        assert is_miss(d.find(), "absent")


def test_a_store_that_fails_releases_the_blocks(store, store_class, monkeypatch):
    def fail(*_):
        raise RuntimeError("a third party's mistake")

    with pair(store) as (p, d):
        monkeypatch.setattr(store_class, "put", fail)
        assert not p.put()
        assert p.count("not_stored_store_failed") == 1
        monkeypatch.setattr(store_class, "take", fail)
        assert is_miss(d.find(), "unreachable")


def test_a_prompt_whose_publishing_got_no_answer_is_whole_and_dropped_by_a_cache_reset(store, store_class, monkeypatch):
    real = store_class.publish

    def publish(*args, **how):
        real(*args, **how)
        raise BrokenError("the answer was lost")

    monkeypatch.setattr(store_class, "publish", publish)
    with pair(store) as (p, d):
        for number in (1, 2):
            assert not p.put(number)
        d.reads(d.claim(1)).wait(8)
        assert p.end.clear()
        eventually(lambda: not [entry for entry in p.end._store.entries() if not entry.taken])


def test_a_cache_reset_drops_what_the_engine_has_stored(store):
    with pair(store) as (p, d):
        p.put()
        assert p.end.clear()
        eventually(lambda: not p.end._store.entries())
        assert is_miss(d.find(), "absent")


def test_a_cache_reset_drops_what_is_just_being_published(store, stall):
    with pair(store) as (p, d):
        hang = stall("publish")
        p.end.offer(key(1), ((1, 2, 3),), label=None, asked=True)
        assert hang.entered.wait(5)
        p.freed()
        assert p.end.clear()
        hang.gate.set()
        eventually(lambda: p.count("stored") == 1)
        eventually(lambda: not p.end._store.entries())
        assert is_miss(d.find(), "absent")


def test_only_its_own_scheduler_has_a_workers_blocks_written(store):
    with pair(store) as (p, _):
        told = p.workers[0].describe()
        client = ControlClient()
        body = {"secret": "0" * 32, "draft": "ab", "blocks": ["Ag=="], "chunk_bytes": 4096}
        for wrong, why in (
            (body, "own scheduler"),
            ({**body, "secret": told["secret"], "draft": "../x"}, "hexadecimal"),
        ):
            for op in ("store.write", "store.stop"):
                with pytest.raises(HandshakeError, match=why):
                    wait_for(client.call(told["endpoint"], op, wrong, 5), 6)
        client.close()


# -- damage ---------------------------------------------------------------------------


def test_a_byte_that_has_changed_is_never_decoded_from(store, store_class, monkeypatch):
    real = store_class.get

    def get(self, place, part, offset, into):
        real(self, place, part, offset, into)
        into[-1] ^= 1

    with pair(store) as (p, d):
        p.put()
        claim = d.claim()
        monkeypatch.setattr(store_class, "get", get)
        with pytest.raises(IntegrityError):
            d.reads(claim).wait(8)
        assert not d.stream(0, ((10, 11, 12),)).any()
        assert d.workers[0].stats() == {"load_failed_integrity": 1}


@pytest.mark.parametrize("place", [0, 14, 15, 20, 40, -1])
def test_a_damaged_manifest_is_a_miss_and_dropped(store, store_class, monkeypatch, place):
    real = store_class.publish

    def publish(self, draft, name, manifest, **how):
        data = bytearray(manifest)
        data[place] ^= 4
        return real(self, draft, name, bytes(data), **how)

    monkeypatch.setattr(store_class, "publish", publish)
    with pair(store) as (p, d):
        p.put()
        assert is_miss(d.find(), "damaged")
        eventually(lambda: not d.end._store.entries())


def test_an_entry_under_another_keys_name_is_a_miss(store, store_class, monkeypatch):
    real = store_class.publish
    monkeypatch.setattr(
        store_class, "publish", lambda s, draft, _, *rest, **how: real(s, draft, name_of(key(2)), *rest, **how)
    )
    with pair(store) as (p, d):
        p.put(1)
        assert is_miss(d.find(2), "damaged")


def test_manifests_of_any_length_are_read_or_refused():
    whole = Manifest(key(1), ((1, 2),), 100, (Part(150, "s", bytes(16)),), 1.5)
    packed = whole.pack()
    assert Manifest.unpack(packed) == whole
    for length in range(len(packed)):
        with pytest.raises(IntegrityError):
            Manifest.unpack(packed[:length])


def test_a_manifest_that_would_fill_the_readers_memory_is_refused():
    empty = msgpack.packb([[{}] * 4000] * 1000)  # 4 MB, a hundred times as much in memory
    for body in (empty, b"\0" * MAX_MANIFEST_BYTES):
        tracemalloc.start()
        with pytest.raises(IntegrityError):
            Manifest.unpack(b"kvconnect store\x01" + sum_of(body) + body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 50 << 20
    part = Part(MAX_MANIFEST_BYTES, "shape", bytes(MAX_MANIFEST_BYTES))
    with pytest.raises(BufferFullError, match="chunk_bytes is too small"):
        Manifest(key(1), ((1,),), 8, (part,), 1.0).pack()


def test_wrong_options_name_their_path_and_the_cure(store):
    for options, said in (
        ({"mood": "take"}, r"buffer\.mood is not a known option; did you mean 'mode'"),
        ({"mode": "keep"}, r"buffer\.mode must be one of 'take', 'share'"),
        ({"capacity_bytes": 0}, r"buffer\.capacity_bytes must be greater than 0"),
        ({"chunk_bytes": 1 << 40}, r"buffer\.chunk_bytes must be at most"),
    ):
        with pytest.raises(ConfigError, match=said):
            StoreEngine(dataclasses.replace(store, options={**store.options, **options}))
