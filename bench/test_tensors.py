"""Tensors of 4 KiB to 256 MiB through the public methods, and half a ping-pong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from bench.conftest import Book
from bench.nixl import INITIATORS, Nixl
from kvconnect.bench import cases
from kvconnect.bench.memory import draw
from kvconnect.bench.near import Near
from kvconnect.bench.timing import Sample, clock
from kvconnect.config import Backend

#: Share of a core that a receiver which waits may use: it is blocked, it does not spin.
IDLE_SHARE = 0.05


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("into", [False, True], ids=["recv_tensor", "recv_tensor_into"])
@pytest.mark.parametrize("nbytes", cases.SIZES, ids=cases.size_title)
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
    more = _nixl(nixl, nbytes, cases.tensors_in_a_row(nbytes)) if nixl is not None and into else {}
    book.rows += cases.tensor(cases.Setting(near, backend, benchmark, rounds), nbytes, into=into, more=more)


def _nixl(nixl: Nixl, nbytes: int, count: int) -> dict[str, Sample]:
    """NIXL moving one contiguous descriptor of ``nbytes``, in both directions."""
    found: dict[str, Sample] = {}
    for name in INITIATORS:
        nixl.check(name, draw(np.random.default_rng(nbytes), 4), nbytes)
        for op in ("read", "write"):
            found[f"{name}-{op}"] = partial(_contiguous, nixl, name, op, nbytes, count)
    return found


def _contiguous(nixl: Nixl, name: str, op: str, nbytes: int, count: int, _round: int) -> float:
    return nixl.contiguous(name, op, nbytes, count)


@pytest.mark.benchmark(timer=clock)
def test_ping_pong(benchmark: Any, near: Near, book: Book, rounds: Callable[[int], int], backend: Backend) -> None:
    key = near.end(backend.name, backend.options)
    near.check_echo(key, cases.PING_PONG_BYTES)
    share = near.idle_cpu(key, cases.PING_PONG_BYTES)
    assert share < IDLE_SHARE, f"a receiver that waits uses {share:.0%} of a core: it spins"
    book.rows += cases.ping_pong(cases.Setting(near, backend, benchmark, rounds))
