"""What an examination says: findings and measured paths, as plain values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: ``note``: worth knowing, and harmless.
Verdict = Literal["ok", "note", "slow", "bad"]
_WORSE: tuple[Verdict, ...] = ("ok", "note", "slow", "bad")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what it is about, dotted: ``host.memlock``, ``peer.field.model``.
        verdict: ``ok``, ``note``, ``slow`` (it works, slower than it could) or ``bad`` (it does not work).
        what: what was found.
        cure: what to do about it; empty if there is nothing.

    """

    name: str
    verdict: Verdict
    what: str
    cure: str = ""


@dataclass(frozen=True)
class Path:
    """One pipe to the peer, measured over the real hand-over path.

    Args:
        pipe: its name.
        taken: whether engines configured alike would use it.
        gb_per_s: of a load of ``bytes`` bytes in scattered pieces, the median; GB = 1e9 bytes.
        p50_us, p99_us: of a load of one block.
        bytes, block_bytes, piece_bytes: of the loads, of one block, of each piece.
        ceiling: what the load was compared with in the same rounds, or ``""``.
        ceiling_gb_per_s: how fast that was.
        ratio: of ``gb_per_s`` to it: the median over rounds.

    """

    pipe: str
    taken: bool
    gb_per_s: float
    p50_us: float
    p99_us: float
    bytes: int
    block_bytes: int
    piece_bytes: int
    ceiling: str = ""
    ceiling_gb_per_s: float | None = None
    ratio: float | None = None


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict among ``findings``."""
    return max((finding.verdict for finding in findings), key=_WORSE.index, default="ok")
