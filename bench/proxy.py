"""``python -m bench.proxy``: what the proxy adds to a request, at 200 requests a second.

Two servers answer as engines do, at once, so that nothing but the way is measured: P with a ticket,
D with an answer, whole or in pieces. The same client sends the same requests at the same moments
(exponential gaps from a fixed seed) through the proxy, straight to D, and straight to P and then
with its ticket to D, which is what a proxy that took no time would do. Each round lets all three
run, one after the other, in a shuffled order. A request's time runs from the moment that it was due
to the first byte of its answer's body (``streamed``) or to the last (``whole``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request  # noqa: TC002 - see below
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench import results_file
from bench.report import ROOT
from kvconnect.bench import results, tables
from kvconnect.bench.rows import Row
from kvconnect.demo.engines import free_port
from kvconnect.proxy import legs

_COMMAND = "python -m bench.proxy"
_SEED = 6
_LIMIT_S = 30.0
_PATH = "/v1/completions"
_PIECES = 16
_MEASURED = ("kvconnect", "httpx", "starlette", "uvicorn", "httptools", "uvloop", "prometheus-client", "aiohttp")
#: As KvConnect's are, in size.
_TICKET = {
    "do_remote_prefill": True,
    "remote_engine_id": "p",
    "remote_block_ids": [[*range(64)]],
    "kvconnect": "x" * 128,
}


@dataclass(frozen=True)
class ProxyRow(Row):
    """A row with what came on top of the reference, by percentile."""

    requests_per_s: float = 0.0
    requests: int = 0
    over_p50_us: float | None = None
    over_p99_us: float | None = None


# -- servers -------------------------------------------------------------------------------


def _application(leg: str) -> Starlette:
    """Return an engine that takes no time; D says whether it got the ticket."""

    async def complete(request: Request) -> Response:
        asked = await request.json()
        text = "by ticket" if asked.get("kv_transfer_params") == _TICKET else "alone"
        answer: dict[str, Any] = {"id": "cmpl-1", "choices": [{"index": 0, "text": text}]}
        if leg == "prefill":
            answer["kv_transfer_params"] = _TICKET
        if not asked["stream"]:
            return JSONResponse(answer)
        event = f"data: {json.dumps(answer)}\n\n"

        async def events() -> AsyncIterator[str]:
            for _ in range(_PIECES):
                yield event
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route(_PATH, complete, methods=["POST"])])


def _serve(leg: str, listener: socket.socket) -> None:
    config = uvicorn.Config(_application(leg), log_level="warning", lifespan="off", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def engine(leg: str) -> Iterator[str]:
    """Run a server in a process of its own; yield its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        process: BaseProcess = multiprocessing.get_context("fork").Process(target=_serve, args=(leg, listener))
        process.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.kill()
            process.join(_LIMIT_S)


@contextlib.contextmanager
def proxy(prefill: str, decode: str) -> Iterator[str]:
    """Run the proxy as users do; yield its URL."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "kvconnect",
        "proxy",
        "--port",
        str(port),
        "--prefill",
        prefill,
        "--decode",
        decode,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            _await_listening(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait(_LIMIT_S)


def _await_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), _LIMIT_S).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit("the proxy did not start") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        else:
            return


# -- requests ------------------------------------------------------------------------------

Body = dict[str, Any]


@dataclass
class Way:
    """How a request gets to D: straight there, after P, or through the proxy."""

    name: str
    prefill: str | None
    decode: str
    #: What D then answers.
    text: bytes

    async def send(self, session: aiohttp.ClientSession, body: Body) -> tuple[float, float]:
        """Send a request; return the moments of the first and of the last byte of its answer."""
        if self.prefill is not None:
            *_, content = await _post(session, self.prefill, legs.prefill_body(body))
            body = legs.decode_body(body, legs.ticket(content))
        first_s, last_s, content = await _post(session, self.decode, body)
        if self.text not in content:
            raise RuntimeError(f"{self.name}: {content!r}")
        return first_s, last_s


async def _post(session: aiohttp.ClientSession, url: str, body: Body) -> tuple[float, float, bytes]:
    async with session.post(url + _PATH, json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}")
        first = await answer.content.readany()
        first_s = time.monotonic()
        rest = await answer.content.read()
        return first_s, time.monotonic(), first + rest


async def load(way: Way, body: Body, moments: Sequence[float]) -> list[float]:
    """Send a request at each moment; return the seconds that each took from then on."""
    took: list[float] = []

    async def one(due_s: float) -> None:
        first_s, last_s = await way.send(session, body)
        took.append((first_s if body["stream"] else last_s) - due_s)

    timeout, connector = aiohttp.ClientTimeout(total=_LIMIT_S), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
        begin_s = time.monotonic() + 0.1
        for moment in moments:
            await asyncio.sleep(begin_s + moment - time.monotonic())
            group.create_task(one(begin_s + moment))
    return took


def race(ways: Sequence[Way], body: Body, moments: Sequence[float], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every request, by way, without those of a first short round."""
    took: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        asyncio.run(load(way, body, moments[:100]))
    for number in range(rounds):
        for place in np.random.default_rng(number).permutation(len(ways)):
            way = ways[place]
            took[way.name] += asyncio.run(load(way, body, moments))
    return took


# -- rows ----------------------------------------------------------------------------------


def rows_of(case: str, nbytes: int, took: dict[str, list[float]], rate: float) -> list[ProxyRow]:
    """Return the proxy's rows, one for each other way, and a row for each of those."""
    own, *others = (
        ProxyRow(
            case, name, nbytes, nbytes, round(nbytes * rate / 1e9, 6), *_percentiles(seconds), requests_per_s=rate,
            requests=len(seconds),
        )
        for name, seconds in took.items()
    )  # fmt: skip
    against = [
        replace(
            own,
            reference=other.backend,
            ratio=round(other.p50_us / own.p50_us, 3),
            over_p50_us=round(own.p50_us - other.p50_us, 1),
            over_p99_us=round(own.p99_us - other.p99_us, 1),
        )
        for other in others
    ]
    return [*against, *others]


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return round(float(p50) * 1e6, 1), round(float(p99) * 1e6, 1)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (200)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each way in each round (10)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--characters", type=int, default=2000, help="of the prompt (2000)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/proxy.json")
    args = parser.parse_args()
    started = os.getloadavg()[0]
    gaps = np.random.default_rng(_SEED).exponential(1 / args.rate, round(args.rate * args.seconds))
    moments = [float(moment) for moment in np.cumsum(gaps)]
    rows: list[ProxyRow] = []
    with engine("prefill") as prefill, engine("decode") as decode, proxy(prefill, decode) as url:
        ways = [
            Way("proxy", None, url, b"by ticket"),
            Way("straight to D", None, decode, b"alone"),
            Way("straight to P and D", prefill, decode, b"by ticket"),
        ]
        for case, streams in (("whole", False), ("streamed, first byte", True)):
            body = {"model": "m", "prompt": "x" * args.characters, "max_tokens": 16, "stream": streams}
            rows += rows_of(case, len(json.dumps(body)), race(ways, body, moments, args.rounds), args.rate)
    for row in rows:
        over = f"  +{row.over_p50_us} +{row.over_p99_us} to {row.reference}" if row.reference else ""
        print(f"{row.case:22} {row.backend:20} p50 {row.p50_us:9.1f} us  p99 {row.p99_us:9.1f} us{over}")
    result = results.build([*rows], started, _COMMAND, results_file.commit()) | {
        "versions": results.versions(_MEASURED)
    }
    tables.save(result, args.out)


if __name__ == "__main__":
    main()
