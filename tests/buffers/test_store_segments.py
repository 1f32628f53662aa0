"""Stores that engines share: prompts in segments, room for them, and what damage to one costs."""

import dataclasses
import time

import pytest

from kvconnect.buffers.base import Claim, Want
from kvconnect.buffers.store import Stored, StoreOptions
from kvconnect.buffers.store_manifest import Manifest, name_of
from kvconnect.buffers.store_room import Occupancy, make_room
from kvconnect.errors import BufferFullError, IntegrityError
from tests.buffers.engines import eventually
from tests.buffers.stores import LAYOUT, key, pair

#: A prompt in segments of one block: the key up to each one's end, and its block.
PROMPT = [(key(number, 16 * number), ((number,),)) for number in range(1, 21)]
KEYS = tuple(key for key, _ in PROMPT)


@pytest.fixture
def shared(store):
    return dataclasses.replace(store, options={**store.options, "mode": "share"})


def offer(p, prompt=PROMPT):
    """Offer a prompt, and wait until nothing of it is on its way; return how many segments were stored."""
    before, (*first, (last, blocks)) = p.count("stored"), prompt
    p.end.offer(last, blocks, label=None, asked=True, before=first)
    eventually(
        lambda: p.end.lent_blocks() == 0 and p.end._offers._under_way.nbytes == 0 and _decided(p) % len(prompt) == 0
    )
    return p.count("stored") - before


def _decided(p):
    return sum(number for name, number in p.end.stats().items() if name == "stored" or name.startswith("not_stored"))


def look(d, request="r", keys=KEYS):
    d.end.look(request, Want(keys[-1], prefixes=keys[:-1]))
    return eventually(lambda: d.end.found(request))


def test_a_prompt_larger_than_what_may_be_on_its_way_is_there_after_some_turns(shared):
    shared = dataclasses.replace(shared, options={**shared.options, "writing_bytes": 5 * LAYOUT.nbytes([(1,)])})
    with pair(shared) as (p, d):
        turns = 0
        while offer(p):
            turns += 1
        assert turns <= 4
        claim = look(d)
        assert claim.key == KEYS[-1]
        d.reads(claim, local=(tuple(range(1, 21)),)).wait(8)
        assert d.stream(0, (tuple(range(1, 21)),)).equal(p.stream(0, (tuple(range(1, 21)),)))


def test_a_segment_that_is_damaged_is_dropped_and_stored_anew(shared, store_class, monkeypatch):
    with pair(shared) as (p, d):
        assert offer(p) == len(PROMPT)
        real, spoilt = store_class.get, name_of(KEYS[2], KEYS[1].length)
        place = p.end._store.find(spoilt).place

        def get(self, where, part, offset, into):
            real(self, where, part, offset, into)
            if where == place:
                into[-1] ^= 1

        monkeypatch.setattr(store_class, "get", get)
        with pytest.raises(IntegrityError):
            d.reads(look(d), local=(tuple(range(1, 21)),)).wait(8)
        monkeypatch.undo()
        # Others have what comes before it, until it is stored again.
        eventually(lambda: p.end._store.find(spoilt) is None)
        assert look(d, "after").key == KEYS[1]
        assert offer(p) == 1
        assert look(d, "again").key == KEYS[-1]


def test_what_was_found_in_time_is_had_although_there_is_more(shared, store_class, monkeypatch):
    with pair(shared, lookup_timeout_s=1.0) as (p, d):
        offer(p)
        real, asked = store_class.find, []

        def find(self, name):
            asked.append(name)
            time.sleep(0.15)
            return real(self, name)

        monkeypatch.setattr(store_class, "find", find)
        found = look(d)
        assert isinstance(found, Claim)
        assert KEYS[0].length <= found.key.length < KEYS[-1].length
        d.end.abandon("r")
        count = len(asked)
        time.sleep(0.4)
        assert len(asked) <= count + 1, "nobody wants to know any more"


def test_a_manifest_that_is_too_long_costs_its_prompt_only(shared, monkeypatch):
    def pack(_):
        raise BufferFullError("too long")

    with pair(shared) as (p, _):
        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "pack", pack)
            assert offer(p) == 0
        assert p.count("not_stored_store_failed") == len(PROMPT)
        assert offer(p) == len(PROMPT)


# -- room ---------------------------------------------------------------------------------


class Listed:
    """A store of which others drop everything first; it counts lists."""

    def __init__(self, count, nbytes):
        self.there = [Stored(str(number), nbytes, number, taken=False) for number in range(count)]
        self.tried, self.lists = [], 0

    def entries(self):
        self.lists += 1
        return list(self.there)

    def drop(self, name):
        self.tried.append(name)
        return False


def test_what_others_have_dropped_makes_room_too():
    store = Listed(10, 100)
    assert make_room(store, StoreOptions(capacity_bytes=1000, max_age_s=1e12), 150, time.time()).over == -50
    assert store.tried == ["0", "1"]


def test_a_list_is_made_only_when_it_may_be_full():
    store = Listed(5, 100)
    occupancy = Occupancy(store, StoreOptions(capacity_bytes=1000, max_age_s=1e12))
    assert [occupancy.admit(100, f"new {number}") for number in range(5)] == [True] * 5
    assert store.lists == 1
    assert occupancy.admit(100, "one more")
    assert store.lists == 2
    assert not occupancy.admit(1001, "too large")
