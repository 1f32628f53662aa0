"""What engines tell each other first, and whether they fit.

Errors say *ours* and *theirs* from the asking engine's side, since it is the one
that reads them; the other side's log says the same from its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvconnect.buffers import fields
from kvconnect.buffers.base import EndSettings
from kvconnect.errors import HandshakeError

_MAX_LEASE_MS = 1 << 32
_MAX_PARTS = 1 << 12


@dataclass(frozen=True)
class Hello:
    """An engine's description of itself.

    Args:
        engine: vLLM's engine id.
        incarnation: chosen at random when the engine's buffer starts.
        fingerprint: what must agree, by name.
        num_parts: workers, each holding one part of every entry.
        role: ``"producer"``, ``"consumer"`` or ``"both"``.
        lease_s: how long claims last unless renewed.
        workers: `WorkerEnd.describe`'s answers, by rank.
        rank: of the worker whose hello it is, if it is one's: only its counterpart is described to it, and only
            their fingerprints are compared (vLLM gives workers and scheduler KV configurations that differ).

    """

    engine: str
    incarnation: str
    fingerprint: Mapping[str, str | int]
    num_parts: int
    role: str
    lease_s: float
    workers: tuple[Mapping[str, Any], ...] = ()
    rank: int | None = None

    @classmethod
    def of(cls, settings: EndSettings, incarnation: str, *, rank: int | None = None) -> Hello:
        """Describe the engine that has these settings, or its worker ``rank``."""
        role = "both" if settings.produces and settings.consumes else "producer" if settings.produces else "consumer"
        return cls(
            settings.engine_id,
            incarnation,
            dict(settings.fingerprint),
            settings.num_parts,
            role,
            settings.options.lease_s,
            rank=rank,
        )

    def to_wire(self) -> dict[str, Any]:
        """Plain data for msgpack."""
        return {
            "engine": self.engine,
            "incarnation": self.incarnation,
            "fingerprint": dict(self.fingerprint),
            "num_parts": self.num_parts,
            "role": self.role,
            "lease_ms": int(self.lease_s * 1000),
            "workers": [dict(worker) for worker in self.workers],
            "rank": self.rank,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Hello:
        """Read a peer's hello; raise `HandshakeError` naming the malformed field."""
        fingerprint = fields.mapping(data, "fingerprint")
        workers = data.get("workers", [])
        if not isinstance(workers, list) or not all(isinstance(worker, dict) for worker in workers):
            raise HandshakeError("field 'workers' must be a list of maps")
        return cls(
            fields.text(data, "engine"),
            fields.text(data, "incarnation"),
            fingerprint,
            fields.number(data, "num_parts", _MAX_PARTS, least=1),
            fields.text(data, "role"),
            fields.number(data, "lease_ms", _MAX_LEASE_MS, least=1) / 1000,
            tuple(workers),
            None if data.get("rank") is None else fields.number(data, "rank", _MAX_PARTS),
        )


def check_fit(ours: Hello, theirs: Hello) -> None:
    """Raise `HandshakeError` naming the first field that differs, ours and theirs."""
    if difference := misfit(ours, theirs):
        raise HandshakeError(difference)


def misfit(ours: Hello, theirs: Hello) -> str:
    """Name the first field of fingerprints, or else of shapes, that differs, ours and theirs; empty if all fit."""
    for name in [*ours.fingerprint, *(name for name in theirs.fingerprint if name not in ours.fingerprint)]:
        mine, other = ours.fingerprint.get(name, "(absent)"), theirs.fingerprint.get(name, "(absent)")
        if mine != other:
            return (
                f"{fields.shown(name)} differs: ours {mine!r:.200}, theirs {other!r:.200} (engine {theirs.engine}); "
                "start both engines alike"
            )
    if ours.num_parts != theirs.num_parts:
        return f"number of workers differs: ours {ours.num_parts}, theirs {theirs.num_parts} (engine {theirs.engine})"
    return ""
