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

from kvconnect.buffers import fields
from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.ledger import Blocks
from kvconnect.errors import HandshakeError

VERSION = 1
_MAX_GROUPS = 256
_MAX_BLOCKS = 1 << 20


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
        """Read a ticket that came through a router; unknown keys are ignored.

        Raises:
            HandshakeError: a field is missing or malformed; names it.

        """
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
    if len(data) > 5 * _MAX_BLOCKS or (data and data[-1] & 0x80):
        raise HandshakeError("ticket field 'blocks' is cut off or too long")
    ids: list[int] = []
    value = shift = before = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte & 0x80:
            if shift > 63:
                raise HandshakeError("ticket field 'blocks' holds a number that is too big")
            continue
        before += (value >> 1) ^ -(value & 1)
        if not 0 <= before < 1 << 40:
            raise HandshakeError(f"ticket field 'blocks' holds block {before}")
        ids.append(before)
        value = shift = 0
    if len(ids) > _MAX_BLOCKS:
        raise HandshakeError(f"ticket field 'blocks' holds {len(ids)} blocks")
    return tuple(ids)
