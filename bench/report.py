"""Tables of a results file: what a run prints at its end and what ``docs/benchmarks.md`` shows.

``python -m bench.report`` rewrites the part of the document between the markers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvconnect.bench.tables import render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu.json"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- begin: written by python -m bench.report -->"
END = "<!-- end: written by python -m bench.report -->"


def load(path: Path = RESULTS) -> dict[str, Any] | None:
    """Read a results file; ``None`` if no run was recorded yet."""
    if not path.exists():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def document(text: str, results: dict[str, Any] | None) -> str:
    """Return ``text`` with `render`'s tables between the markers.

    Raises:
        ValueError: the text lacks a marker.

    """
    return between(text, BEGIN, END, render(results))


def between(text: str, begin: str, end: str, body: str) -> str:
    """Return ``text`` with ``body`` between two markers; raise `ValueError` if it lacks one."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the document lacks {begin!r} or {end!r}")
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def update() -> None:
    """Rewrite the document from the results file."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), load()), encoding="utf-8")


if __name__ == "__main__":
    update()
