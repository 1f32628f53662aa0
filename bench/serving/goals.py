"""What is compared with what, and what is wanted: measured rows → comparisons, a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bench.serving.contenders import FLOOR, LOWER_FLOOR, NIXL, P2P_NCCL
from kvconnect.bench.tables import Row

#: Bytes a second of a copy engine between the two GPUs, from ``bench/results/h200x2.json``.
ENGINE_RATE = 393e9
#: Times the wire, and milliseconds on top, that a hand-over may take above the floor.
WIRE_FACTOR = 1.3
SLACK_MS = {"cuda_ipc": 3.0, "nccl": 8.0}
#: Prompts as long as this are where totals are compared.
LONGEST = 16_000
ITL_FACTOR = 1.05
PREFILL_FACTOR = 0.97
LINK_SHARE = 0.30

_KEPT = ("case", "backend", "mode", "place", "vllm", "pool", "prompt_tokens", "bytes", "ttft_ms", "commit")


def is_measured(row: Row) -> bool:
    """Whether a row was measured, not made by `judge`."""
    return "compares" not in row


def judge(rows: Iterable[Row]) -> list[Row]:
    """Return the measured rows and after them everything that they are compared with."""
    measured = [row for row in rows if is_measured(row)]
    found = list(measured)
    for row in measured:
        if is_own(row):
            found += _hand_over(row, measured) if "total_ms" in row else _load(row, measured)
    return found


def is_own(row: Row) -> bool:
    """Whether a row is kvconnect's."""
    return str(row["backend"]).split(" ")[0] in {"cuda_ipc", "nccl", "nixl", "shm"}


def best_nixl(row: Row, rows: Iterable[Row], field: str) -> Row | None:
    """Return NixlConnector's better layout on the same pool."""
    found = [each for each in _alike(row, rows, "pool", "mode", "vllm") if str(each["backend"]).startswith(NIXL)]
    return min(found, key=lambda each: float(each[field]), default=None)


def _hand_over(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """Compare first tokens with the floors and NixlConnector's best, totals with both others'."""
    wire_ms = row["bytes"] / ENGINE_RATE * 1e3
    slack_ms = SLACK_MS.get(row["backend"].split(" ")[0])
    held = row["place"] == "two GPUs" and slack_ms is not None
    floors = [each for each in _alike(row, rows, "pool", "mode", "vllm") if each["backend"] in {FLOOR, LOWER_FLOOR}]
    for floor in floors:
        goal = floor["ttft_ms"] + WIRE_FACTOR * wire_ms + (slack_ms or 0.0)
        # The lower one sets the goal only where the other was not measured.
        sets = held and (floor["backend"] == FLOOR or len(floors) == 1)
        yield _at_most(row, "ttft_ms", floor, goal if sets else None)
    nixl = best_nixl(row, rows, "ttft_ms")
    if nixl is not None:
        yield _at_most(row, "ttft_ms", nixl, None)
    total = best_nixl(row, rows, "total_ms")
    p2p = next((each for each in _alike(row, rows, "pool", "mode", "vllm") if each["backend"] == P2P_NCCL), None)
    for other in (total, p2p):
        if other is not None:
            longest = row["prompt_tokens"] >= LONGEST and held
            yield _at_most(row, "total_ms", other, other["total_ms"] if longest else None)


def _load(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """Compare a load with the floors under the same arrivals, and P's rate with its own when nothing is taken."""
    for floor in _alike(row, rows, "mode", "vllm", "arrivals_per_s"):
        if floor["backend"] in {FLOOR, LOWER_FLOOR} and "itl_p99_ms" in floor:
            yield _at_most(row, "itl_p99_ms", floor, floor["itl_p99_ms"] * ITL_FACTOR)
    if "prefill_alone_tokens_per_s" in row:
        alone = row | {"backend": "nothing taken", "prefill_tokens_per_s": row["prefill_alone_tokens_per_s"]}
        yield _at_least(row, "prefill_tokens_per_s", alone, row["prefill_alone_tokens_per_s"] * PREFILL_FACTOR)
    if "link_share" in row:
        yield _at_least(row, "link_share", None, LINK_SHARE)


def _alike(row: Row, rows: Iterable[Row], *also: str) -> list[Row]:
    """Return the other rows about the same case in the same place."""
    fields = ("case", "place", *also)
    return [each for each in rows if each is not row and all(each.get(name) == row.get(name) for name in fields)]


def _at_most(row: Row, field: str, other: Row, goal: float | None) -> Row:
    return _compare(row, field, other, goal, lambda value, wanted: value <= wanted, inverse=True)


def _at_least(row: Row, field: str, other: Row | None, goal: float | None) -> Row:
    return _compare(row, field, other, goal, lambda value, wanted: value >= wanted, inverse=False)


def _compare(
    row: Row, field: str, other: Row | None, goal: float | None, holds: Callable[[Any, Any], bool], *, inverse: bool
) -> Row:
    """Return a comparison; a ratio above 1 is in favour of the row."""
    value, against = float(row[field]), None if other is None else float(other[field])
    ratio = None
    if against:
        ratio = round(against / value if inverse else value / against, 3)
    return {name: row[name] for name in _KEPT if name in row} | {
        "compares": field,
        "limit": "at most" if inverse else "at least",
        "value": value,
        "reference": None if other is None else other["backend"],
        "reference_value": against,
        "ratio": ratio,
        "goal": None if goal is None else round(goal, 3),
        "met": None if goal is None else bool(holds(value, round(goal, 3))),
    }
