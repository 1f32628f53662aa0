"""The cases: tensors of 4 KiB to 256 MiB, half a ping-pong, and paged blocks, each beside its ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kvconnect.bench import rows
from kvconnect.bench.entrants import label
from kvconnect.bench.memory import BLOCK_BYTES, PIECE_BYTES, Selection, draw
from kvconnect.bench.near import REFERENCES, Near
from kvconnect.bench.rows import Row
from kvconnect.bench.timing import CASE, Race, Sample
from kvconnect.config import Backend

KIB, MIB = 1 << 10, 1 << 20
#: Bytes of a tensor → rounds.
SIZES = {4 * KIB: 25, 64 * KIB: 25, MIB: 25, 16 * MIB: 25, 64 * MIB: 15, 256 * MIB: 9}
#: A sample sends as many tensors in a row as make up this, and at most `MOST`.
SAMPLE_BYTES = 32 * MIB
MOST = 256
PING_PONG_BYTES = 4 * KIB
PING_PONGS = 200
#: Blocks → rounds: 16.8 MB and 268 MB. 32 layers, one 32 KiB piece in each for a block, random ids on both sides.
COUNTS = {16: 31, 256: 11}

#: Returns how many rounds to run, given how many a case wants.
RoundsOf = Callable[[int], int]
References = Mapping[str, Sample]
_NONE: References = {}


@dataclass(frozen=True)
class Setting:
    """What a case is run with.

    Args:
        near: the two processes.
        backend: the pipe that is measured.
        benchmark: pytest-benchmark's fixture, or `kvconnect.bench.timing.Rounds`.
        rounds: how many rounds to run, given how many a case wants.

    """

    near: Near
    backend: Backend
    benchmark: Any
    rounds: RoundsOf = int

    def open(self) -> str:
        """Open the pipe, if it is not open yet; return the key of its ends."""
        return self.near.end(self.backend.name, self.backend.options)


Case = Callable[[Setting], list[Row]]


def every() -> Iterator[tuple[str, Case]]:
    """Yield each case by the name that its rows have."""
    for nbytes in SIZES:
        for into in (False, True):
            yield tensor_name(nbytes, into=into), partial(tensor, nbytes=nbytes, into=into)
    yield PING_PONG, ping_pong
    for count in COUNTS:
        for op in ("read", "write"):
            yield blocks_case(count, op).name, partial(blocks, count=count, op=op)


# -- tensors ------------------------------------------------------------------


def size_title(nbytes: int) -> str:
    """Write a tensor's size."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def tensor_name(nbytes: int, *, into: bool) -> str:
    """Return a case's name."""
    return f"tensor {size_title(nbytes)}, {'recv_tensor_into' if into else 'recv_tensor'}"


def tensors_in_a_row(nbytes: int) -> int:
    """Return how many tensors one sample sends."""
    return max(1, min(MOST, SAMPLE_BYTES // nbytes))


def tensor(setting: Setting, nbytes: int, *, into: bool, more: References = _NONE) -> list[Row]:
    """Send tensors through the public methods; ``more`` are references besides memcpy, sockets and gloo."""
    near, count, key = setting.near, tensors_in_a_row(nbytes), setting.open()
    near.check_tensor(key, nbytes, into=into)
    references: dict[str, Sample] = {"memcpy": lambda _: near.memcpy(nbytes, count, into=into)}
    for name in REFERENCES:
        end = near.end(name)
        near.check_tensor(end, nbytes, into=into)
        references[name] = partial(_tensors, near, end, nbytes, count, into=into)
    own = partial(_tensors, near, key, nbytes, count, into=into)
    race = Race(own, {**references, **more}, setting.rounds(SIZES[nbytes]), seed=nbytes)
    race.run(setting.benchmark)
    return rows.of_race(rows.Case(tensor_name(nbytes, into=into), nbytes, nbytes), label(setting.backend), race)


def _tensors(near: Near, end: str, nbytes: int, count: int, _round: int, *, into: bool) -> float:
    return near.tensors(end, nbytes, count, into=into)


PING_PONG = "ping-pong, half, 4 KiB"


def ping_pong(setting: Setting) -> list[Row]:
    """Send a small tensor there and back, the receivers blocked."""
    near = setting.near
    keys = {CASE: setting.open()} | {name: near.end(name) for name in REFERENCES}
    halves: dict[str, list[float]] = {name: [] for name in keys}
    near.check_echo(keys[CASE], PING_PONG_BYTES)

    def sample(name: str, _round: int) -> float:
        got = near.ping_pong(keys[name], PING_PONG_BYTES, PING_PONGS)
        halves[name] += got
        return float(np.median(got))

    race = Race(partial(sample, CASE), {name: partial(sample, name) for name in REFERENCES}, setting.rounds(25))
    race.run(setting.benchmark)
    # The first batch of everyone is the race's warm-up.
    halves = {name: values[PING_PONGS:] for name, values in halves.items()}
    return rows.of_ping_pong(
        rows.Case(PING_PONG, PING_PONG_BYTES, PING_PONG_BYTES), label(setting.backend), halves, race
    )


# -- paged blocks -------------------------------------------------------------


def blocks_title(count: int) -> str:
    """Write how much ``count`` blocks are."""
    return f"{count * BLOCK_BYTES / 1e6:.3g} MB"


def blocks_case(count: int, op: str) -> rows.Case:
    """Return what is moved."""
    return rows.Case(f"blocks {blocks_title(count)}, {op}", count * BLOCK_BYTES, PIECE_BYTES, is_blocks=True)


def selections(count: int) -> list[Selection]:
    """Return the blocks of each round, the same for everyone in it."""
    rng = np.random.default_rng(count)
    return [draw(rng, count) for _ in range(COUNTS[count])]


def blocks(setting: Setting, count: int, op: str, more: References = _NONE) -> list[Row]:
    """Read or write scattered blocks; ``more`` are references besides memcpy, sockets and gloo."""
    near, key, chosen = setting.near, setting.open(), selections(count)
    pipe = near.attached(key)
    near.check_blocks(pipe, op, chosen[-1])
    nbytes = count * BLOCK_BYTES
    references: dict[str, Sample] = {"memcpy": lambda _: near.memcpy(nbytes, 1, into=True)}
    for name in REFERENCES:
        references[name] = partial(_tensors, near, near.end(name), nbytes, 1, into=True)
    rounds = setting.rounds(COUNTS[count])
    race = Race(lambda i: near.blocks(pipe, op, chosen[i]), {**references, **more}, rounds, seed=count)
    race.run(setting.benchmark)
    # The pipe's tensor path may belong to its block path now.
    near.release(key)
    return rows.of_race(blocks_case(count, op), label(setting.backend), race)
