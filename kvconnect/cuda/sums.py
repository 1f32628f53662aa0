"""Sums of blocks in a GPU's memory, by one kernel that reads each byte once: see `kvconnect.sums`."""

from __future__ import annotations

import time
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from kvconnect.cuda import driver
from kvconnect.cuda.copier import copier, pinned
from kvconnect.cuda.lanes import await_event
from kvconnect.cuda.tiles import ALIGNMENT, UInt64Array
from kvconnect.paging import BlockIds, PagedMemory

#: Leaves most of the device to what computes, and is still faster than any wire.
_MULTIPROCESSORS = 32
_CTAS_PER_SM = 2
_THREADS = 512
_WARP = 32
#: About what they read on an H200: to look at a sum's end when it is due.
_BYTES_PER_S = 800e9

#: Parts of a sum, and what their kernel reads.
Launched = tuple[UInt64Array, npt.NDArray[np.int32], Any]


class Summer:
    """Adds up blocks of one device, on a stream of its own. Thread-safe."""

    def __init__(self, device: int) -> None:
        self._device = device
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
        with driver.errors("sum blocks up"), driver.use(self._device):
            launched = self.launch(memory, blocks, self._stream)
            if launched is None:
                return None
            over = driver.cupy().cuda.Event(block=True, disable_timing=True)
            over.record(self._stream)
            await_event(over, time.monotonic(), memory.layout.nbytes(blocks) / _BYTES_PER_S)
        return sum(int(parts.sum()) for parts, *_ in launched) % 2**64

    def launch(self, memory: PagedMemory, blocks: BlockIds, stream: Any) -> list[Launched] | None:
        """Enqueue the sum of ``blocks`` on ``stream``, a CuPy stream of the current device; ``None`` as `of_blocks`.

        Returns:
            For each launch first ``uint64[warps]``, parts of the sum once the stream has passed it. All of
            it has to live until then.

        """
        table = copier(self._device).packing(memory)
        starts = [memory.layout.nbytes(blocks[:group]) for group in range(len(blocks))]
        named = [group for group, ids in enumerate(blocks) if len(ids) and len(table.tiles[group])]
        if any(starts[group] % ALIGNMENT or not table.aligned[group] for group in named):
            return None
        launched = []
        for group in named:
            tiles, ids = table.on_device[group], pinned(np.asarray(blocks[group], dtype=np.int32))
            ctas = min(_MULTIPROCESSORS * _CTAS_PER_SM, len(tiles) * len(ids))
            parts = pinned(np.zeros(ctas * _THREADS // _WARP, dtype=np.uint64))
            pointers = np.intp(ids.ctypes.data), np.intp(parts.ctypes.data)
            args = (tiles, pointers[0], np.uint64(starts[group]), pointers[1], np.int32(len(tiles)), np.int32(len(ids)))
            self._kernel((ctas,), (_THREADS,), args, stream=stream)
            launched.append((parts, ids, tiles))
        return launched


@driver.per_process
def summer(device: int) -> Summer:
    """Return this process's summer for ``device``."""
    return Summer(device)


def of_blocks(memory: PagedMemory, blocks: BlockIds) -> int | None:
    """As `Summer.of_blocks`, of the memory's device."""
    return summer(driver.index(memory.device)).of_blocks(memory, blocks)
