"""What an entry of a store says of itself: version, key, geometry and checksums.

The bytes are a mark with the version, the XXH3 of the rest, and msgpack. Whatever was
damaged, cut off or written by something else is an `IntegrityError`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import msgpack
import xxhash

from kvconnect import messages
from kvconnect.buffers import fields
from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.ledger import Blocks
from kvconnect.buffers.store import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES
from kvconnect.buffers.ticket import pack_ids, unpack_ids
from kvconnect.errors import BufferFullError, IntegrityError, KVConnectError
from kvconnect.paging import PagedLayout

#: The last byte is the format's version.
_MARK = b"kvconnect store\x02"
_SUM_BYTES = 8
_MAX_PARTS = 1 << 12
_MAX_BYTES = 1 << 48
_MAX_TOKENS = 1 << 40


def sum_of(data: bytes | memoryview) -> bytes:
    """Return the checksum of a chunk, 8 bytes."""
    return xxhash.xxh3_64_digest(data)


def name_of(key: LookupKey, start: int = 0) -> str:
    """Return the name that a key's entry has in a store, 32 hexadecimal digits; ``start`` is `Manifest.start`."""
    text = b"\0".join((key.namespace.encode(), key.digest, b"%d-%d" % (start, key.length)))
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def shape_of(layout: PagedLayout) -> str:
    """Return a digest of what must agree between who wrote a part and who reads it."""
    return hashlib.blake2b(json.dumps(layout.shape()).encode(), digest_size=8).hexdigest()


def number(blocks: Blocks) -> Blocks:
    """Number an entry's blocks from 1 in each group, in prompt order.

    Block 0 is vLLM's null block, of which nothing is kept: it stays 0.
    """
    numbered = []
    for ids in blocks:
        places = iter(range(1, len(ids) + 1))
        numbered.append(tuple(next(places) if block else 0 for block in ids))
    return tuple(numbered)


@dataclass(frozen=True)
class Part:
    """One worker's part of an entry: its length, `shape_of` its layout, and its chunks' sums, one after another."""

    nbytes: int
    shape: str
    sums: bytes

    def sum(self, chunk: int) -> bytes:
        """Return the checksum of a chunk."""
        return self.sums[chunk * _SUM_BYTES : (chunk + 1) * _SUM_BYTES]


@dataclass(frozen=True)
class Manifest:
    """An entry's own account of itself.

    Args:
        key: what the KV is.
        blocks: `number`'s, per group: where in the parts a block of the prompt lies.
        chunk_bytes: of all chunks but the last of each part.
        parts: by rank.
        made: when, of ``time.time``.
        start: the first token of ``key`` that is in this entry; those before are in others.

    """

    key: LookupKey
    blocks: Blocks
    chunk_bytes: int
    parts: tuple[Part, ...]
    made: float
    start: int = 0

    @property
    def name(self) -> str:
        """The entry's name in a store."""
        return name_of(self.key, self.start)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def pack(self) -> bytes:
        """Return the bytes to store; raise `BufferFullError` if nobody would read that many."""
        body: bytes = msgpack.packb(
            {
                **fields.write_key(self.key),
                "blocks": [pack_ids(ids) for ids in self.blocks],
                "chunk_bytes": self.chunk_bytes,
                "parts": [[part.nbytes, part.shape, part.sums] for part in self.parts],
                "made": self.made,
                "start": self.start,
            }
        )
        if len(body) > MAX_MANIFEST_BYTES - len(_MARK) - _SUM_BYTES:
            raise BufferFullError(f"a manifest of {len(body)} bytes is too long: chunk_bytes is too small")
        return _MARK + sum_of(body) + body

    @classmethod
    def unpack(cls, data: bytes) -> Manifest:
        """Read `pack`'s bytes.

        Raises:
            IntegrityError: they are damaged, too many, or of another version.

        """
        head, body = data[: len(_MARK)], data[len(_MARK) + _SUM_BYTES :]
        if head != _MARK:
            raise IntegrityError(f"not an entry of this version: it begins with {head!r}, not {_MARK!r}")
        if len(data) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"the entry's manifest is longer than {MAX_MANIFEST_BYTES} bytes")
        if data[len(_MARK) : len(_MARK) + _SUM_BYTES] != sum_of(body):
            raise IntegrityError("the entry's manifest is damaged")
        try:
            read = messages.decode(body)
            chunk_bytes = fields.number(read, "chunk_bytes", MAX_CHUNK_BYTES + 1, 1)
            return cls(
                fields.read_key(read),
                tuple(unpack_ids(ids) for ids in read["blocks"]),
                chunk_bytes,
                tuple(_part(item, chunk_bytes) for item in read["parts"][:_MAX_PARTS]),
                float(read["made"]),
                fields.number(read, "start", _MAX_TOKENS),
            )
        except (KVConnectError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(f"the entry's manifest is malformed: {error}") from error


def _part(item: list[object], chunk_bytes: int) -> Part:
    nbytes, shape, sums = item
    if type(nbytes) is not int or not 0 <= nbytes < _MAX_BYTES or not isinstance(sums, bytes):
        raise ValueError("a part's length or sums are out of range")
    if len(sums) != _SUM_BYTES * -(-nbytes // chunk_bytes):
        raise ValueError(f"{len(sums)} bytes of sums for a part of {nbytes} bytes")
    return Part(nbytes, str(shape), sums)
