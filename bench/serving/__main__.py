"""``python -m bench.serving``: D's first-token time after a hand-over, by connector, length and pool.

Needs two GPUs and a CUDA build of vLLM. Times are D's own (``vllm:time_to_first_token_seconds``):
from its frontend's sight of the request to the first token, one request at a time.
A *fragmented* pool has served random requests before, as any server has after a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench import report as files
from bench import results_file
from bench.serving import report
from bench.serving.contenders import CONTENDERS, KV_BYTES_PER_TOKEN, Contender, pair, write_model
from kvconnect.demo import client as api
from kvconnect.demo import engines
from kvconnect.demo.client import Prompt
from kvconnect.demo.deployment import say
from kvconnect.demo.engines import Server

LENGTHS = (512, 2048, 8192, 16000)
TIME_TO_FIRST = "vllm:time_to_first_token_seconds_sum"
_VOCABULARY = 100_000
_DISTRIBUTIONS = ("kvconnect", "vllm", "torch", "cupy-cuda13x", "nixl")


@dataclass
class Run:
    """One contender's engines."""

    contender: Contender
    servers: list[Server]
    http: httpx.Client
    random: np.random.Generator

    @property
    def decode(self) -> Server:
        """D."""
        return self.servers[-1]

    def prompt(self, tokens: int, max_tokens: int = 1) -> Prompt:
        """Return random token ids: no two prompts share a prefix."""
        ids = self.random.integers(1000, _VOCABULARY, tokens).tolist()
        return Prompt(ids, max_tokens, more={"detokenize": False, "ignore_eos": True})

    def hand_over(self, tokens: int) -> tuple[float, float]:
        """Return seconds of P's leg and of D's first token."""
        prompt = self.prompt(tokens)
        params, prefill_s = None, 0.0
        if self.contender.hands_over:
            answer = api.send(self.http, self.servers[0].url, prompt, kv_transfer_params=api.ASK)
            params, prefill_s = answer.kv_transfer_params, answer.total_s
            if params is None:
                raise RuntimeError("P returned no kv_transfer_params")
        before = self.metric(TIME_TO_FIRST)
        api.send(self.http, self.decode.url, prompt, kv_transfer_params=params)
        return prefill_s, self.metric(TIME_TO_FIRST) - before

    def metric(self, name: str) -> float:
        """Return one of D's metrics."""
        return api.metrics(self.http, self.decode.url).get(name, 0.0)

    def fragment(self, requests: int) -> None:
        """Serve random requests on every engine, so that free blocks lie scattered."""

        def one(job: tuple[Server, Prompt]) -> None:
            api.send(self.http, job[0].url, job[1])

        lengths = self.random.integers(16, 2000, requests)
        outputs = self.random.integers(1, 48, requests)
        jobs = [(s, self.prompt(int(n), int(m))) for n, m in zip(lengths, outputs, strict=True) for s in self.servers]
        with ThreadPoolExecutor(96) as pool:
            list(pool.map(one, jobs))


def measure(run: Run, lengths: Sequence[int], pool: str, requests: int, mode: str) -> list[dict[str, Any]]:
    """Return the rows of one pool."""
    rows = []
    for tokens in lengths:
        moved = run.metric(api.EXTERNAL_TOKENS)
        run.hand_over(tokens)  # the first one of a length meets the peer and compiles kernels
        samples = [run.hand_over(tokens) for _ in range(requests)]
        moved = run.metric(api.EXTERNAL_TOKENS) - moved
        first = [decode * 1e3 for _, decode in samples]
        row = {
            "case": f"hand-over of {tokens} tokens",
            "backend": run.contender.name,
            "mode": mode,
            "bytes": tokens * KV_BYTES_PER_TOKEN,
            "prompt_tokens": tokens,
            "pool": pool,
            "ttft_ms": round(statistics.median(first), 2),
            "ttft_ms_all": [round(value, 2) for value in first],
            "prefill_ms": round(statistics.median(prefill for prefill, _ in samples) * 1e3, 2),
            "external_tokens": int(moved),
        }
        say(json.dumps(row))
        rows.append(row)
    return rows


def contend(contender: Contender, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one contender's engines and everything that is measured on them."""
    folder = args.logs / contender.name.replace(" ", "-")
    servers = pair(contender, write_model(args.logs / "llama-8b"), folder, graphs=args.graphs)
    began, mode = time.monotonic(), "CUDA graphs" if args.graphs else "eager"
    try:
        engines.start(servers, say)
        engines.wait_ready(servers, args.start_timeout_s, say)
        with api.open_client(120.0) as http:
            run = Run(contender, servers, http, np.random.default_rng(7))
            rows = measure(run, args.lengths, "fresh", args.requests, mode)
            if args.fragment:
                run.fragment(args.fragment)
                rows += measure(run, args.lengths, "fragmented", args.requests, mode)
    finally:
        engines.stop(servers)
        say(f"{contender.name}: {time.monotonic() - began:.0f} s")
    return rows


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--contender", action="append", choices=sorted(CONTENDERS), help="repeatable; default: all")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--requests", type=int, default=4, help="timed for each length and pool")
    parser.add_argument("--fragment", type=int, default=600, help="random requests before the fragmented pool")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, not eager")
    parser.add_argument("--logs", type=Path, default=Path("out/serving"))
    parser.add_argument("--out", type=Path, default=Path("out/serving.json"))
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--start-timeout-s", type=float, default=150.0)
    args = parser.parse_args()
    rows, failed = [], 0
    for name in args.contender or CONTENDERS:
        try:
            rows += contend(CONTENDERS[name], args)
        except (engines.ServerError, httpx.HTTPError, RuntimeError) as error:
            failed += 1
            say(f"{name} FAILED: {error}")
    results = {
        "schema": results_file.SCHEMA,
        "command": "python -m bench.serving " + " ".join(sys.argv[1:]),
        "hardware": {"gpus": _gpus()} | results_file.hardware(),
        "versions": results_file.versions(_DISTRIBUTIONS),
        "commit": args.commit or results_file.commit(),
        "rows": report.judge(rows),
    }
    files.save(results, args.out)
    say(report.render(results))
    return min(failed, 1)


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    sys.exit(main())
