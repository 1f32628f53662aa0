"""Tables of hand-overs between real engines: rows of a results file → ``docs/benchmarks.md``.

``python -m bench.serving.report`` rewrites that part of the document and draws its picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from bench import report
from bench.report import DOCUMENT, ROOT
from bench.serving import timeline
from bench.serving.contenders import NIXL
from bench.serving.goals import is_measured
from kvconnect.bench import tables
from kvconnect.bench.tables import Row

RESULTS = ROOT / "bench" / "results" / "h200x2-vllm.json"
PICTURE = ROOT / "docs" / "img" / "h200x2-hand-over.svg"
BEGIN = "<!-- begin: written by python -m bench.serving.report -->"
END = "<!-- end: written by python -m bench.serving.report -->"
_NUMBER = "---:"
_UNITS = {"ttft_ms": "ms", "total_ms": "ms", "itl_p99_ms": "ms", "prefill_tokens_per_s": "tokens/s", "link_share": ""}
_WHAT = {
    "ttft_ms": "first token",
    "total_ms": "prefill + first token",
    "itl_p99_ms": "between tokens, p99",
    "prefill_tokens_per_s": "P's prefill",
    "link_share": "share of the link",
}


def render(results: dict[str, Any] | None, *, picture: bool = False) -> str:
    """Return everything that a results file says, as Markdown."""
    if results is None:
        return "No run was recorded yet."
    rows: list[Row] = results["rows"]
    single = [row for row in rows if is_measured(row) and "total_ms" in row]
    parts = [tables.machine(results), goals(rows)]
    handed = [row for row in single if row["prefill_ms"]]
    parts.append(_by_length("First tokens", "D's first token, ms", single, "ttft_ms"))
    parts.append(_by_length("Prefill and first token", "P's answer and D's first token, ms", handed, "total_ms"))
    parts.append(_ratios(rows))
    parts += [_phases(single, picture=picture), _load([row for row in rows if "itl_p99_ms" in row])]
    return "\n\n".join(part for part in parts if part)


def goals(rows: Iterable[Row]) -> str:
    """Return a table of the goals and what was reached."""
    held = [row for row in rows if row["goal"] is not None]
    lines = ["### Goals between engines", "", f"{sum(bool(row['met']) for row in held)} of {len(held)} met.", ""]
    lines += [_line(["case", "contender", "what", "goal", "reached", ""]), _rule(3, 3)]
    for row in held:
        unit = _UNITS[row["compares"]]
        sign = "≤" if row["limit"] == "at most" else "≥"
        goal = f"{sign} {_figure(row['goal'])} {unit}".rstrip()
        against = f" ({row['reference']}: {_figure(row['reference_value'])})" if row["reference"] else ""
        reached = f"{_figure(row['value'])} {unit}".rstrip()
        case = f"{row['case']}, {row['pool']}"
        what = _WHAT[row["compares"]]
        lines.append(_line([case, _label(row), what, goal + against, reached, "met" if row["met"] else "**missed**"]))
    return "\n".join(lines)


def update() -> None:
    """Rewrite the document from the results file, and draw the picture if matplotlib is there."""
    results = report.load(RESULTS)
    if results is not None:
        chosen = timeline.choose(results["rows"])
        if chosen:
            with contextlib.suppress(ImportError):
                timeline.draw(chosen, PICTURE)
    text = render(results, picture=PICTURE.exists())
    DOCUMENT.write_text(report.between(DOCUMENT.read_text(encoding="utf-8"), BEGIN, END, text), encoding="utf-8")


def _by_length(title: str, head: str, rows: Sequence[Row], field: str) -> str:
    """Return a table of one field: a line for each contender and pool, a column for each length."""
    if not rows:
        return ""
    lengths = sorted({row["prompt_tokens"] for row in rows})
    lines = [_line([head, "pool", *(f"{tokens:,} tokens" for tokens in lengths)]), _rule(2, len(lengths))]
    for label, pool in dict.fromkeys((_label(row), row["pool"]) for row in rows):
        own = {row["prompt_tokens"]: row[field] for row in rows if (_label(row), row["pool"]) == (label, pool)}
        lines.append(_line([label, pool, *(f"{own[n]:.1f}" if n in own else "" for n in lengths)]))
    return f"### {title}\n\n" + "\n".join(lines)


def _ratios(rows: Iterable[Row]) -> str:
    """Return how much sooner than with NixlConnector's better layout D has its first token."""
    found = [row for row in rows if row.get("compares") == "ttft_ms" and str(row["reference"]).startswith(NIXL)]
    if not found:
        return ""
    lengths = sorted({row["prompt_tokens"] for row in found})
    lines = [_line(["first token, times sooner", "pool", *(f"{tokens:,} tokens" for tokens in lengths)])]
    lines.append(_rule(2, len(lengths)))
    for label, pool in dict.fromkeys((_label(row), row["pool"]) for row in found):
        own = {row["prompt_tokens"]: row for row in found if (_label(row), row["pool"]) == (label, pool)}
        cells = [f"{own[n]['ratio']:.2f}" if n in own else "" for n in lengths]
        lines.append(_line([label, pool, *cells]))
    return f"### Against {NIXL}'s better layout\n\n" + "\n".join(lines)


def _phases(rows: Iterable[Row], *, picture: bool) -> str:
    """Return the picture of one hand-over, and its numbers."""
    chosen = timeline.choose(rows)
    if not chosen:
        return ""
    parts = ["### One hand-over, step by step"]
    if picture:
        parts.append(f"![One hand-over of {chosen[0]['prompt_tokens']:,} tokens, step by step](img/{PICTURE.name})")
    lines = [_line(["ms", *(_label(row) for row in chosen)]), _rule(1, len(chosen))]
    spans = [{span.what: span.ms for span in timeline.spans(row["phases_ms"])} for row in chosen]
    lines += [
        _line([what, *(f"{each[what]:.2f}" if what in each else "" for each in spans)])
        for what in dict.fromkeys(name for each in spans for name in each)
    ]
    return "\n\n".join([*parts, "\n".join(lines)])


def _load(rows: Sequence[Row]) -> str:
    """Return the table of everything under load: medians of the repeats, and their spread in brackets."""
    measured = [row for row in rows if is_measured(row)]
    if not measured:
        return ""
    fields = {
        "arrivals_per_s": "arrivals a second",
        "link_share": "share of the link",
        "itl_p50_ms": "between tokens, p50, ms",
        "itl_p99_ms": "p99, ms",
        "itl_alone_p99_ms": "p99 without arrivals, ms",
        "ttft_ms": "first token of an arrival, p50, ms",
        "ttft_p99_ms": "p99, ms",
        "launch_p50_ms": "first sight to launch, p50, ms",
        "launch_p99_ms": "p99, ms",
        "prefill_tokens_per_s": "P's prefill, tokens/s",
        "prefill_alone_tokens_per_s": "nothing taken, tokens/s",
        "late_p99_ms": "arrivals sent after their moment, p99, ms",
        "failed": "arrivals that failed",
    }
    lines = [_line([measured[0]["case"], *(_label(row) for row in measured)]), _rule(1, len(measured))]
    lines += [_line([head, *(_spread(row, field) for row in measured)]) for field, head in fields.items()]
    return "### Under load\n\n" + "\n".join(lines)


def _spread(row: Row, field: str) -> str:
    if row.get(field) is None:
        return ""
    values = row.get(f"{field}_all", [])
    if len(values) < 2:
        return _figure(row[field])
    return f"{_figure(row[field])} ({_figure(min(values))} to {_figure(max(values))})"


def _label(row: Row) -> str:
    """Name a contender with what else sets it apart."""
    place = "" if row["place"] == "two GPUs" else f", {row['place']}"
    return f"{row['backend']} ({row['vllm']}, {row['mode']}{place})"


def _figure(value: float) -> str:
    """Write a number with about three digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}".rstrip("0").rstrip(".")


def _rule(names: int, numbers: int) -> str:
    return _line([*["---"] * names, *[_NUMBER] * numbers])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    update()
