"""Gather and scatter between paged memory and contiguous buffers of one device, for pipes that stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvconnect.cuda import driver
from kvconnect.cuda.copier import Part, Table, copier
from kvconnect.paging import BlockIds, PagedMemory

#: Enough to be several times faster than any wire, within one device.
_MULTIPROCESSORS = 32


class CudaStager:
    """Copies within one CUDA device, on a stream of their own. Thread-safe.

    What gathers and scatters only enqueues, and returns what looks whether the device has
    done it: to be told takes an interrupt, which is slower than most of these copies.
    """

    def __init__(self, device: str) -> None:
        self._device, self._index = torch.device(device), driver.index(device)
        self._copier = copier(self._index)
        self._lock = threading.Lock()
        self._stream: Any = None

    def allocate(self, nbytes: int) -> Tensor:
        """Return new memory on the device, uint8 ``[nbytes]``."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def gather(self, memory: PagedMemory, blocks: BlockIds, out: Tensor) -> Callable[[], bool]:
        """Begin to copy the canonical stream of ``blocks`` into ``out``, uint8 of that size."""
        parts = [
            Part(group, ids, range(len(ids)), to_shift=start) for group, ids, start in _places(memory, blocks, out)
        ]
        return self._enqueue(self._copier.packing(memory), parts)

    def scatter(self, src: Tensor, memory: PagedMemory, blocks: BlockIds) -> Callable[[], bool]:
        """Begin to copy the canonical stream ``src`` into ``blocks``."""
        parts = [
            Part(group, range(len(ids)), ids, from_shift=start) for group, ids, start in _places(memory, blocks, src)
        ]
        return self._enqueue(self._copier.packing(memory, back=True), parts)

    def copy(self, src: Tensor, out: Tensor) -> None:
        """Copy ``src`` to ``out``, uint8 of one size, ordered after the caller's current stream; return when done."""
        with torch.cuda.device(self._device):
            out.copy_(src, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            event.synchronize()

    def _enqueue(self, table: Table, parts: Sequence[Part]) -> Callable[[], bool]:
        with self._lock, driver.errors("gather or scatter blocks"), driver.use(self._index):
            cuda = driver.cupy().cuda
            if self._stream is None:
                self._stream = cuda.Stream(non_blocking=True, priority=-1)
            try:
                kept = [self._copier.launch(table, part, self._stream, _MULTIPROCESSORS) for part in parts]
            except BaseException:
                self._stream.synchronize()  # what was enqueued before it is not in the way of whoever gives up
                raise
            event = cuda.Event(disable_timing=True)
            event.record(self._stream)

        def is_over() -> bool:
            with driver.errors("gather or scatter blocks"):
                over: bool = event.done
            if over:
                kept.clear()
            return over

        return is_over


def _places(memory: PagedMemory, blocks: BlockIds, packed: Tensor) -> Iterator[tuple[int, Sequence[int], int]]:
    """Return each group, its ids, and where its part of the canonical stream begins in ``packed``."""
    start = packed.data_ptr()
    for group, ids in enumerate(blocks):
        yield group, ids, start
        start += memory.layout.nbytes([*[()] * group, ids])
