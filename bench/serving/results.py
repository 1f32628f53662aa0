"""A results file that several runs write to: each replaces the rows that it measured anew and keeps the others.

``python -m bench.serving.results FILE OTHER...`` adds other files to the first one in this way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench import report as files
from bench.serving import goals
from kvconnect.bench import tables
from kvconnect.bench.tables import Row

#: What makes two rows the same measurement.
KEY = ("case", "backend", "mode", "place", "vllm", "pool", "prompt_tokens")
_BETWEEN = " · "


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Return ``new`` with those rows of ``old`` that it did not measure itself, judged together.

    Each row names the commit that it was measured at. At the top, what differs between the runs stands side by side.
    """
    fresh = [{"commit": new["commit"]} | row for row in new["rows"] if goals.is_measured(row)]
    kept = [] if old is None else replaced([row for row in old["rows"] if goals.is_measured(row)], fresh)
    rows = goals.judge(kept + fresh)
    if old is None or not kept:
        return new | {"rows": rows}
    names = [*dict.fromkeys((*old["versions"], *new["versions"]))]
    return new | {
        "command": _both(old["command"], new["command"]),
        "versions": {name: _both(old["versions"].get(name), new["versions"].get(name)) for name in names},
        "commit": _both(old["commit"], new["commit"]),
        "rows": rows,
    }


def save(run: dict[str, Any], path: Path, *, append: bool) -> dict[str, Any]:
    """Write a run, together with what is there already if ``append``; return what was written."""
    whole = merge(files.load(path) if append else None, run)
    tables.save(whole, path)
    return whole


def main() -> int:
    """Run from the command line."""
    first, *others = map(Path, sys.argv[1:])
    for other in others:
        run = files.load(other)
        if run is None:
            sys.stderr.write(f"there is no {other}\n")
            return 1
        save(run, first, append=True)
    return 0


def replaced(old: list[Row], fresh: list[Row]) -> list[Row]:
    """Return the old rows but for those that were measured anew."""
    anew = {_key(row) for row in fresh}
    return [row for row in old if _key(row) not in anew]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def _both(one: str | None, other: str | None) -> str:
    """Return what two runs say, once where they agree."""
    parts = [part for text in (one, other) if text for part in text.split(_BETWEEN)]
    return _BETWEEN.join(dict.fromkeys(parts))


if __name__ == "__main__":
    sys.exit(main())
