"""Tickets: what a producer returns in ``kv_transfer_params`` and a consumer reads back.

Strings and whole numbers only, since routers pass tickets through JSON, and
compact, since they do so once per request.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconnect.buffers import fields
from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.ledger import Blocks
from kvconnect.errors import HandshakeError

VERSION = 1
_MAX_GROUPS = 256
_MAX_BLOCKS = 1 << 20
_MAX_BYTES = 6  # of one varint: block numbers have up to 40 bits


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where an entry lies and which it is.

    Args:
        at: control address of the owner's scheduler, as peers reach it.
        engine: the owner's engine id.
        incarnation: changes whenever the owner restarts.
        entry: unguessable name of the entry.
        generation: of the entry, within the owner.
        key: what the KV is.
        blocks: the owner's block ids, per group.

    """

    at: str
    engine: str
    incarnation: str
    entry: str
    generation: int
    key: LookupKey
    blocks: Blocks

    def to_wire(self) -> dict[str, Any]:
        """Return the ticket as plain data for JSON."""
        return {
            "v": VERSION,
            "at": self.at,
            "engine": self.engine,
            "incarnation": self.incarnation,
            "entry": self.entry,
            "generation": self.generation,
            **fields.write_key(self.key),
            "blocks": [pack_ids(ids) for ids in self.blocks],
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Ticket:
        """Read a ticket that came through a router; unknown keys are ignored, and numbers may have become fractions.

        Raises:
            HandshakeError: a field is missing or malformed; names it.

        """
        # A router that keeps tickets in a Struct of protobuf's has no other numbers.
        data = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in data.items()}
        version = fields.number(data, "v", 1 << 16)
        if version != VERSION:
            raise HandshakeError(f"ticket field 'v': ours {VERSION}, theirs {version}; upgrade the older kvconnect")
        blocks = data.get("blocks")
        if not isinstance(blocks, (list, tuple)) or len(blocks) > _MAX_GROUPS:
            raise HandshakeError("ticket field 'blocks' must be a list of strings, one per group")
        return cls(
            at=fields.text(data, "at"),
            engine=fields.text(data, "engine"),
            incarnation=fields.text(data, "incarnation"),
            entry=fields.text(data, "entry"),
            generation=fields.number(data, "generation", 1 << 62),
            key=fields.read_key(data),
            blocks=tuple(unpack_ids(ids) for ids in blocks),
        )


def pack_ids(ids: tuple[int, ...]) -> str:
    """Write block ids as base64 of the zigzag varints of their differences.

    Ids mostly follow each other, so that a block costs about one byte.
    """
    out = bytearray()
    before = 0
    for number in ids:
        step = number - before
        before = number
        value = (step << 1) ^ (step >> 63)
        while value > 0x7F:
            out.append(0x80 | (value & 0x7F))
            value >>= 7
        out.append(value)
    return base64.b64encode(out).decode("ascii")


def unpack_ids(text: Any) -> tuple[int, ...]:
    """Read `pack_ids`'s string; raise `HandshakeError` on anything malformed or negative."""
    if not isinstance(text, str):
        raise HandshakeError("ticket field 'blocks' must hold strings")
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError) as error:
        raise HandshakeError(f"ticket field 'blocks' is not base64: {error}") from error
    raw = np.frombuffer(data, dtype=np.uint8)
    if len(raw) == 0:
        return ()
    if len(raw) > _MAX_BYTES * _MAX_BLOCKS or raw[-1] & 0x80:
        raise HandshakeError("ticket field 'blocks' is cut off or too long")
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if len(ends) > _MAX_BLOCKS or lengths.max() > _MAX_BYTES:
        raise HandshakeError("ticket field 'blocks' holds too many blocks or a number that is too big")
    place = np.arange(len(raw)) - np.repeat(starts, lengths)
    values = np.add.reduceat((raw & 0x7F).astype(np.int64) << (7 * place), starts)
    ids = np.cumsum((values >> 1) ^ -(values & 1))
    if ids.min() < 0 or ids.max() >= 1 << 40:
        raise HandshakeError("ticket field 'blocks' holds a block number that is out of range")
    return tuple(ids.tolist())
