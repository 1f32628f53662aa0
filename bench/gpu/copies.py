"""Copies on the device alone: our kernel through CUDA IPC, the copy engine, a copy within one GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.gpu.contender import Contender, Host, Ids, on_stream
from bench.gpu.memory import BLOCK_BYTES, BLOCKWISE

#: What ``CudaIpcPipe`` uses by default.
FEW = 16
#: Ways: our kernel on few or on all multiprocessors; one contiguous copy from the peer; the same within this GPU.
KERNEL, WIDE_KERNEL, ENGINE, LOCAL = "few", "all", "engine", "local"
_ANY_DIRECTION = 4  # cudaMemcpyDefault


class Copies(Contender):
    """Times by CUDA events in D. P only exports its pools."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        self._mapped: dict[str, Any] = {}
        self._tables: dict[str, Any] = {}
        self._copier: Any = None
        self._stream: Any = None

    def describe(self) -> dict[str, Any]:
        """Return IPC handles of both pools."""
        from kvconnect.cuda import ipc

        return {name: ipc.export(pool.memory) for name, pool in self.host.pools.items()}

    def meet(self, theirs: dict[str, Any]) -> None:
        """Map P's pools and lay out the copies."""
        if not self.host.near:
            return
        import cupy  # type: ignore[import-not-found,unused-ignore]

        from kvconnect.cuda import ipc
        from kvconnect.cuda.copier import copier
        from kvconnect.cuda.tiles import Paged

        device = self.host.gpu
        self._copier = copier(device)
        with cupy.cuda.Device(device):
            self._stream = cupy.cuda.Stream(non_blocking=True)
        for name, pool in self.host.pools.items():
            mapped = self._mapped[name] = ipc.Mapped(theirs[name], pool.layout.region_bytes, device)
            self._tables[name] = self._copier.table(Paged(pool.layout, mapped.bases), Paged.of(pool.memory))
        self.host.settle()  # the tables are there before another stream reads them

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`; the contiguous ways copy the start of the block-outermost pool."""
        found = []
        for to_ids, from_ids in zip(near, far, strict=True):

            def enqueue(to_ids: Ids = to_ids, from_ids: Ids = from_ids) -> object:
                return self._enqueue(way, layout, to_ids, from_ids)

            found.append(on_stream(self.host.gpu, self._stream, enqueue))
        return found

    def multiprocessors(self, way: str, layout: str, near: Ids, far: Ids) -> int | None:
        """Let the kernel mark the multiprocessors that it ran on."""
        if way not in {KERNEL, WIDE_KERNEL}:
            return None
        import cupy  # type: ignore[import-not-found,unused-ignore]

        with cupy.cuda.Device(self.host.gpu):
            seen = cupy.zeros(16, cupy.uint32)
            cupy.cuda.get_current_stream().synchronize()
            kept = self._launch(way, layout, near, far, seen)
            self._stream.synchronize()
            del kept
            marks: Any = seen.get()
        return int(np.unpackbits(marks.view(np.uint8)).sum())

    def _enqueue(self, way: str, layout: str, near: Ids, far: Ids) -> object:
        if way in {KERNEL, WIDE_KERNEL}:
            return self._launch(way, layout, near, far, None)
        import cupy  # type: ignore[import-not-found,unused-ignore]

        nbytes = len(near) * BLOCK_BYTES
        target = self.host.pools[BLOCKWISE].bases[0]
        source = self._mapped[BLOCKWISE].bases[0] if way == ENGINE else target + nbytes
        with cupy.cuda.Device(self.host.gpu):
            cupy.cuda.runtime.memcpyAsync(target, source, nbytes, _ANY_DIRECTION, self._stream.ptr)
        return None

    def _launch(self, way: str, layout: str, near: Ids, far: Ids, seen: Any) -> object:
        from kvconnect.cuda.copier import Part

        most = FEW if way == KERNEL else self._copier.multiprocessors
        kept: object = self._copier.launch(self._tables[layout], Part(0, far, near), self._stream, most, seen)
        return kept
