"""A producer without a model in a process and on a GPU of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from kvconnect import registry
from tests.buffers.engines import Engine, group, layout

#: Blocks of 2 MiB in pieces of 64 KiB; a load has half of them.
SHAPE = layout(256, 64 << 10, 32)
BLOCKS = tuple(range(128))
LOADS = 6
LIMITS = {"connect_timeout_s": 20.0, "transfer_timeout_s": 40.0, "lease_s": 60.0}


def having(names: Sequence[str]) -> None:
    """Have only these pipes registered."""
    real = registry.pipes()
    registry.pipes = lambda: {name: real[name] for name in names if name in real}  # type: ignore[assignment]


@contextmanager
def producing(names: Sequence[str], device: str) -> Iterator[tuple[str, list[Any]]]:
    """Start a producer that has only the pipes of ``names``; yield its group and a ticket for each of its offers."""
    spawn, name = multiprocessing.get_context("spawn"), group()
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_produce, args=(theirs, name, names, device), daemon=True)
    process.start()
    try:
        assert ours.poll(60), "the producer did not start"
        yield name, ours.recv()
    finally:
        ours.send("over")
        process.join(20)
        process.kill()


def _produce(connection: Connection, name: str, names: Sequence[str], device: str) -> None:
    having(names)
    with closing(Engine("P", produces=True, device=device, pipe="auto", group=name, shape=SHAPE, **LIMITS)) as p:
        connection.send([p.offer(number, (BLOCKS,)) for number in range(LOADS)])
        connection.recv()
