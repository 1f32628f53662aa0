"""A buffer of three methods as a store, inside engines without a model: SQLite's, as a third party wrote it."""

import dataclasses
import sqlite3
from contextlib import closing

import pytest
import torch

from kvconnect import registry
from kvconnect.buffers.base import BufferTraits, Claim, LookupBuffer
from kvconnect.buffers.memory import MemoryBuffer
from kvconnect.buffers.store import StoreOptions
from kvconnect.buffers.store_manifest import Manifest, Part, sum_of
from kvconnect.buffers.store_over_table import TableStore
from kvconnect.buffers.store_parts import ABREAST
from kvconnect.config import Backend
from kvconnect.errors import BrokenError, ConfigError, LoadError
from kvconnect.testing.layouts import separate_layers
from tests.buffers import test_store_ends as ends
from tests.buffers.engines import eventually, is_miss
from tests.buffers.stores import LAYOUT, StoreEngine, backend, install_sqlite, key, pair

stall = ends.stall
#: What holds of every store that is read once, keeps no lease and cannot be listed.
for test in (
    ends.test_every_worker_reads_what_its_counterpart_has_written_whatever_its_strides,
    ends.test_a_pipeline_stage_without_a_layer_of_a_group_has_nothing_of_it,
    ends.test_an_entry_is_taken_once_and_dropped_when_it_was_read,
    ends.test_what_was_abandoned_is_offered_again,
    ends.test_who_has_a_ticket_waits_for_what_is_still_being_written,
    ends.test_a_claim_is_kept_for_as_long_as_its_request_waits,
    ends.test_the_oldest_make_room_for_what_comes,
    ends.test_what_is_too_old_is_not_handed_out,
    ends.test_other_workers_memory_is_a_miss_and_stays_for_others,
    ends.test_blocks_return_at_once_when_the_engine_needs_them_although_the_store_hangs,
    ends.test_blocks_stay_the_stores_while_a_worker_reads_them,
    ends.test_what_was_asked_for_gives_way_only_after_its_time,
    ends.test_no_more_is_on_its_way_than_the_options_say,
    ends.test_a_store_that_hangs_costs_a_request_its_lookup_timeout,
    ends.test_a_load_ends_in_time_and_a_cancelled_one_at_once,
    ends.test_blocks_return_when_a_worker_has_died,
    ends.test_a_cache_reset_drops_what_the_engine_has_stored,
    ends.test_a_cache_reset_drops_what_is_just_being_published,
    ends.test_a_byte_that_has_changed_is_never_decoded_from,
    ends.test_an_entry_under_another_keys_name_is_a_miss,
    ends.test_wrong_options_name_their_path_and_the_cure,
):
    globals()[test.__name__] = test


@pytest.fixture
def file(tmp_path):
    return tmp_path / "kv.db"


@pytest.fixture
def sqlite(tmp_path, monkeypatch):
    """The third party's class."""
    return install_sqlite(monkeypatch, tmp_path)


@pytest.fixture
def store(sqlite, file):  # noqa: ARG001 - it is registered
    return backend("sqlite", path=str(file))


@pytest.fixture
def store_class():
    return TableStore


def rows(file):
    with closing(sqlite3.connect(file, timeout=30.0)) as table:
        return table.execute("SELECT namespace, length FROM entries ORDER BY rowid").fetchall()


# -- what is left in the table ----------------------------------------------------------


def test_nothing_is_left_of_what_was_read_in_part(store, file):
    with pair(store) as (p, d):
        p.put()
        # Two are written at a time, whichever is the first.
        assert sorted(rows(file)) == [("kvconnect chunks", at) for at in (0, 5000, 10000)] + [("kvconnect entries", 0)]
        claim = d.claim()
        d.reads(claim, ((3,),), ((10,),)).wait(8)  # our own cache has the rest
        assert 0 < len(rows(file)) < 3
        d.end.settle("r")
        eventually(lambda: not rows(file))


def test_nothing_is_left_of_an_entry_that_was_replaced(store, file):
    with pair(store) as (p, d):
        p.put(1, ((1, 2, 3),))
        p.put(1, ((4, 5, 6),))
        claim = d.claim()
        d.reads(claim).wait(8)
        assert d.stream(0, ((10, 11, 12),)).equal(p.stream(0, ((4, 5, 6),)))
        d.end.settle("r")
        eventually(lambda: not rows(file))


def test_a_table_that_fails_in_the_middle_of_a_prompt_keeps_nothing_but_what_was_just_being_written(
    store, sqlite, file, monkeypatch
):
    real, left = sqlite.insert, iter(range(4))

    def insert(self, key, kv):
        if next(left, None) is None:
            raise ZeroDivisionError("a third party's mistake")
        real(self, key, kv)

    layouts = [separate_layers(layers=3, blocks=32, heads=2, piece_bytes=700, groups=1)] * 2
    with pair(store, layouts=layouts) as (p, d):
        monkeypatch.setattr(sqlite, "insert", insert)
        assert not p.put(1, (tuple(range(1, 20)),))
        assert p.count("not_stored_store_failed") == 1
        eventually(lambda: len(rows(file)) <= ABREAST)
        monkeypatch.setattr(sqlite, "insert", real)
        assert p.put(2)
        assert isinstance(d.find(2), Claim)


def test_chunks_whose_manifest_the_table_does_not_take_are_taken_out(store, sqlite, file, monkeypatch):
    real = sqlite.insert

    def insert(self, key, kv):
        if key.namespace == "kvconnect entries":
            raise OSError("database is locked")
        real(self, key, kv)

    with pair(store) as (p, _):
        monkeypatch.setattr(sqlite, "insert", insert)
        assert not p.put()
        assert p.count("not_stored_store_failed") == 1
        assert rows(file) == []


def test_what_this_engine_has_stored_goes_in_time_although_a_table_cannot_be_listed(store, file):
    store = dataclasses.replace(store, options={**store.options, "max_age_s": 0.3})
    p = StoreEngine(store, consumes=False, lease_s=0.3)
    p.put()
    assert rows(file)
    eventually(lambda: not rows(file))
    p.close()


# -- one reader ---------------------------------------------------------------------------


def test_a_second_request_of_an_engine_computes_while_the_first_reads(store):
    with pair(store) as (p, d):
        p.put()
        claim = d.claim(request="0_r")
        assert is_miss(d.find(request="1_r"), "taken")
        d.end.abandon("1_r")
        d.reads(claim).wait(8)
        assert d.stream(0, ((10, 11, 12),)).equal(p.stream(0, ((1, 2, 3),)))


def test_a_chunk_that_is_gone_is_a_failed_load(store, file):
    with pair(store) as (p, d):
        p.put()
        claim = d.claim()
        with closing(sqlite3.connect(file, timeout=30.0)) as table, table:
            table.execute("DELETE FROM entries WHERE length = 5000")
        with pytest.raises(LoadError, match="byte 5000 of the entry's part 0 is gone"):
            d.reads(claim).wait(8)
        d.end.settle("r")
        eventually(lambda: not rows(file))


# -- authors' mistakes --------------------------------------------------------------------

JUNK = [
    7,
    "rows",
    [],
    [b"bytes", b"more"],
    [torch.zeros(5000), torch.zeros(5000)],
    [torch.zeros((1, 5000), dtype=torch.uint8)],
    [torch.zeros(3, dtype=torch.uint8)],
    [torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)],
]


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_junk_is_a_miss_and_a_failed_load(store, sqlite, monkeypatch, junk):
    with pair(store) as (p, d):
        p.put()
        p.put(2)
        claim = d.claim()
        monkeypatch.setattr(sqlite, "drop_select", lambda *_: junk)
        before = d.stream(0, ((10, 11, 12),))
        with pytest.raises((BrokenError, LoadError), match="buffer"):
            d.reads(claim).wait(8)
        assert d.stream(0, ((10, 11, 12),)).equal(before)
        assert d.find(2, "other").cause in {"unreachable", "damaged"}


def test_what_a_buffer_raises_is_a_miss_a_failed_load_and_a_prompt_that_is_not_stored(store, sqlite, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a third party's mistake")

    with pair(store) as (p, d):
        p.put()
        claim = d.claim()
        for method in ("insert", "drop_select", "close"):
            monkeypatch.setattr(sqlite, method, fail)
        with pytest.raises(BrokenError, match="drop_select of the buffer failed: ZeroDivisionError: a third") as told:
            d.reads(claim).wait(8)
        assert isinstance(told.value.__cause__, ZeroDivisionError)
        assert is_miss(d.find(2, "other"), "unreachable")
        assert not p.put(3)
        d.end.settle("r")


# -- the store by itself ------------------------------------------------------------------

NAME, DRAFT, OTHER = "0" * 32, "ab" * 16, "cd" * 16


@pytest.fixture
def table(sqlite, file):
    found = TableStore(sqlite(str(file)), StoreOptions(chunk_bytes=4), num_parts=1)
    yield found
    found.close()


def manifest():
    return Manifest(key(1), ((1,),), 4, (Part(8, "s", sum_of(b"abcd") + sum_of(b"efgh")),), 1.5).pack()


def write(table, draft):
    for offset, data in ((0, b"abcd"), (4, b"efgh")):
        table.put(draft, 0, offset, memoryview(bytearray(data)))


def test_what_is_offered_already_stays_if_it_is_not_to_be_replaced(table, file):
    for draft, said in ((DRAFT, True), (OTHER, False)):
        write(table, draft)
        assert table.publish(draft, NAME, manifest(), nbytes=0, replace=False) is said
    assert table.find(NAME).place == DRAFT
    assert len(rows(file)) == 3, "the other draft is left"


def test_an_entry_that_is_given_back_makes_way_for_a_newer_one(table, file):
    write(table, DRAFT)
    table.publish(DRAFT, NAME, manifest(), nbytes=0, replace=True)
    assert table.take(NAME, "g", 1.0)
    assert table.renew(NAME, "g", 1.0)
    write(table, OTHER)
    table.publish(OTHER, NAME, manifest(), nbytes=0, replace=True)
    table.give_back(NAME, "g")
    table.give_back(NAME, "g")
    assert not table.renew(NAME, "g", 1.0)
    assert table.find(NAME).place == OTHER
    assert len(rows(file)) == 3


def test_a_damaged_manifest_can_be_dropped(table, file):
    table.publish(DRAFT, NAME, manifest(), nbytes=0, replace=True)
    with closing(sqlite3.connect(file, timeout=30.0)) as rows_, rows_:
        rows_.execute("UPDATE entries SET stream = CAST(substr(stream, 1, length(stream) - 1) || x'00' AS BLOB)")
    assert table.drop(NAME)
    assert not table.drop(NAME)
    assert not rows(file)


# -- how it is opened ---------------------------------------------------------------------


class Picky(LookupBuffer):
    """Its constructor takes more than a path, one name of which is the store's, too."""

    traits = BufferTraits(shared=True)
    made: dict = {}  # noqa: RUF012 - of the last one

    def __init__(self, path, /, *, capacity_bytes=5, **rest):
        raise NotImplementedError

    insert = drop_select = close = None


class TakesAnything(Picky):
    def __init__(self, *, capacity_bytes=5, **rest):
        Picky.made = {"capacity_bytes": capacity_bytes, **rest}


class Borrows(TakesAnything):
    borrows = True


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (MemoryBuffer, {}, r"buffer 'mine' cannot serve an engine.*MemoryBuffer must declare it.*shared=True"),
        (Borrows, {}, "cannot serve an engine"),
        ("sqlite", {}, r"buffer\.path is missing: SqliteBuffer needs it"),
        ("sqlite", {"path": "x", "pahts": "y"}, r"buffer\.pahts is not a known option; did you mean 'path'"),
        ("sqlite", {"path": "x", "zzz": 1}, r"known keys: capacity_bytes, .*, mode, path"),
        ("sqlite", {"path": 5}, "buffer 'mine' cannot be opened with path: TypeError"),
        ("sqlite", {"path": "/nowhere/at/all"}, "cannot be opened with path: OperationalError: unable to open"),
        ("sqlite", {"path": "x", "mode": "share"}, r"buffer\.mode is 'share', but buffer 'mine' hands .* once: remove"),
        ("sqlite", {"path": "x", "chunk_bytes": "big"}, r"buffer\.chunk_bytes must be a whole number"),
        (Picky, {}, "cannot be opened with no options: TypeError"),
    ],
)
def test_what_an_engine_cannot_use_is_said_at_its_start(cls, options, said, sqlite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "buffer", lambda _: sqlite if cls == "sqlite" else cls)
    with pytest.raises(ConfigError, match=said):
        StoreEngine(Backend("mine", options))


def test_a_constructors_own_arguments_come_before_the_stores(monkeypatch):
    monkeypatch.setattr(TakesAnything, "__abstractmethods__", frozenset())
    monkeypatch.setattr(TakesAnything, "close", lambda _: None)
    monkeypatch.setattr(registry, "buffer", lambda _: TakesAnything)
    engine = StoreEngine(Backend("mine", {"capacity_bytes": 7, "chunk_bytes": 4096, "host": "h"}))
    assert Picky.made == {"capacity_bytes": 7, "host": "h"}
    assert engine.end._occupancy._options == StoreOptions(chunk_bytes=4096)
    engine.close()


def test_capacity_is_of_what_was_stored_here_taken_or_not(store, file):
    two = 2 * LAYOUT.nbytes([(1, 2, 3)])
    store = dataclasses.replace(store, options={**store.options, "capacity_bytes": two})
    with pair(store) as (p, d):
        p.put(1)
        p.put(2)
        d.reads(d.claim(1)).wait(8)
        d.end.settle("r")
        assert p.put(3)
        assert isinstance(d.find(2, "two"), Claim), "the one that was taken made room"
        assert rows(file)
