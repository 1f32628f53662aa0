"""What ``"checksum": true`` costs: the sum of blocks by itself, and a whole load with it and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from bench.conftest import Book
from bench.gpu import memory as kv
from bench.gpu.handover import CLAIM
from bench.gpu.pair import Pair
from kvconnect import sums
from kvconnect.bench import rows
from kvconnect.bench.entrants import OPTIONS
from kvconnect.bench.memory import BLOCK_BYTES, PIECE_BYTES, draw
from kvconnect.bench.near import Near
from kvconnect.bench.timing import Race, clock

BLOCKS, ROUNDS = 256, 11
#: The same 268 MB in blocks of the GPU benchmark, whose hand-over this is; of a pool that leaves gaps.
LOAD_BLOCKS = BLOCKS * BLOCK_BYTES // kv.BLOCK_BYTES
LOAD_POOL = LOAD_BLOCKS + 32
_TITLE = f"{BLOCKS * BLOCK_BYTES / 1e6:.3g} MB"


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("kind", [sums.XXH3, sums.WORDS])
def test_sum(benchmark: Any, near: Near, book: Book, rounds: Callable[[int], int], kind: str) -> None:
    nbytes = BLOCKS * BLOCK_BYTES
    rng = np.random.default_rng(BLOCKS)
    chosen = [draw(rng, BLOCKS).near for _ in range(ROUNDS)]

    def add_up(index: int) -> float:
        start = time.perf_counter()
        sums.of_blocks(near.pool.memory, [chosen[index]], kind)
        return time.perf_counter() - start

    references = {
        "memory read": lambda _: near.memory_read(nbytes),
        "memcpy": lambda _: near.memcpy(nbytes, 1, into=True),
    }
    race = Race(add_up, references, rounds(ROUNDS), seed=BLOCKS)
    race.run(benchmark)
    book.rows += rows.of_race(rows.Case(f"sum {_TITLE}", nbytes, PIECE_BYTES), kind, race)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("pipe", ["shm", "tcp"])
def test_load(benchmark: Any, book: Book, rounds: Callable[[int], int], pipe: str) -> None:
    """Through the buffers: a load of blocks whose claim P has granted, checked against itself unchecked."""
    rng = np.random.default_rng(BLOCKS)
    chosen = [kv.draw(rng, LOAD_BLOCKS, LOAD_POOL) for _ in range(ROUNDS)]
    pair = Pair(f"load {pipe}", "cpu", "cpu", LOAD_POOL)

    def load(name: str, selection: kv.Selection) -> float:
        ids = {"near": [selection.near], "far": [selection.far]}
        body = {"name": name, "way": CLAIM, "layout": kv.LAYERWISE, **ids}
        return float(pair.both("time", body, body, far_op="assist")["s"][0])

    try:
        pair.started()
        for name, checksum in (("checked", True), ("unchecked", False)):
            options = {"pipe": {"name": pipe, **OPTIONS.get(pipe, {})}, "layout": kv.LAYERWISE, "checksum": checksum}
            pair.connect(name, "hand-over", {**options, "group": f"bench-{name}-{time.time_ns()}"})
            pair.check(partial(load, name, chosen[-1]), kv.LAYERWISE, chosen[-1])
        references = {f"{pipe} unchecked": lambda index: load("unchecked", chosen[index])}
        race = Race(lambda index: load("checked", chosen[index]), references, rounds(ROUNDS), seed=BLOCKS)
        race.run(benchmark)
    finally:
        pair.kill()
    nbytes = LOAD_BLOCKS * kv.BLOCK_BYTES
    case = rows.Case(f"load {_TITLE}", nbytes, kv.PIECE_BYTES)
    book.rows += rows.of_race(case, f"{pipe} checksum", race)
