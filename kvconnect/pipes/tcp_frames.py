"""Frames of the TCP pipe's block connection, and block ids as bytes.

::

    magic u16 | kind u8 | side u8 | transfer u32 | offset u64 | nbytes u64 | nbytes of payload

With checksums the seal of `kvconnect.pipes.tcp_checksum` stands before the payload.
``transfer`` is a number that the end which started the transfer gave it; ``side``
is 0 if that end reads, 1 if it writes. Numbers are little-endian. Payloads:
block ids of a `Kind.READ` or `Kind.WRITE`, bytes of the canonical stream from
``offset`` on of a `Kind.DATA`, text of a `Kind.ERROR`; nothing else has one.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np

from kvconnect.errors import BrokenError
from kvconnect.paging import BlockIds, PagedLayout
from kvconnect.pipes.wire import Kind

MAGIC: Final = 0x6B62  # "kb"
READS: Final = 0
WRITES: Final = 1
MAX_TEXT_BYTES: Final = 1024

_FRAME = struct.Struct("<HBBIQQ")
FRAME_BYTES: Final = _FRAME.size
_KINDS: Final = frozenset({Kind.READ, Kind.WRITE, Kind.DATA, Kind.CANCEL, Kind.ERROR, Kind.ACK})


class Frame(NamedTuple):
    """A checked frame header."""

    kind: Kind
    side: int
    transfer: int
    offset: int
    nbytes: int


def pack(kind: Kind, side: int, transfer: int, offset: int = 0, payload: bytes = b"") -> bytes:
    """Return a frame whose payload is at hand."""
    return _FRAME.pack(MAGIC, kind, side, transfer, offset, len(payload)) + payload


def pack_data(side: int, transfer: int, offset: int, nbytes: int) -> bytes:
    """Return the header of a `Kind.DATA` frame; the payload comes from elsewhere."""
    return _FRAME.pack(MAGIC, Kind.DATA, side, transfer, offset, nbytes)


def unpack(header: bytes | memoryview) -> Frame:
    """Check a header's form. What its numbers *mean* is for the connection to check.

    Raises:
        BrokenError: this is not the header of a frame.

    """
    magic, number, side, transfer, offset, nbytes = _FRAME.unpack(header)
    if magic != MAGIC or number not in _KINDS or side > WRITES:
        raise BrokenError("the peer sent something that is not a frame")
    return Frame(Kind(number), side, transfer, offset, nbytes)


def pack_ids(blocks: BlockIds) -> bytes:
    """Return block ids as bytes: the number of groups, then for each its number of ids and the ids."""
    parts = [struct.pack("<I", len(blocks))]
    for ids in blocks:
        parts += [struct.pack("<I", len(ids)), np.asarray(ids, dtype="<i4").tobytes()]
    return b"".join(parts)


def unpack_ids(data: bytes | bytearray) -> list[list[int]]:
    """Reverse of `pack_ids`.

    Raises:
        BrokenError: lengths do not add up.

    """
    blocks: list[list[int]] = []
    at = 4
    try:
        (groups,) = struct.unpack_from("<I", data)
        while len(blocks) < groups:
            (count,) = struct.unpack_from("<I", data, at)
            ids = np.frombuffer(data, dtype="<i4", count=count, offset=at + 4) if count else np.empty(0, np.int32)
            blocks.append(ids.tolist())
            at += 4 + 4 * count
    except (struct.error, ValueError) as error:
        raise BrokenError(f"the peer sent malformed block ids: {error}") from error
    if at != len(data):
        raise BrokenError("the peer sent block ids with bytes left over")
    return blocks


def max_ids_bytes(layout: PagedLayout) -> int:
    """Most bytes that ids of this memory's blocks take, each block once."""
    # A group without layers here has no bytes: nobody names its blocks.
    counts = zip(layout.num_blocks, layout.block_bytes, strict=True)
    return 4 + sum(4 + 4 * count * bool(size) for count, size in counts)
