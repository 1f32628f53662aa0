"""Block copies on one device: the kernels of ``copy.cu``, compiled once and launched on a given stream.

A copy may read or write memory of another GPU or process, as long as it is mapped
here. It is asynchronous: whoever launches keeps what `Copier.launch` returns until
the stream has passed it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvconnect.cuda import driver
from kvconnect.cuda.tiles import Packed, Paged, Side, UInt64Array, is_aligned, listed, table
from kvconnect.paging import IoVec, PagedMemory

Number = TypeVar("Number", np.int32, np.uint64)

#: A tile of 32 KiB in three stages saturates NVLink from 16 multiprocessors and leaves
#: each of them more than half of its shared memory (`docs/benchmarks.md`).
TILE_BYTES = 32 << 10
_STAGES, _LEAD = 3, 2
_THREADS = 512
#: Blocks of threads a multiprocessor, where copies go through registers.
_THREADED_PER_SM = 2


@dataclass(frozen=True)
class Table:
    """The tiles between two sides, by group, on the host and on the device."""

    tiles: tuple[UInt64Array, ...]
    on_device: tuple[Any, ...]
    aligned: tuple[bool, ...]


@dataclass(frozen=True)
class Part:
    """Blocks of one group for one launch: ``from_ids[i]`` is copied onto ``to_ids[i]``; shifts are in bytes."""

    group: int
    from_ids: Sequence[int]
    to_ids: Sequence[int]
    from_shift: int = 0
    to_shift: int = 0


#: All of what `Copier.listed` laid out.
ONCE = Part(0, (0,), (0,))


class Copier:
    """Launches copies on one device. Thread-safe."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._packings: weakref.WeakKeyDictionary[PagedMemory, dict[bool, Table]] = weakref.WeakKeyDictionary()
        module = driver.cupy()
        with driver.errors("prepare the copy kernels"), driver.use(device):
            this = module.cuda.Device(device)
            self.multiprocessors = int(this.attributes["MultiProcessorCount"])
            source = resources.files("kvconnect.cuda").joinpath("copy.cu").read_text(encoding="utf-8")
            options = ("--std=c++17", f"-DSTAGES={_STAGES}", f"-DLEAD={_LEAD}", f"-DTILE={TILE_BYTES}")
            kernels = module.RawModule(code=source, options=options, backend="nvrtc")
            self._threads = kernels.get_function("copy_by_threads")
            self._bulk: Any = None
            if int(this.compute_capability) >= 90:
                self._bulk = kernels.get_function("copy_by_bulk")
                self._bulk.max_dynamic_shared_size_bytes = _STAGES * TILE_BYTES

    def table(self, source: Side, target: Side) -> Table:
        """Lay out the copies between two sides; costs milliseconds, so it is made once for a pair."""
        module = driver.cupy()
        layout = source.layout
        tiles = tuple(table(source, target, group, TILE_BYTES) for group in range(layout.num_groups))
        with driver.errors("upload a table of pieces"), driver.use(self.device):
            on_device = tuple(module.asarray(rows) for rows in tiles)
            # Copies run on streams that do not wait for this one.
            module.cuda.get_current_stream().synchronize()
        return Table(tiles, on_device, tuple(is_aligned(rows) for rows in tiles))

    def packing(self, memory: PagedMemory, *, back: bool = False) -> Table:
        """Return the copies from ``memory`` to its canonical stream, or back; either is laid out once."""
        with self._lock:
            made = self._packings.setdefault(memory, {})
            if back not in made:
                sides: tuple[Side, Side] = (Paged.of(memory), Packed(memory.layout))
                made[back] = self.table(*(sides[::-1] if back else sides))
            return made[back]

    def listed(self, source: IoVec, target: IoVec, stream: Any) -> Table:
        """Lay out one copy between pieces that are listed one by one, to be launched as `ONCE` on ``stream``."""
        tiles = listed(source, target, TILE_BYTES)
        with driver.errors("upload a table of pieces"), driver.use(self.device), stream:
            return Table((tiles,), (driver.cupy().asarray(tiles),), (is_aligned(tiles),))

    def launch(self, table: Table, part: Part, stream: Any, multiprocessors: int, seen: Any = None) -> object:
        """Enqueue the copy of ``part`` on ``stream``, over at most ``multiprocessors`` of them.

        Args:
            table: of the two sides.
            part: which blocks.
            stream: a CuPy stream of this device.
            multiprocessors: how many may take part; fewer do if there is little to copy.
            seen: an uint32 array on the device, in whose bits the multiprocessors that did are marked.

        Returns:
            What has to live until the copy is over.

        Raises:
            BrokenError: CUDA failed.

        """
        ids = np.empty((len(part.from_ids), 2), dtype=np.int32)
        ids[:, 0], ids[:, 1] = part.from_ids, part.to_ids
        tiles = table.on_device[part.group]
        items = len(tiles) * len(ids)
        if items == 0:
            return None
        bulk = self._bulk is not None and table.aligned[part.group] and not (part.from_shift | part.to_shift) % 16
        most = multiprocessors if bulk else multiprocessors * _THREADED_PER_SM
        with driver.errors("launch a copy"), driver.use(self.device):
            named = pinned(ids)
            args = (
                tiles,
                np.intp(named.ctypes.data),
                np.uint64(part.from_shift),
                np.uint64(part.to_shift),
                np.intp(0 if seen is None else seen.data.ptr),
                np.int32(len(tiles)),
                np.int32(len(ids)),
            )
            grid = (max(1, min(most, items)),)
            if bulk:
                self._bulk(grid, (32,), args, shared_mem=_STAGES * TILE_BYTES, stream=stream)
            else:
                self._threads(grid, (_THREADS,), args, stream=stream)
        return named, tiles


@driver.per_process
def copier(device: int) -> Copier:
    """Return this process's copier for ``device``."""
    return Copier(device)


def pinned(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Return a copy of ``values`` that kernels can read and write without a copy of their own, while data moves."""
    memory = driver.cupy().cuda.alloc_pinned_memory(max(values.nbytes, 8))
    found = np.frombuffer(memory, values.dtype, values.size).reshape(values.shape)
    found[...] = values
    return found
