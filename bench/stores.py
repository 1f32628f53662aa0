"""``python -m bench.stores``: KV through Redis and a directory, paged memory to paged memory, against bare clients.

Each round writes and reads the same bytes both ways, one after the other, so that a busy machine
slows both. The bare client sets and gets chunks of the same size one by one over one connection
(``redis``), or writes and reads one file (``file``); it neither gathers nor checks anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from bench import results_file
from bench.report import ROOT
from kvconnect import registry
from kvconnect.bench import results
from kvconnect.bench.rows import Row
from kvconnect.buffers.base import Claim, EndSettings, LookupKey, SchedulerEnd, Want, WorkerEnd
from kvconnect.config import Backend, Config
from kvconnect.testing.layouts import blank_memory, differences, noisy_memory, separate_layers

_COMMAND = "python -m bench.stores"
_LIMIT_S = 120.0
#: What a store has to reach of a bare client's rate.
_GOAL = 0.7
_LAYERS, _HEADS, _PIECE_BYTES = 16, 8, 2048  # a quarter of a megabyte a block
_CHUNK_BYTES = 4 << 20

Timed = tuple[float, float]


class Engines:
    """A producer and a consumer without models over one store."""

    def __init__(self, store: Backend, nbytes: int) -> None:
        """Have ``nbytes`` of KV, rounded to whole blocks."""
        block = _LAYERS * _HEADS * _PIECE_BYTES
        count = nbytes // block
        layout = separate_layers(_LAYERS, count + 1, _HEADS, _PIECE_BYTES)
        self.blocks, self.nbytes = (tuple(range(1, count + 1)),), count * block
        self._key = LookupKey("bench", secrets.token_bytes(16), 16 * count)
        self._memories = noisy_memory(layout, 1), blank_memory(layout)
        buffer, config = registry.buffer(store.name), Config(buffer=store, transfer_timeout_s=_LIMIT_S)
        self._ends: list[SchedulerEnd] = []
        self._workers: list[WorkerEnd] = []
        for produces, memory in zip((True, False), self._memories, strict=True):
            settings = EndSettings("bench", {}, 1, produces, not produces, config)
            worker = buffer.worker_end(settings, 0, memory)
            self._ends.append(buffer.scheduler_end(settings))
            self._ends[-1].introduce([worker.describe()])
            self._workers.append(worker)

    def move(self) -> Timed:
        """Store the prompt and load it; return the seconds of each."""
        p, d = self._ends
        before, start = p.stats().get("stored", 0), time.monotonic()
        p.offer(self._key, self.blocks, label=None, asked=True)
        _until(lambda: p.stats().get("stored", 0) > before)
        stored, request = time.monotonic(), secrets.token_hex(4)
        d.look(request, Want(self._key))
        _until(lambda: d.found(request) is not None)
        claim = d.commit(request)
        if not isinstance(claim, Claim):
            raise SystemExit(f"the prompt was not found: {claim}")
        self._workers[1].read(claim, claim.blocks, self.blocks, lambda _: None).wait(_LIMIT_S)
        loaded = time.monotonic()
        d.settle(request)
        p.drain_released()
        return stored - start, loaded - stored

    def check(self) -> None:
        """See that what arrived is what was sent; the first block is nobody's."""
        p, d = self._memories
        first = _HEADS * _PIECE_BYTES
        for mine, theirs in zip(d.owner, p.owner, strict=True):  # type: ignore[call-overload]
            mine[:first] = theirs[:first]
        if found := differences(d, p):
            raise SystemExit("\n".join(found))

    def close(self) -> None:
        """End both."""
        for worker in self._workers:
            worker.close()
        for end in self._ends:
            end.close()


def _until(true: Callable[[], bool]) -> None:
    deadline, wake = time.monotonic() + _LIMIT_S, threading.Event()
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit("the store did not answer in time")
        wake.wait(0.001)


def bare_redis(url: str, nbytes: int) -> Timed:
    """Set and get as many bytes by one connection."""
    chunk = os.urandom(_CHUNK_BYTES)
    names = [f"bare:{at}" for at in range(0, nbytes, _CHUNK_BYTES)]
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        start = time.monotonic()
        for name in names:
            client.set(name, chunk)
        written = time.monotonic()
        for name in names:
            client.get(name)
        read = time.monotonic()
        client.unlink(*names)
    return written - start, read - written


def bare_file(folder: str, nbytes: int) -> Timed:
    """Write and read as many bytes of one file."""
    chunk, room = os.urandom(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)
    path = Path(folder) / "bare"
    start = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(0, nbytes, _CHUNK_BYTES):
            file.write(chunk)
    written = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass
    read = time.monotonic()
    path.unlink()
    return written - start, read - written


@contextlib.contextmanager
def server(folder: str) -> Iterator[str]:
    """Run a Redis server on a socket; yield its address."""
    found = shutil.which("redis-server")
    if found is None:
        raise SystemExit("install a Redis server: apt-get install redis-server")
    socket = f"{folder}/socket"
    command = [found, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _until(lambda: Path(socket).exists())
        yield f"unix://{socket}"
    finally:
        process.kill()
        process.wait(10)


def race(store: Backend, nbytes: int, rounds: int, bare: tuple[str, Callable[[int], Timed]]) -> list[Row]:
    """Move ``nbytes`` both ways in turns, after one round that does not count."""
    engines = Engines(store, nbytes)
    own, others = [], []
    for _ in range(rounds + 1):
        own.append(engines.move())
        others.append(bare[1](engines.nbytes))
    engines.check()
    engines.close()
    rows = []
    for side, case in enumerate(("store write", "store read")):
        mine, theirs = [each[side] for each in own[1:]], [each[side] for each in others[1:]]
        ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
        rows.append(_row(case, store.name, engines.nbytes, mine, (bare[0], ratio)))
        rows.append(_row(case, bare[0], engines.nbytes, theirs))
    return rows


def _row(case: str, backend: str, nbytes: int, seconds: list[float], against: tuple[str, float] | None = None) -> Row:
    p50 = statistics.median(seconds)
    rate, times = nbytes / p50 / 1e9, (p50 * 1e6, max(seconds) * 1e6)
    if against is None:
        return Row(case, backend, nbytes, _CHUNK_BYTES, round(rate, 3), *times)
    name, ratio = against
    goal = _GOAL if backend == "redis" else None
    met = None if goal is None else ratio >= goal
    return Row(case, backend, nbytes, _CHUNK_BYTES, round(rate, 3), *times, name, round(ratio, 3), goal, met)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--bytes", type=int, default=10**9, help="of KV (1e9)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/redis.json")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[Row] = []
    options: dict[str, Any] = {"chunk_bytes": _CHUNK_BYTES, "writing_bytes": 4 * args.bytes}
    with tempfile.TemporaryDirectory() as folder, server(folder) as url:
        bare = ("redis-py", lambda nbytes: bare_redis(url, nbytes))
        rows += race(Backend("redis", {**options, "url": url}), args.bytes, args.rounds, bare)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        other = ("file", lambda nbytes: bare_file(folder, nbytes))
        rows += race(Backend("filesystem", {**options, "path": f"{folder}/kv"}), args.bytes, args.rounds, other)
    for row in rows:
        versus = f"{row.ratio:.2f} of {row.reference}" if row.reference else ""
        print(f"{row.case:12} {row.backend:12} {row.bytes / 1e9:6.2f} GB  {row.gb_per_s:6.2f} GB/s  {versus}")
    result = results.build(rows, load, _COMMAND, results_file.commit())
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
