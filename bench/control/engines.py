"""Engines without a model or a vLLM: a scheduler's and its workers' ends of ``remote``, as a connector opens them."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvconnect.buffers.base import Claim, EndSettings, LookupKey, Want
from kvconnect.buffers.remote import RemoteBuffer
from kvconnect.config import Backend, Config
from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory
from kvconnect.pipes.base import Transfer

_PIECE_BYTES, _BLOCKS = 256, 16
_LIMIT_S = 120.0
_NAMESPACE = "f" * 32
_numbers = itertools.count()


@dataclass(frozen=True)
class Shape:
    """A model, as far as engines tell each other of it."""

    layers: int = 32
    workers: int = 1

    def layout(self) -> PagedLayout:
        """Return each worker's: a region for each layer, and names as long as real ones."""
        layers = tuple(
            LayerLayout(f"model.layers.{i}.self_attn.attn", 0, i, 0, _PIECE_BYTES, _BLOCKS, _PIECE_BYTES, (), "NHD")
            for i in range(self.layers)
        )
        return PagedLayout(layers, (_BLOCKS * _PIECE_BYTES,) * self.layers)


def settings(name: str, role: str, shape: Shape, port: int = 0) -> EndSettings:
    """Return what both ends of an engine are opened with."""
    config = Config(
        content_lookup=False,
        port=port,
        group=f"control-{os.getpid()}",
        connect_timeout_s=30.0,
        lookup_timeout_s=30.0,
        release_timeout_s=30.0,
    )
    fingerprint = {f"field_{i}": "a value that must agree" for i in range(16)}
    return EndSettings(name, fingerprint, shape.workers, role == "P", role == "D", config, Backend("tcp"))


def prompt() -> LookupKey:
    """Return a prompt that nobody has had."""
    return LookupKey(_NAMESPACE, next(_numbers).to_bytes(12, "big") + os.getpid().to_bytes(4, "big"), 512)


@dataclass(frozen=True)
class Loaded:
    """How a load went: seconds until its claim was answered, and until its bytes were there; ``""``, or why not."""

    found_s: float
    loaded_s: float
    failure: str = ""


class Engine:
    """One of either role (``P``, ``D``)."""

    def __init__(self, role: str, shape: Shape, port: int = 0) -> None:
        mine = settings(f"{role}-{os.getpid()}-{next(_numbers)}", role, shape, port)
        layout = shape.layout()
        self.end = RemoteBuffer.scheduler_end(mine)
        self.workers = []
        for rank in range(shape.workers):
            regions = [torch.zeros(size, dtype=torch.uint8) for size in layout.region_bytes]
            memory = PagedMemory(layout, [region.data_ptr() for region in regions], "cpu", regions)
            self.workers.append(RemoteBuffer.worker_end(mine, rank, memory))
        self.end.introduce([worker.describe() for worker in self.workers])

    def offer(self) -> tuple[LookupKey, Mapping[str, Any]]:
        """Lend a block, and return what it holds and the ticket."""
        key = prompt()
        return key, self.end.offer(key, ((1,),), label=None, asked=True)

    def close(self) -> None:
        """End everything."""
        for worker in self.workers:
            worker.close()
        self.end.close()


def load(wanted: Sequence[tuple[Engine, tuple[LookupKey, Mapping[str, Any]]]]) -> list[Loaded]:
    """Have engines load what tickets name, all at once."""
    begun, pause = time.monotonic(), threading.Event()
    loads = [_Load(engine, f"r{next(_numbers)}", key, ticket) for engine, (key, ticket) in wanted]
    waiting = list(loads)
    while waiting and time.monotonic() < begun + _LIMIT_S:
        waiting = [one for one in waiting if not one.step(begun)]
        pause.wait(0.001)
    return [one.outcome for one in loads]


class _Load:
    """One request at a consumer."""

    def __init__(self, engine: Engine, name: str, key: LookupKey, ticket: Mapping[str, Any]) -> None:
        self._engine, self._name = engine, name
        self.outcome = Loaded(0.0, 0.0, "never answered")
        self._reads: list[Transfer] = []
        self._found_s = 0.0
        engine.end.look(name, Want(key, ticket=ticket))

    def step(self, begun: float) -> bool:
        """Go on; say whether it is over."""
        if not self._reads:
            answer = self._engine.end.found(self._name)
            if answer is None:
                return False
            self._found_s = time.monotonic() - begun
            answer = self._engine.end.commit(self._name)
            if not isinstance(answer, Claim):
                self.outcome = Loaded(self._found_s, 0.0, answer.cause)
                return True
            self._reads = [
                worker.read(answer, answer.blocks, ((2,),), lambda _: None) for worker in self._engine.workers
            ]
        if not all(read.done for read in self._reads):
            return False
        self._engine.end.settle(self._name)
        errors = [type(read.error).__name__ for read in self._reads if read.error is not None]
        self.outcome = Loaded(self._found_s, time.monotonic() - begun, next(iter(errors), ""))
        return True
