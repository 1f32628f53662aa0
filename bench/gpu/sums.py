"""Sums of blocks, which a load with ``"checksum": true`` builds on both sides: what one of them costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.contender import Contender, Host, Ids, on_stream
from kvconnect import sums
from kvconnect.paging import PagedMemory

#: Ways: from the ids to the sum, by the host's clock, as buffers have it; the kernel, by the device's.
CALL, KERNEL = "call", "kernel"
_CHECKED = (1, 0)


class Sums(Contender):
    """Adds up blocks of D's own pools. Nothing moves."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        self._stream: Any = None

    def meet(self, theirs: dict[str, Any]) -> None:
        """Check both pools' sums against those of their bytes in host memory."""
        for name, pool in self.host.pools.items() if self.host.near else ():
            if sums.of_blocks(pool.memory, (_CHECKED,), sums.WORDS) != sums.mixed(pool.stream(_CHECKED), 0):
                raise RuntimeError(f"the sum of blocks of the pool {name!r} is not that of their bytes")

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`."""
        sample = self._kernel if way == KERNEL else _call
        return [sample(self.host.pools[layout].memory, ids) for ids in near]

    def _kernel(self, memory: PagedMemory, ids: Ids) -> float:
        import cupy  # type: ignore[import-not-found,unused-ignore]

        from kvconnect.cuda.sums import summer

        gpu = self.host.gpu
        with cupy.cuda.Device(gpu):
            self._stream = self._stream or cupy.cuda.Stream(non_blocking=True)
            return on_stream(gpu, self._stream, lambda: summer(gpu).launch(memory, (ids,), self._stream))


def _call(memory: PagedMemory, ids: Ids) -> float:
    start = time.perf_counter()
    sums.of_blocks(memory, (ids,), sums.WORDS)
    return time.perf_counter() - start
