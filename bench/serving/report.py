"""Tables of hand-overs between real engines: rows of a results file → ``docs/benchmarks.md``.

``python -m bench.serving.report`` rewrites that part of the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import report
from bench.report import DOCUMENT, ROOT, Row

RESULTS = ROOT / "bench" / "results" / "h200x2-vllm.json"
BEGIN = "<!-- begin: written by python -m bench.serving.report -->"
END = "<!-- end: written by python -m bench.serving.report -->"
FLOOR = "DecodeBenchConnector"
#: Bytes a second of a copy engine between the two GPUs, from ``bench/results/h200x2.json``.
ENGINE_RATE = 393e9
#: Times the wire, and milliseconds on top, that a hand-over may take above the floor.
WIRE_FACTOR = 1.3
SLACK_MS = {"cuda_ipc": 3.0, "nccl": 8.0}


def judge(rows: list[Row]) -> list[Row]:
    """Add ``reference``, ``ratio``, ``goal`` and ``met``: milliseconds against the floor of the same length."""
    floors = {row["prompt_tokens"]: row["ttft_ms"] for row in rows if row["backend"] == FLOOR}
    for row in rows:
        floor, slack = floors.get(row["prompt_tokens"]), SLACK_MS.get(row["backend"].split(" ")[0])
        judged = floor is not None and slack is not None
        goal = floor + WIRE_FACTOR * row["bytes"] / ENGINE_RATE * 1e3 + slack if judged else None
        row["reference"] = FLOOR if floor is not None and row["backend"] != FLOOR else None
        row["ratio"] = round(floor / row["ttft_ms"], 3) if row["reference"] else None
        row["goal"] = round(goal, 2) if goal is not None else None
        row["met"] = row["ttft_ms"] <= goal if goal is not None else None
    return rows


def render(results: dict[str, Any] | None) -> str:
    """Return everything that a results file says, as Markdown."""
    if results is None:
        return "No run was recorded yet."
    rows: list[Row] = results["rows"]
    lengths = sorted({row["prompt_tokens"] for row in rows})
    head = ["D's first token, ms", "pool", *(f"{tokens:,} tokens" for tokens in lengths)]
    lines = [_line(head), _line(["---", "---", *("---:" for _ in lengths)])]
    for backend, mode, pool in dict.fromkeys((row["backend"], row.get("mode", ""), row["pool"]) for row in rows):
        own = {
            r["prompt_tokens"]: r for r in rows if (r["backend"], r.get("mode", ""), r["pool"]) == (backend, mode, pool)
        }
        cells = [_cell(own.get(tokens)) for tokens in lengths]
        lines.append(_line([f"{backend} ({mode})" if mode else backend, pool, *cells]))
    held = [row for row in rows if row["goal"] is not None]
    goals = (
        f"{sum(bool(row['met']) for row in held)} of {len(held)} goals met (floor + 1.3 × wire + slack, in brackets)."
    )
    return "\n\n".join([report.machine(results), goals, "\n".join(lines)])


def update() -> None:
    """Rewrite the document from the results file."""
    text = report.between(DOCUMENT.read_text(encoding="utf-8"), BEGIN, END, render(report.load(RESULTS)))
    DOCUMENT.write_text(text, encoding="utf-8")


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row['ttft_ms']:.1f}"
    if row["goal"] is None:
        return text
    return f"{text} ({'met' if row['met'] else '**missed**'}: {row['goal']:.1f})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    update()
