"""Rows of the GPU results file, made from samples, and the goals they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Seconds of one contender: one list a round.
Samples = Sequence[Sequence[float]]
#: What a goal bounds: from below a ratio or a rate, from above a time or a size.
AT_LEAST = ("ratio", "gb_per_s")
AT_MOST = ("p50_us", "p99_us", "bytes")


@dataclass(frozen=True)
class Row:
    """One contender of one case, against at most one reference.

    ``ratio`` is how many times faster than the reference it was; ``limit`` names the
    column that ``goal`` bounds; ``sms`` counts the multiprocessors that copied, where
    the kernel was asked.
    """

    case: str
    backend: str
    bytes: int
    piece_bytes: int
    gb_per_s: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    reference: str | None = None
    ratio: float | None = None
    goal: float | None = None
    met: bool | None = None
    limit: str | None = None
    sms: int | None = None


@dataclass(frozen=True)
class Goal:
    """One goal of one contender: ``limit`` is a column, ``reference`` another contender if it is a ratio."""

    backend: str
    limit: str
    value: float
    reference: str | None = None


def is_met(limit: str, value: float, goal: float) -> bool:
    """Whether ``value`` of the column ``limit`` keeps to ``goal``."""
    return value >= goal if limit in AT_LEAST else value <= goal


def ratio(own: Samples, reference: Samples) -> float:
    """Return how many times faster ``own`` is: medians of the same round compared, then the median over rounds."""
    pairs = zip(own, reference, strict=False)
    return float(np.median([np.median(theirs) / np.median(mine) for mine, theirs in pairs]))


@dataclass(frozen=True)
class Measured:
    """What one case gave: ``samples`` by contender, ``pieces`` and ``sms`` by contender where known."""

    case: str
    nbytes: int
    samples: Mapping[str, Samples]
    pieces: Mapping[str, int]
    sms: Mapping[str, int]


def of_case(measured: Measured, goals: Sequence[Goal], compared: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return each contender's own row, a row for each absolute goal, and a row for each comparison.

    Args:
        measured: the samples; contenders that failed are missing.
        goals: whatever concerns contenders that are missing is left out.
        compared: references by contender, with or without a goal.

    """
    found: list[Row] = []
    for name in measured.samples:
        own = [goal for goal in goals if goal.backend == name]
        fixed = [goal for goal in own if goal.reference is None]
        found += [_fixed(measured, name, goal) for goal in fixed] or [_fixed(measured, name, None)]
        ratios = {goal.reference: goal for goal in own if goal.reference is not None}
        for reference in dict.fromkeys([*ratios, *compared.get(name, ())]):
            if reference in measured.samples and reference != name:
                found.append(_against(measured, name, reference, ratios.get(reference)))
    return found


def of_memory(backend: str, used_bytes: int, moved_bytes: int, goal: Goal | None, *, first: bool = True) -> Row:
    """Return the row of the GPU memory that a contender took beside the pool; ``piece_bytes`` is what it moved.

    The first peer of a process also pays for what is there once, such as a library's kernels.
    """
    return Row(
        case=f"GPU memory beside the pool, {'first' if first else 'one more'} peer",
        backend=backend,
        bytes=used_bytes,
        piece_bytes=moved_bytes,
        goal=None if goal is None else goal.value,
        met=None if goal is None else is_met("bytes", used_bytes, goal.value),
        limit=None if goal is None else "bytes",
    )


def _numbers(measured: Measured, name: str) -> dict[str, Any]:
    flat = [seconds for one in measured.samples[name] for seconds in one]
    p50, p99 = (float(np.percentile(flat, q)) for q in (50, 99))
    return {
        "case": measured.case,
        "backend": name,
        "bytes": measured.nbytes,
        "piece_bytes": measured.pieces[name],
        "gb_per_s": round(measured.nbytes / p50 / 1e9, 2),
        "p50_us": round(p50 * 1e6, 1),
        "p99_us": round(p99 * 1e6, 1),
        "sms": measured.sms.get(name),
    }


def _fixed(measured: Measured, name: str, goal: Goal | None) -> Row:
    numbers = _numbers(measured, name)
    if goal is None:
        return Row(**numbers)
    met = is_met(goal.limit, numbers[goal.limit], goal.value)
    return Row(**numbers, goal=goal.value, met=met, limit=goal.limit)


def _against(measured: Measured, name: str, reference: str, goal: Goal | None) -> Row:
    value = round(ratio(measured.samples[name], measured.samples[reference]), 3)
    met = None if goal is None else is_met("ratio", value, goal.value)
    return Row(
        **_numbers(measured, name),
        reference=reference,
        ratio=value,
        goal=None if goal is None else goal.value,
        met=met,
        limit=None if goal is None else "ratio",
    )
