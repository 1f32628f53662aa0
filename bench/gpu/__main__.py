"""``python -m bench.gpu``: measure on two GPUs of this host and write the results.

A whole run writes the results file and the document's part; a run of some cases
(``--only``) or a short one (``--quick``) writes where ``--out`` says, if it does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import report as files
from bench import results_file
from bench.gpu import report, run
from kvconnect.bench import tables
from kvconnect.bench.results import SCHEMA, hardware, versions

_COMMAND = "python -m bench.gpu"
_DISTRIBUTIONS = ("kvconnect", "torch", "numpy", "cupy-cuda13x", "nixl", "nixl-cu13", "mooncake-transfer-engine-cuda13")


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--only", metavar="REGEX", help="cases whose names match")
    parser.add_argument("--quick", action="store_true", help="two rounds of every case")
    parser.add_argument("--list", action="store_true", help="say which cases there are, and stop")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"results file (whole runs: {report.RESULTS.name})")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    arguments = parser.parse_args()
    chosen, memory = run.select(arguments.only)
    if arguments.list:
        print("\n".join([case.name for case in chosen]))
        return 0
    load = os.getloadavg()[0]
    book = run.Runner(chosen, memory=memory, quick=arguments.quick, say=lambda text: print(text, flush=True)).run()
    results = whole(book, load, arguments.commit)
    is_whole = not (arguments.only or arguments.quick)
    out = arguments.out or (report.RESULTS if is_whole else None)
    if out is not None and book.rows:
        tables.save(results, out)
        print(f"written: {out}")
        if importlib.util.find_spec("matplotlib") is not None:
            report.plot(results["rows"], out.with_suffix(".svg") if arguments.out else report.PLOT)
    if is_whole and out == report.RESULTS and book.rows:
        report.update()
        print(f"written: {files.DOCUMENT}")
    print(short(results))
    return 0 if book.rows else 1


def whole(book: run.Book, load: float, commit: str | None) -> dict[str, Any]:
    """Return the contents of the results file."""
    return {
        "schema": SCHEMA,
        "command": _COMMAND,
        "hardware": book.hardware | hardware() | {"load_before": round(load, 2)},
        "versions": versions(_DISTRIBUTIONS),
        "commit": commit or results_file.commit(),
        "left_out": book.left_out,
        "rows": [asdict(row) for row in book.rows],
    }


def short(results: dict[str, Any]) -> str:
    """Return what a run prints last: every contender once, the goals, and what is missing."""
    lines = []
    seen: set[tuple[str, str]] = set()
    for row in results["rows"]:
        if (row["case"], row["backend"]) in seen:
            continue
        seen.add((row["case"], row["backend"]))
        if row["gb_per_s"] is None:
            numbers = f"{row['bytes'] / 1e6:8.1f} MB"
        else:
            numbers = f"{row['gb_per_s']:8.1f} GB/s {row['p50_us']:10.1f} µs {row['p99_us']:10.1f} µs p99"
        sms = "" if row["sms"] is None else f"  {row['sms']} SMs"
        lines.append(f"{row['case']:38} {row['backend']:26}{numbers}{sms}")
    lines.append(report.goals(results["rows"]))
    lines += [f"not measured: {what}: {why}" for what, why in results["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
