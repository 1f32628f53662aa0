"""Mooncake's transfer engine over ``nvlink_intra``, from its wheel."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bench.gpu.contender import Contender, Host, Ids, piece_bytes
from bench.gpu.memory import BLOCKWISE, piece_addresses

_HOST = "127.0.0.1"


class Mooncake(Contender):
    """READ is begun and timed by D, WRITE by P. In the block-outermost layout each block is one piece."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        # Read by the engine when it starts: releases before and after 0.3.14 choose the transport by it.
        os.environ["MC_INTRANODE_NVLINK"] = "1"
        from mooncake import engine  # type: ignore[import-not-found,unused-ignore]

        if not getattr(engine, "SUPPORT_INTRA_NVLINK", True):
            raise RuntimeError("this build of Mooncake has no nvlink_intra")
        torch.cuda.set_device(host.gpu)
        self.engine: Any = engine.TransferEngine()
        if self.engine.initialize(_HOST, "P2PHANDSHAKE", "nvlink_intra", "") != 0:
            raise RuntimeError("Mooncake's engine does not start with protocol nvlink_intra")
        for pool in host.pools.values():
            for base, nbytes in zip(pool.bases, pool.layout.region_bytes, strict=True):
                if self.engine.register_memory(base, nbytes) != 0:
                    raise RuntimeError("Mooncake cannot register the pool")
        self._peer = ""
        self._pieces: dict[str, tuple[Any, Any]] = {}

    def describe(self) -> dict[str, Any]:
        """Return the session's name and where the pools lie."""
        bases = {name: pool.bases for name, pool in self.host.pools.items()}
        return {"session": f"{_HOST}:{self.engine.get_rpc_port()}", "bases": bases}

    def meet(self, theirs: dict[str, Any]) -> None:
        """Look up where each piece lies, on both sides."""
        self._peer = theirs["session"]
        for name, pool in self.host.pools.items():
            both = [piece_addresses(pool.layout, bases, pool.blocks) for bases in (pool.bases, theirs["bases"][name])]
            if name == BLOCKWISE:
                both = [addresses[:1] for addresses in both]
            self._pieces[name] = (both[0], both[1])

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`."""
        mine, theirs = self._pieces[layout]
        found = []
        for to_ids, from_ids in zip(near, far, strict=True):
            own, other = (to_ids, from_ids) if self.host.near else (from_ids, to_ids)
            start = time.perf_counter()
            local, remote = mine[:, own].reshape(-1), theirs[:, other].reshape(-1)
            code = self._move(way, local, remote, np.full(local.size, piece_bytes(layout), dtype=np.int64))
            # Its copies are ordered on a stream of its own; whether it waits for them is its affair, not ours.
            self.host.settle()
            found.append(time.perf_counter() - start)
            if code != 0:
                raise RuntimeError(f"a Mooncake transfer ended with {code}")
        return found

    def _move(self, way: str, local: Any, remote: Any, lengths: Any) -> int:
        by_array = getattr(self.engine, f"batch_transfer_sync_{way}_arrays", None)
        if by_array is not None:
            return int(by_array(self._peer, local, remote, lengths))
        by_list = getattr(self.engine, f"batch_transfer_sync_{way}")
        return int(by_list(self._peer, local.tolist(), remote.tolist(), lengths.tolist()))
