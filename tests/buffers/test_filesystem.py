"""A directory as a lookup buffer: its laws, what crashes leave, and what damage does."""

import itertools
import logging
import os
import stat
import threading
import time

import pytest

from kvconnect.buffers.filesystem import FilesystemBuffer, FilesystemOptions, FilesystemStore
from kvconnect.buffers.store_manifest import name_of
from kvconnect.errors import BrokenError, BufferFullError, ConfigError, IntegrityError, LoadError
from kvconnect.testing.buffer_laws import LAWS, ROOM_BYTES, Ends, key, tensor
from kvconnect.testing.buffer_tests import BufferTests
from tests.buffers.stores import SPAWN

CHUNK = 1 << 16


def table(path, policy="wait", ttl_s=600.0, wait_s=20.0, **options):
    options = {"capacity_bytes": ROOM_BYTES, "chunk_bytes": CHUNK, "max_age_s": ttl_s, **options}
    return FilesystemBuffer(FilesystemOptions(path=str(path), **options), policy, wait_s)


class TestOneTable(BufferTests):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path):
        self.path, self.count = tmp_path, itertools.count()

    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = table(self.path / str(next(self.count)), policy, ttl_s, wait_s)
        return Ends(buffer, buffer)

    def shared_options(self):
        return {"options": FilesystemOptions(path=str(self.path / "shared"))}


class TestTwoTablesOfOneDirectory(TestOneTable):
    test_shared_law = None  # the same again

    def open_ends(self, *, policy, ttl_s, wait_s):
        path = self.path / str(next(self.count))
        return Ends(table(path, policy, ttl_s, wait_s), table(path, policy, ttl_s, wait_s))

    @pytest.mark.parametrize(
        "law", [law for law in LAWS if law.__name__ != "an_entry_that_is_gone_is_reported_never_halved"]
    )
    def test_law(self, open_, law):
        law(open_)

    def test_an_entry_outlives_the_table_that_wrote_it(self, open_):
        ends = open_()
        ends.put.insert(key(1), [tensor(1)])
        ends.put.close()
        (taken,) = ends.take.drop_select(key(1))
        assert taken.equal(tensor(1))


@pytest.fixture
def open_table(tmp_path):
    tables = []

    def make(**options):
        tables.append(table(tmp_path / "kv", **options))
        return tables[-1]

    yield make
    for each in tables:
        each.close()


def only(path, pattern):
    (found,) = path.glob(pattern)
    return found


# -- crashes ----------------------------------------------------------------------------


def write_and_die(path, published):
    """Write entries until killed; say when the first is there."""
    buffer = table(path)
    for number in itertools.count():
        buffer.insert(key(number % 3), [tensor(number, 200_000)])
        published.set()


def test_a_writer_that_is_killed_leaves_whole_entries_or_none(tmp_path, open_table):
    published = SPAWN.Event()
    writer = SPAWN.Process(target=write_and_die, args=(tmp_path / "kv", published), daemon=True)
    writer.start()
    assert published.wait(60)
    threading.Event().wait(0.05)
    writer.kill()
    writer.join(10)
    buffer = open_table()
    for number in range(3):
        taken = buffer.drop_select(key(number))
        if taken is not None:
            assert len(set(taken[0].tolist())) == 1, "an entry of two writes"
    assert not [place for place in buffer._store._places() if not place.startswith(("draft.", "gone."))]
    buffer.insert(key(9), [tensor(9)])
    old = time.time() - 1000
    for place in buffer._store._places():
        os.utime(tmp_path / "kv" / place, (old, old))
    buffer._store.mend()
    assert buffer._store._places() == [name_of(key(9))], "what the dead left is swept, and nothing else"


def test_a_draft_that_has_lost_a_part_is_not_published(open_table):
    store = open_table()._store
    for part in (0, 1):
        store.put("aa", part, 0, memoryview(b"half"))
        if part == 0:
            store.discard("aa")
    with pytest.raises(BrokenError, match="deleted while it was written"):
        store.publish("aa", "bb", b"manifest", nbytes=8, replace=True)
    assert store.find("bb") is None


def test_what_a_dead_taker_had_is_offered_again(open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1)])
    name = name_of(key(1))
    assert buffer._store.take(name, "aa", 60.0)
    buffer._store.mend()
    assert buffer.drop_select(key(1)) is None
    assert buffer._store.renew(name, "aa", -1.0)
    buffer._store.mend()
    assert not buffer._store.renew(name, "aa", 60.0)
    assert buffer.drop_select(key(1)) is not None


def test_an_entry_given_back_gives_way_to_the_one_that_came_meanwhile(open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1)])
    grant = buffer.claim(key(1), "a")
    buffer.insert(key(1), [tensor(2)])
    grant.abandon()
    (taken,) = buffer.drop_select(key(1))
    assert taken.equal(tensor(2))
    assert buffer._store._places() == []


# -- damage -----------------------------------------------------------------------------


def test_a_truncated_part_is_an_error_and_the_entry_stays_for_a_closer_look(tmp_path, open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1, 200_000)])
    os.truncate(only(tmp_path, "kv/*/0"), 100_000)
    with pytest.raises(LoadError, match="cut off"):
        buffer.drop_select(key(1))


def test_a_flipped_byte_is_an_integrity_error(tmp_path, open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1, 200_000)])
    part = only(tmp_path, "kv/*/0")
    data = bytearray(part.read_bytes())
    data[123_456] ^= 16
    part.write_bytes(data)
    with pytest.raises(IntegrityError):
        buffer.drop_select(key(1))


def test_a_manifest_without_its_part_is_an_entry_that_is_gone(tmp_path, open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1)])
    only(tmp_path, "kv/*/0").unlink()
    with pytest.raises(LoadError, match="gone"):
        buffer.drop_select(key(1))


def test_what_is_dropped_while_it_is_read_fails_and_is_never_mixed(open_table):
    buffer = open_table(mode="share", capacity_bytes=64 << 20)
    buffer.insert(key(1), [tensor(1, 4 << 20)])
    grant = buffer.claim(key(1), "a")
    buffer.insert(key(1), [tensor(2, 4 << 20)])  # another under its name
    with pytest.raises((LoadError, IntegrityError)):
        grant.tensors()


def test_files_that_are_not_ours_are_left_alone(tmp_path, open_table):
    buffer = open_table()
    (tmp_path / "kv" / "README").write_text("mine")
    buffer.insert(key(1), [tensor(1)])
    buffer._store.mend()
    assert len(buffer._store.entries()) == 1
    assert (tmp_path / "kv" / "README").read_text() == "mine"


# -- access -----------------------------------------------------------------------------


def test_only_the_owner_may_look_in(tmp_path, open_table):
    open_table().insert(key(1), [tensor(1)])
    root = tmp_path / "kv"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_links_are_not_followed(tmp_path, open_table):
    buffer = open_table()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest").write_bytes(b"secret")
    (tmp_path / "kv" / name_of(key(1))).symlink_to(outside)
    assert buffer.drop_select(key(1)) is None
    buffer.insert(key(2), [tensor(2)])
    part = only(tmp_path, f"kv/{name_of(key(2))}/0")
    part.unlink()
    part.symlink_to(outside / "manifest")
    with pytest.raises(LoadError):
        buffer.drop_select(key(2))
    assert (outside / "manifest").read_bytes() == b"secret"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_a_files_place_is_not_waited_for(tmp_path, open_table, make):
    buffer = open_table()
    for number, file in ((1, "manifest"), (2, "0")):
        buffer.insert(key(number), [tensor(number)])
        planted = only(tmp_path, f"kv/{name_of(key(number))}/{file}")
        planted.unlink()
        make(planted)
    assert buffer.drop_select(key(1)) is None
    with pytest.raises(LoadError, match="gone"):
        buffer.drop_select(key(2))
    draft = tmp_path / "kv" / "draft.ab"
    draft.mkdir()
    make(draft / "0")
    with pytest.raises(BrokenError):
        buffer._store.put("ab", 0, 0, memoryview(b"x"))


@pytest.mark.parametrize(("mode", "warned"), [(0o700, 0), (0o755, 0), (0o770, 1), (0o777, 1)])
def test_a_directory_that_others_may_write_to_is_warned_of(tmp_path, caplog, mode, warned):
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(mode)
    with caplog.at_level(logging.WARNING, "kvconnect"):
        FilesystemStore(str(tmp_path / "kv")).close()
    assert len(caplog.records) == warned
    assert all("chmod 700" in record.getMessage() for record in caplog.records)


def test_a_path_is_needed_and_must_be_a_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"buffer\.path is missing"):
        FilesystemOptions()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"buffer\.path .*file' cannot be used"):
        FilesystemStore(str(tmp_path / "file"))


def test_a_full_disk_is_a_full_buffer(open_table, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    buffer = open_table()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BufferFullError, match="No space left"):
        buffer.insert(key(1), [tensor(1)])
