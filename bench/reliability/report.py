"""The table of ``docs/reliability.md``.

``python -m bench.reliability.report`` rewrites that part of the document.
"""

from __future__ import annotations

import re
from typing import Any

from bench import report
from bench.report import ROOT
from kvconnect.bench import tables
from kvconnect.bench.tables import Row

RESULTS = ROOT / "bench" / "results" / "reliability-cpu.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- begin: written by python -m bench.reliability.report -->"
END = "<!-- end: written by python -m bench.reliability.report -->"
#: What a row is of, unless it says otherwise.
ENGINES = "two vLLM engines, `tcp`"
_HEAD = ("fault", "what the user sees", "fetched again after", "all blocks free after", "blocks leaked")


def render(results: dict[str, Any] | None) -> str:
    """Return everything that a results file says, as Markdown."""
    if results is None:
        return "No run was recorded yet."
    rule = ["---", "---", "---:", "---:", "---:"]
    rows = [line(row) for row in results["rows"]]
    return "\n".join([tables.machine(results), "", _line(_HEAD), _line(rule), *rows])


def line(row: Row) -> str:
    """Return a row of the table."""
    over = f" (from when {row['over']})" if row["over"] else ""
    seconds = f"{row['recovered_s']:.1f} s{over}"
    free = "within a lease" if row["free_after_s"] is None else f"{row['free_after_s']:.0f} s"
    case = row["case"] + ("" if row["engines"] == ENGINES else f" ({row['engines']})")
    return _line([case, _seen(row), seconds, free, str(row["leaked_blocks"])])


def _seen(row: Row) -> str:
    """Say what became of the requests."""
    asked, answered = row["asked"], row["asked"] - row["failed"] - row["cut_short"]
    parts = []
    if answered:
        wrong = answered - row["right"]
        parts.append(f"{answered} of {asked} answered, " + (f"{wrong} WRONG" if wrong else "all right"))
        computed = answered - row["fetched"]
        parts.append(f"{row['fetched']} fetched, {computed} computed by D" if computed else "all fetched")
        parts.append(f"slowest after {row['slowest_s']:.1f} s")
    if row["cut_short"]:
        parts.append(f"{row['cut_short']} of {asked} end at once, with as much as there was")
    if row["failed"]:
        errors = "; ".join(dict.fromkeys(_short(error) for error in row["errors"]))
        parts.append(f"{row['failed']} of {asked} fail at once: {errors}")
    return ", ".join(parts)


def _short(error: str) -> str:
    """Return the part of an error that does not depend on the run."""
    return re.sub(r"http://\S+ answered (\d+): .*", r"HTTP \1", error, flags=re.DOTALL)


def document(text: str, results: dict[str, Any] | None) -> str:
    """Return ``text`` with the table between the markers; raises `ValueError` if it lacks one."""
    return report.between(text, BEGIN, END, render(results))


def update() -> None:
    """Rewrite the document from the results file."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), report.load(RESULTS)), encoding="utf-8")


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    update()
