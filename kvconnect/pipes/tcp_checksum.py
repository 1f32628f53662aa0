"""Sums of what a TCP pipe carries: 64 bits of XXH3, which find damage but stop no forger.

Whatever has a payload carries a *seal* after its header: ``u64`` sum of header and
payload sum, ``u64`` payload sum, little-endian. So a damaged header is found before
any of its numbers is used, and a damaged payload where it has landed.
"""

from __future__ import annotations

import struct
from typing import Final

import xxhash

from kvconnect.errors import IntegrityError
from kvconnect.paging import IoVec
from kvconnect.sums import Bytes
from kvconnect.sums import view as view  # noqa: PLC0414 - what tensors are summed up by

_SUM: Final = struct.Struct("<Q")
SUM_BYTES: Final = _SUM.size
SEAL_BYTES: Final = 2 * SUM_BYTES


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
