"""NIXL's agents on VRAM, descriptors prepared beforehand as vLLM's NixlConnector does.

In the block-outermost layout vLLM still names pieces layer by layer, which are never
neighbours in its lists (``pieces``); one descriptor a block is the best that could be
asked of NIXL there (``whole``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.gpu.contender import Contender, Host, Ids
from bench.gpu.memory import BLOCK_BYTES, BLOCKWISE, PIECE_BYTES, PIECES, Pool, piece_addresses

#: What a descriptor covers.
BY_PIECE, BY_BLOCK = "pieces", "whole"
_LOCAL = "NIXL_INIT_AGENT"
_LIMIT_S = 20.0


class RawNixl(Contender):
    """READ is begun and timed by D, WRITE by P: the same bytes go the same way."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-untyped,unused-ignore]

        self.agent: Any = nixl_agent("D" if host.near else "P", nixl_agent_config(backends=["UCX"]))
        spans = [
            (base, nbytes, host.gpu, "")
            for pool in host.pools.values()
            for base, nbytes in zip(pool.bases, pool.layout.region_bytes, strict=True)
        ]
        # Registering holds for as long as the agent lives.
        self._memory = "DRAM" if host.device == "cpu" else "VRAM"
        self._registered = self.agent.register_memory(spans, self._memory)
        self._prepared: dict[str, tuple[Any, Any]] = {}

    def describe(self) -> dict[str, Any]:
        """Return metadata and where the pools lie."""
        bases = {name: pool.bases for name, pool in self.host.pools.items()}
        return {"metadata": self.agent.get_agent_metadata(), "device": self.host.gpu, "bases": bases}

    def meet(self, theirs: dict[str, Any]) -> None:
        """Prepare descriptors of all blocks of both pools."""
        peer = self.agent.add_remote_agent(theirs["metadata"])
        for name, pool in self.host.pools.items():
            kinds = (BY_PIECE, BY_BLOCK) if name == BLOCKWISE else (BY_PIECE,)
            for kind in kinds:
                mine = descriptors(pool, pool.bases, self.host.gpu, kind)
                other = descriptors(pool, theirs["bases"][name], theirs["device"], kind)
                self._prepared[f"{name} {kind}"] = (
                    self.agent.prep_xfer_dlist(_LOCAL, mine, self._memory),
                    self.agent.prep_xfer_dlist(peer, other, self._memory),
                )

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`; ``way`` is ``"read pieces"``, ``"write whole"`` and so on."""
        operation, _, kind = way.partition(" ")
        mine, theirs = self._prepared[f"{layout} {kind}"]
        found = []
        for to_ids, from_ids in zip(near, far, strict=True):
            own, other = (to_ids, from_ids) if self.host.near else (from_ids, to_ids)
            start = time.perf_counter()
            rows = [indices(ids, self.host.pools[layout].blocks, kind) for ids in (own, other)]
            handle = self.agent.make_prepped_xfer(operation.upper(), mine, rows[0], theirs, rows[1])
            self._finish(handle, self.agent.transfer(handle), start)
            found.append(time.perf_counter() - start)
            handle.release()
        return found

    def _finish(self, handle: Any, state: str, start: float) -> None:
        while state == "PROC":
            # Without a pause, which suits NIXL best where cores abound.
            if time.perf_counter() - start > _LIMIT_S:
                raise TimeoutError(f"a NIXL transfer did not end within {_LIMIT_S:g} s")
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"a NIXL transfer ended in state {state}")


def descriptors(pool: Pool, bases: list[int], device: int, kind: str) -> npt.NDArray[np.uint64]:
    """Return ``uint64[n, 3]`` (address, bytes, device) of all blocks, piece by piece or whole."""
    pieces = piece_addresses(pool.layout, bases, pool.blocks)
    starts = pieces[0] if kind == BY_BLOCK else pieces.reshape(-1)
    rows = np.empty((starts.size, 3), dtype=np.uint64)
    rows[:, 0] = starts
    rows[:, 1] = BLOCK_BYTES if kind == BY_BLOCK else PIECE_BYTES
    rows[:, 2] = device
    return rows


def indices(ids: Ids, blocks: int, kind: str) -> npt.NDArray[np.int32]:
    """Return the rows of `descriptors` that ``ids`` consist of, layer by layer."""
    chosen = np.asarray(ids, dtype=np.int32)
    if kind == BY_BLOCK:
        return chosen
    layers = np.arange(PIECES, dtype=np.int32) * np.int32(blocks)
    found: npt.NDArray[np.int32] = (layers[:, None] + chosen[None, :]).reshape(-1)
    return found
