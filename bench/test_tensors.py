"""Tensors of 4 KiB to 256 MiB through the public methods, and half a ping-pong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from bench import rows
from bench.conftest import Book, label
from bench.memory import draw
from bench.near import REFERENCES, Near
from bench.nixl import INITIATORS, Nixl
from bench.timing import CASE, Race, clock
from kvconnect.config import Backend

KIB, MIB = 1 << 10, 1 << 20
#: Bytes → rounds.
SIZES = {4 * KIB: 25, 64 * KIB: 25, MIB: 25, 16 * MIB: 25, 64 * MIB: 15, 256 * MIB: 9}
#: A sample sends as many tensors in a row as make up this, and at most `MOST`.
SAMPLE_BYTES = 32 * MIB
MOST = 256
PING_PONG_BYTES = 4 * KIB
PING_PONGS = 200
#: Share of a core that a receiver which waits may use: it is blocked, it does not spin.
IDLE_SHARE = 0.05


def _title(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("into", [False, True], ids=["recv_tensor", "recv_tensor_into"])
@pytest.mark.parametrize("nbytes", SIZES, ids=_title)
def test_tensor(
    benchmark: Any,
    near: Near,
    nixl: Nixl | None,
    book: Book,
    rounds: Callable[[int], int],
    backend: Backend,
    nbytes: int,
    into: bool,
) -> None:
    count = max(1, min(MOST, SAMPLE_BYTES // nbytes))
    key = near.end(backend.name, backend.options)
    near.check_tensor(key, nbytes, into=into)
    references: dict[str, Callable[[int], float]] = {"memcpy": lambda _: near.memcpy(nbytes, count, into=into)}
    for name in REFERENCES:
        end = near.end(name)
        near.check_tensor(end, nbytes, into=into)
        references[name] = partial(_tensors, near, end, nbytes, count, into)
    if nixl is not None and into:
        references |= _nixl(nixl, nbytes, count)
    race = Race(lambda _: near.tensors(key, nbytes, count, into=into), references, rounds(SIZES[nbytes]), seed=nbytes)
    race.run(benchmark)
    method = "recv_tensor_into" if into else "recv_tensor"
    case = rows.Case(f"tensor {_title(nbytes)}, {method}", nbytes, nbytes)
    book.rows += rows.of_race(case, label(backend), race)


def _tensors(near: Near, end: str, nbytes: int, count: int, into: bool, _round: int) -> float:
    return near.tensors(end, nbytes, count, into=into)


def _nixl(nixl: Nixl, nbytes: int, count: int) -> dict[str, Callable[[int], float]]:
    """NIXL moving one contiguous descriptor of ``nbytes``, in both directions."""
    found: dict[str, Callable[[int], float]] = {}
    for name in INITIATORS:
        nixl.check(name, draw(np.random.default_rng(nbytes), 4), nbytes)
        for op in ("read", "write"):
            found[f"{name}-{op}"] = partial(_contiguous, nixl, name, op, nbytes, count)
    return found


def _contiguous(nixl: Nixl, name: str, op: str, nbytes: int, count: int, _round: int) -> float:
    return nixl.contiguous(name, op, nbytes, count)


@pytest.mark.benchmark(timer=clock)
def test_ping_pong(benchmark: Any, near: Near, book: Book, rounds: Callable[[int], int], backend: Backend) -> None:
    keys = {CASE: near.end(backend.name, backend.options)} | {name: near.end(name) for name in REFERENCES}
    halves: dict[str, list[float]] = {name: [] for name in keys}
    near.check_echo(keys[CASE], PING_PONG_BYTES)
    share = near.idle_cpu(keys[CASE], PING_PONG_BYTES)
    assert share < IDLE_SHARE, f"a receiver that waits uses {share:.0%} of a core: it spins"

    def sample(name: str, _round: int) -> float:
        got = near.ping_pong(keys[name], PING_PONG_BYTES, PING_PONGS)
        halves[name] += got
        return float(np.median(got))

    references = {name: partial(sample, name) for name in REFERENCES}
    race = Race(partial(sample, CASE), references, rounds(25))
    race.run(benchmark)
    # The first batch of everyone is the race's warm-up.
    halves = {name: values[PING_PONGS:] for name, values in halves.items()}
    case = rows.Case("ping-pong, half, 4 KiB", PING_PONG_BYTES, PING_PONG_BYTES)
    book.rows += rows.of_ping_pong(case, label(backend), halves, race)
