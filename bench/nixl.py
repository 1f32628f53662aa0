"""NIXL/UCX as a reference: agents in processes of their own, frozen while others are measured.

With its progress thread, as vLLM's NixlConnector makes it, an idle UCX agent
keeps a core busy; on a small machine it would take half of it from everybody else.
Two initiators share one target:

- ``nixl``: the default agent on both sides.
- ``nixl-tuned``: the initiator has no progress thread and polls itself, which is
  faster where cores are few.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvconnect.bench.link import Link
from kvconnect.bench.memory import LARGEST_BYTES, LAYERS, PIECE_BYTES, POOL_BLOCKS, Pool, Selection, digest, fill
from kvconnect.bench.process import Process, serve

SPIN_S = 200e-6
PAUSE_S = 100e-6
WITH, WITHOUT = "with a progress thread", "without"
INITIATORS = {"nixl": WITH, "nixl-tuned": WITHOUT}


class Agent:
    """One NIXL agent with a pool of blocks and one contiguous range, both registered."""

    def __init__(self, name: str, *, progress_thread: bool) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-untyped]

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=progress_thread))
        self.progress_thread = progress_thread
        self.pool = Pool()
        # Of torch, as everybody's: numpy would ask for huge pages, which halve the cost of a copy.
        self.whole = torch.zeros(LARGEST_BYTES, dtype=torch.uint8)
        spans = [(t.data_ptr(), t.numel()) for t in (*self.pool.tensors, self.whole)]
        # Registering holds for as long as the agent lives.
        self._registered = self.agent.register_memory([(a, n, 0, "") for a, n in spans], "DRAM")
        self.prepared: dict[str, tuple[Any, Any]] = {}

    def describe(self) -> dict[str, Any]:
        """Return what an initiator needs to reach this agent."""
        return {
            "metadata": self.agent.get_agent_metadata(),
            "layers": [t.data_ptr() for t in self.pool.tensors],
            "whole": self.whole.data_ptr(),
        }

    def learn(self, metadata: bytes) -> dict[str, Any]:
        """Let an initiator reach this agent."""
        self.agent.add_remote_agent(metadata)
        return {}

    def meet(self, metadata: bytes, layers: list[int], whole: int) -> dict[str, Any]:
        """Prepare descriptors of every piece of both pools, as vLLM does."""
        self._theirs = self.agent.add_remote_agent(metadata)
        mine = self.describe()
        self.prepared["pieces"] = self._prepare(_pieces(mine["layers"]), _pieces(layers))
        self._spans = (mine["whole"], whole)
        return {}

    def pieces(self, direction: str, near: list[int], far: list[int]) -> dict[str, Any]:
        """Move blocks; return the seconds from the ids to done."""
        start = time.perf_counter()
        self._move(direction, "pieces", _indices(near), _indices(far), 1)
        return {"s": time.perf_counter() - start}

    def contiguous(self, direction: str, nbytes: int, count: int) -> dict[str, Any]:
        """Move one contiguous range ``count`` times, all under way at once; return seconds each."""
        key = f"whole {nbytes}"
        if key not in self.prepared:
            self.prepared[key] = self._prepare(*(_rows(np.array([at]), nbytes) for at in self._spans))
        zero = np.zeros(1, dtype=np.int32)
        start = time.perf_counter()
        self._move(direction, key, zero, zero, count)
        return {"s": (time.perf_counter() - start) / count}

    def fill(self, seed: int) -> dict[str, Any]:
        """Fill the pool and the contiguous range with random bytes."""
        self.pool.fill(seed)
        fill(self.whole, np.random.default_rng(seed))
        return {}

    def flip(self, ids: list[int], nbytes: int) -> dict[str, Any]:
        """Invert the blocks ``ids`` and the start of the contiguous range: nothing equals the other side now."""
        self.pool.flip(ids)
        self.whole[:nbytes].bitwise_not_()
        return {}

    def digests(self, ids: list[int], nbytes: int) -> dict[str, Any]:
        """Hash the blocks ``ids`` and the start of the contiguous range."""
        return {"blocks": self.pool.digest(ids), "whole": digest(self.whole[:nbytes])}

    def _prepare(self, mine: npt.NDArray[np.uint64], theirs: npt.NDArray[np.uint64]) -> tuple[Any, Any]:
        return (
            self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", mine, "DRAM"),
            self.agent.prep_xfer_dlist(self._theirs, theirs, "DRAM"),
        )

    def _move(
        self, direction: str, key: str, near: npt.NDArray[np.int32], far: npt.NDArray[np.int32], count: int
    ) -> None:
        mine, theirs = self.prepared[key]
        handles = [self.agent.make_prepped_xfer(direction.upper(), mine, near, theirs, far) for _ in range(count)]
        states = [self.agent.transfer(handle) for handle in handles]
        for handle, state in zip(handles, states, strict=True):
            self._finish(handle, state)

    def _finish(self, handle: Any, state: str) -> None:
        begun = time.perf_counter()
        while state == "PROC":
            # With a progress thread, polling without a pause takes the core that this thread needs.
            if self.progress_thread and time.perf_counter() - begun > SPIN_S:
                time.sleep(PAUSE_S)
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL transfer ended in state {state}")
        handle.release()


def _pieces(layers: list[int]) -> npt.NDArray[np.uint64]:
    blocks = np.arange(POOL_BLOCKS, dtype=np.uint64) * np.uint64(PIECE_BYTES)
    return _rows(np.concatenate([np.uint64(base) + blocks for base in layers]), PIECE_BYTES)


def _rows(addresses: npt.NDArray[Any], nbytes: int) -> npt.NDArray[np.uint64]:
    rows = np.zeros((addresses.size, 3), dtype=np.uint64)
    rows[:, 0] = addresses
    rows[:, 1] = nbytes
    return rows


def _indices(ids: list[int]) -> npt.NDArray[np.int32]:
    layers = np.arange(LAYERS, dtype=np.int32) * POOL_BLOCKS
    return (layers[:, None] + np.asarray(ids, dtype=np.int32)[None, :]).reshape(-1)


def main(connection: Connection, name: str, progress: str) -> None:
    """Run one agent."""
    agent = Agent(name, progress_thread=progress == WITH)
    names = ("describe", "learn", "meet", "pieces", "contiguous", "fill", "flip", "digests")
    serve(Link(connection), {op: getattr(agent, op) for op in names})


class Nixl:
    """The target and both initiators, from this process."""

    def __init__(self) -> None:
        self._target = Process(main, "target", WITH, name="bench-nixl-target")
        self._initiators = {
            name: Process(main, name, progress, name=f"bench-{name}") for name, progress in INITIATORS.items()
        }
        self._checked: set[tuple[str, int]] = set()
        there = self._target.link.ask("describe")
        for process in self._initiators.values():
            self._target.link.ask("learn", metadata=process.link.ask("describe")["metadata"])
            process.link.ask("meet", **there)
        for seed, process in enumerate((self._target, *self._initiators.values())):
            process.link.ask("fill", seed=seed)
        for process in (self._target, *self._initiators.values()):
            process.stop()

    def pieces(self, name: str, op: str, chosen: Selection) -> float:
        """Move the chosen blocks; return seconds."""
        return self._sample(name, "pieces", direction=op, near=chosen.near, far=chosen.far)

    def contiguous(self, name: str, op: str, nbytes: int, count: int) -> float:
        """Move a contiguous range; return seconds each."""
        return self._sample(name, "contiguous", direction=op, nbytes=nbytes, count=count)

    def check(self, name: str, chosen: Selection, nbytes: int) -> None:
        """Read, then write, and compare the bytes of both sides; once for each size."""
        if (name, nbytes) in self._checked:
            return
        self._checked.add((name, nbytes))
        initiator = self._initiators[name].link
        for op in ("read", "write"):
            with self._awake(name):
                initiator.ask("flip", ids=chosen.near, nbytes=nbytes)
            self.pieces(name, op, chosen)
            self.contiguous(name, op, nbytes, 1)
            with self._awake(name):
                near = initiator.ask("digests", ids=chosen.near, nbytes=nbytes)
                far = self._target.link.ask("digests", ids=chosen.far, nbytes=nbytes)
            if near != far:
                raise RuntimeError(f"{name} {op}: wrong bytes")

    def kill(self) -> None:
        """End all three processes."""
        for process in (self._target, *self._initiators.values()):
            process.kill()

    def _sample(self, name: str, command: str, **body: Any) -> float:
        with self._awake(name):
            return float(self._initiators[name].link.ask(command, **body)["s"])

    @contextmanager
    def _awake(self, name: str) -> Iterator[None]:
        for process in (self._target, self._initiators[name]):
            process.resume()
        try:
            yield
        finally:
            for process in (self._target, self._initiators[name]):
                process.stop()
