"""Sums of blocks in a GPU's memory, by one kernel that reads each byte once: see `kvconnect.sums`."""

from __future__ import annotations

import threading
import weakref
from importlib import resources
from typing import Any

import numpy as np

from kvconnect.cuda import driver
from kvconnect.cuda.copier import Table, copier
from kvconnect.cuda.tiles import ALIGNMENT, Packed, Paged
from kvconnect.paging import BlockIds, PagedMemory

#: Leaves most of the device to what computes, and is still faster than any wire.
_MULTIPROCESSORS = 32
_CTAS_PER_SM = 2
_THREADS = 512


class Summer:
    """Adds up blocks of one device, on a stream of its own. Thread-safe."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._tables: weakref.WeakKeyDictionary[PagedMemory, Table] = weakref.WeakKeyDictionary()
        cupy = driver.cupy()
        with driver.errors("prepare the sum kernel"), driver.use(device):
            source = resources.files("kvconnect.cuda").joinpath("sum.cu").read_text(encoding="utf-8")
            module = cupy.RawModule(code=source, options=("--std=c++17",), backend="nvrtc")
            self._kernel = module.get_function("add_up")
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def of_blocks(self, memory: PagedMemory, blocks: BlockIds) -> int | None:
        """Return the sum of the canonical stream of ``blocks``; ``None`` if it is not aligned for the kernel.

        The blocks are read when this is called: whoever wrote them has waited for the device.

        Raises:
            BrokenError: CUDA failed.

        """
        table = self._table(memory)
        starts = [memory.layout.nbytes(blocks[:group]) for group in range(len(blocks))]
        named = [group for group, ids in enumerate(blocks) if len(ids)]
        if any(starts[group] % ALIGNMENT or not table.aligned[group] for group in named):
            return None
        cupy, kept = driver.cupy(), []
        with driver.errors("sum blocks up"), driver.use(self._device), self._stream as stream:
            total = cupy.zeros(1, dtype=np.uint64)
            for group in named:
                ids = blocks[group]
                tiles = table.on_device[group]
                pairs = cupy.asarray(np.stack([ids, np.arange(len(ids))], axis=1).astype(np.int32))
                grid = (max(1, min(_MULTIPROCESSORS * _CTAS_PER_SM, len(tiles) * len(ids))),)
                place = np.uint64(starts[group])
                args = (tiles, pairs, place, total, np.int32(len(tiles)), np.int32(len(ids)))
                self._kernel(grid, (_THREADS,), args, stream=stream)
                kept.append(pairs)
            over = cupy.cuda.Event(block=True, disable_timing=True)
            over.record(stream)
            over.synchronize()
            found: Any = total.get(stream=stream)
        return int(found[0])

    def _table(self, memory: PagedMemory) -> Table:
        with self._lock:
            found = self._tables.get(memory)
            if found is None:
                found = copier(self._device).table(Paged.of(memory), Packed(memory.layout))
                self._tables[memory] = found
            return found


@driver.per_process
def summer(device: int) -> Summer:
    """Return this process's summer for ``device``."""
    return Summer(device)


def of_blocks(memory: PagedMemory, blocks: BlockIds) -> int | None:
    """As `Summer.of_blocks`, of the memory's device."""
    return summer(driver.index(memory.device)).of_blocks(memory, blocks)
