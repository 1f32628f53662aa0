"""`kvconnect.pipes.ring`: memory without a name, of a size that nobody can change."""

import ctypes
import os
from pathlib import Path

import pytest

from kvconnect.errors import BrokenError
from kvconnect.pipes import ring
from kvconnect.testing.leaks import Holdings, assert_nothing_left


def _maps() -> int:
    return Path("/proc/self/maps").read_text().count("kvconnect-ring")


def test_what_one_end_writes_the_other_reads_in_the_same_slot():
    writer, fd = ring.create(1 << 20)
    reader = ring.adopt(fd)
    os.close(fd)
    assert writer.slot_bytes == reader.slot_bytes == (1 << 20) // ring.SLOTS
    for number in range(ring.SLOTS):
        ctypes.memset(writer.slot(number), number + 1, writer.slot_bytes)
    for number in range(ring.SLOTS):
        seen = ctypes.string_at(reader.slot(number + ring.SLOTS), reader.slot_bytes)
        assert seen == bytes([number + 1]) * reader.slot_bytes
    writer.close()
    reader.close()


def test_a_ring_can_neither_shrink_nor_grow():
    made, fd = ring.create(1 << 20)
    for size in (4096, 2 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    made.close()
    os.close(fd)


def test_the_size_is_rounded_up_to_whole_pages_a_slot():
    made, fd = ring.create(70_001)
    assert made.slot_bytes % 4096 == 0
    assert made.slot_bytes * ring.SLOTS >= 70_001
    made.close()
    os.close(fd)


@pytest.mark.parametrize("size", [0, 4096 * ring.SLOTS + 1, ring.MAX_RING_BYTES + 4096 * ring.SLOTS])
def test_a_ring_of_an_impossible_size_is_not_mapped(size):
    fd = os.memfd_create("kvconnect-ring", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    ring.fcntl.fcntl(fd, ring.fcntl.F_ADD_SEALS, ring.fcntl.F_SEAL_SHRINK)
    before = _maps()
    with pytest.raises(BrokenError, match="not usable"):
        ring.adopt(fd)
    assert _maps() == before
    os.close(fd)


def test_memory_that_its_owner_could_shrink_is_not_mapped():
    fd = os.memfd_create("kvconnect-ring", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096 * ring.SLOTS)
    with pytest.raises(BrokenError, match="sealed: False"):
        ring.adopt(fd)
    os.close(fd)


def test_what_is_no_memfd_is_not_mapped(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096 * ring.SLOTS))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    with pytest.raises(BrokenError):
        ring.adopt(fd)
    os.close(fd)


def test_a_closed_ring_leaves_no_file_and_no_mapping():
    before, maps = Holdings.now(), _maps()
    made, fd = ring.create(1 << 20)
    other = ring.adopt(fd)
    os.close(fd)
    assert _maps() == maps + 2
    made.close()
    other.close()
    assert _maps() == maps
    assert_nothing_left(before)
