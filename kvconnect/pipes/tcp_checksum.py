"""Sums of what a TCP pipe carries: 64 bits of XXH3, which find damage but stop no forger.

Whatever has a payload carries a *seal* after its header: ``u64`` sum of header and
payload sum, ``u64`` payload sum, little-endian. So a damaged header is found before
any of its numbers is used, and a damaged payload where it has landed.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Final

import xxhash

from kvconnect.errors import IntegrityError
from kvconnect.paging import IoVec

_SUM: Final = struct.Struct("<Q")
SUM_BYTES: Final = _SUM.size
SEAL_BYTES: Final = 2 * SUM_BYTES

_PyBUF_READ: Final = 0x100
_memoryview = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview.restype = ctypes.py_object
_memoryview.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)

Bytes = bytes | bytearray | memoryview


def view(address: int, nbytes: int) -> Bytes:
    """Return memory to read; whoever asks keeps it alive. Much cheaper than an array type for each size."""
    if not nbytes:
        return b""
    found: memoryview = _memoryview(address, nbytes, _PyBUF_READ)
    return found


def of(*parts: Bytes) -> int:
    """Return the sum of ``parts``, one after another. Large parts are summed up without the GIL."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def of_pieces(iov: IoVec) -> int:
    """Return the sum of the stream ``iov``."""
    return of(*[view(address, nbytes) for address, nbytes in iov.tolist()])


def pack(payload_sum: int) -> bytes:
    """Return a sum as it travels."""
    return _SUM.pack(payload_sum)


def unpack(data: Bytes) -> int:
    """Reverse of `pack`."""
    found: int = _SUM.unpack(data)[0]
    return found


def seal(header: bytes, payload_sum: int) -> bytes:
    """Return what follows ``header``."""
    tail = _SUM.pack(payload_sum)
    return _SUM.pack(of(header + tail)) + tail


def check_seal(header: bytes, sealed: bytes) -> int:
    """Return the payload's sum.

    Raises:
        IntegrityError: header or seal are damaged, so nobody knows where the next one is.

    """
    if of(header + sealed[SUM_BYTES:]) != unpack(sealed[:SUM_BYTES]):
        raise IntegrityError("a header arrived damaged")
    return unpack(sealed[SUM_BYTES:])
