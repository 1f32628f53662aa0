"""A directory as a lookup buffer: its laws, what crashes leave, and what damage does."""

import itertools

import pytest

from kvconnect.buffers.filesystem import FilesystemBuffer, FilesystemOptions
from kvconnect.testing.buffer_laws import LAWS, ROOM_BYTES, Ends, key, tensor
from kvconnect.testing.buffer_tests import BufferTests

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


class TestTwoTablesOfOneDirectory(TestOneTable):
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
