"""A bounded ring of slots in anonymous shared memory, for peers that may not read each other.

The memory is a ``memfd``: it has no name, so nothing can be left behind. It
holds data only. Which slots are full is told over the socket that the two ends
share (`kvconnect.pipes.shm_messages`), so neither end trusts a counter that the
other can write, and no memory ordering needs to be reasoned about.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

import numpy as np

from kvconnect.errors import BrokenError

#: Number of slots: enough for both ends to copy at the same time and to absorb a late wake-up.
SLOTS: Final = 4
#: Largest ring that is mapped on a peer's word.
MAX_RING_BYTES: Final = 1 << 30

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Ring:
    """`SLOTS` slots of equal size, mapped into this process."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """Wrap a mapping; see `create` and `adopt`."""
        self.slot_bytes = len(mapping) // SLOTS
        self._mapping = mapping
        # Held only for the address: a read-only mapping has no other way to tell it.
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)

    def slot(self, number: int) -> int:
        """Return the address of slot ``number``, counted on and on."""
        return int(self._bytes.ctypes.data) + (number % SLOTS) * self.slot_bytes

    def close(self) -> None:
        """Unmap. Nobody may be copying."""
        del self._bytes
        self._mapping.close()


def create(nbytes: int) -> tuple[Ring, int]:
    """Make a ring of about ``nbytes``; return it and the memfd for the other end (the caller closes it).

    Raises:
        OSError: no memory, or no memfd.

    """
    page = mmap.PAGESIZE * SLOTS
    size = -(-nbytes // page) * page
    fd = os.memfd_create("kvconnect-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return Ring(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)), fd
    except BaseException:
        os.close(fd)
        raise


def adopt(fd: int) -> Ring:
    """Map the peer's ring, to read; the caller closes ``fd``.

    Raises:
        BrokenError: not a memfd that can neither shrink nor grow, or of an impossible size.

    """
    try:
        # A memfd that its owner can shrink would kill the reader with SIGBUS.
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        size = os.fstat(fd).st_size
        if not sealed or not 0 < size <= MAX_RING_BYTES or size % (mmap.PAGESIZE * SLOTS):
            raise BrokenError(f"the peer's ring is not usable: {size} bytes, sealed: {bool(sealed)}")
        return Ring(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
    except OSError as error:
        raise BrokenError(f"the peer's ring cannot be mapped: {error}") from error
