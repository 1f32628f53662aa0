"""Rows of a results file, and the goals they are held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvconnect.bench import timing
from kvconnect.bench.timing import CASE, Race

MIB = 1 << 20
#: Goals for sizes from here on.
LARGE_BYTES = 16 * MIB
#: Smallest ratio to a reference, by pipe.
LARGE_GOALS = {("shm", "memcpy"): 0.75, ("tcp", "socket"): 0.9}
#: Smallest ratio of the block path to NIXL's agents as vLLM makes them, either direction.
BLOCK_GOAL = 2.0
BLOCK_GOAL_PIPES = ("shm", "tcp")
BLOCK_GOAL_REFERENCES = ("nixl-read", "nixl-write")
#: Largest median of half a ping-pong, in µs.
PING_PONG_GOALS = {"shm": 30.0, "tcp": 80.0}


@dataclass(frozen=True)
class Row:
    """One case of one backend, against at most one reference.

    ``ratio`` is how many times faster than the reference it was. ``goal`` is the
    smallest ``ratio``, or, in a row without a reference, the largest ``p50_us``.
    """

    case: str
    backend: str
    bytes: int
    piece_bytes: int
    gb_per_s: float
    p50_us: float
    p99_us: float
    reference: str | None = None
    ratio: float | None = None
    goal: float | None = None
    met: bool | None = None


@dataclass(frozen=True)
class Case:
    """What was moved: a name, its bytes, the bytes of each piece, and whether it is the block path."""

    name: str
    nbytes: int
    piece_bytes: int
    is_blocks: bool = False


def goal(case: Case, backend: str, reference: str) -> float | None:
    """Return the smallest ratio that is asked of ``backend`` against ``reference``."""
    if case.nbytes < LARGE_BYTES:
        return None
    if case.is_blocks and backend in BLOCK_GOAL_PIPES and reference in BLOCK_GOAL_REFERENCES:
        return BLOCK_GOAL
    return LARGE_GOALS.get((backend, reference))


def of_race(case: Case, backend: str, race: Race) -> list[Row]:
    """Return the backend's rows, one for each reference, and a row for each reference itself."""
    own = race.samples[CASE]
    rows = []
    for name, samples in race.samples.items():
        if name != CASE:
            ratio = timing.ratio(own, samples)
            rows.append(_row(case, backend, own, against=(name, ratio), goal=goal(case, backend, name)))
            rows.append(_row(case, name, samples))
    return rows


def of_ping_pong(case: Case, backend: str, halves: dict[str, list[float]], race: Race) -> list[Row]:
    """Return rows of half a ping-pong: first against the goal in µs, then against each reference."""
    own = halves[CASE]
    rows = [_row(case, backend, own, goal=PING_PONG_GOALS.get(backend))]
    for name, samples in race.samples.items():
        if name != CASE:
            rows.append(_row(case, backend, own, against=(name, timing.ratio(race.samples[CASE], samples))))
            rows.append(_row(case, name, halves[name]))
    return rows


def _row(
    case: Case,
    backend: str,
    samples: list[float],
    *,
    against: tuple[str, float] | None = None,
    goal: float | None = None,
) -> Row:
    reference, ratio = against or (None, None)
    p50 = _percentile(samples, 50)
    met = None
    if goal is not None:
        met = p50 <= goal if ratio is None else ratio >= goal
    return Row(
        case=case.name,
        backend=backend,
        bytes=case.nbytes,
        piece_bytes=case.piece_bytes,
        gb_per_s=round(case.nbytes / float(np.median(samples)) / 1e9, 3),
        p50_us=p50,
        p99_us=_percentile(samples, 99),
        reference=reference,
        ratio=None if ratio is None else round(ratio, 3),
        goal=goal,
        met=met,
    )


def _percentile(samples: list[float], q: float) -> float:
    return round(float(np.percentile(samples, q)) * 1e6, 1)


def unique(rows: list[Row]) -> list[Row]:
    """Keep the first row of a reference, which every pipe's run of a case measured anew."""
    seen: dict[tuple[str, str, str | None], Row] = {}
    for row in rows:
        seen.setdefault((row.case, row.backend, row.reference), row)
    return list(seen.values())
