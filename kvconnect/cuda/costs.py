"""Kernel or copy engine? Measured once for each pair of devices, decided for each size of run.

A kernel copies any number of pieces in one launch but occupies multiprocessors; a copy
engine occupies none and reaches a few per cent more, but is told of each run by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconnect.cuda import driver
from kvconnect.cuda.copier import ONCE, Copier
from kvconnect.cuda.tiles import FROM, NBYTES, TO, UInt64Array

#: Scratch memory of a measurement, and the most it copies at once.
SCRATCH_BYTES = 32 << 20
_ROUNDS = 5
_CALLS = 32


@dataclass(frozen=True)
class Costs:
    """What copies from one device to another cost.

    Args:
        kernel_rate: bytes a second of the copy kernel.
        kernel_start_s: seconds that a launch costs beside its bytes.
        engine_rate: bytes a second of a copy engine, within one run.
        engine_call_s: seconds that each run costs at least, the call included.

    """

    kernel_rate: float
    kernel_start_s: float
    engine_rate: float
    engine_call_s: float

    def kernel_s(self, nbytes: int) -> float:
        """Return the seconds that one launch of the kernel needs for so many bytes."""
        return self.kernel_start_s + nbytes / self.kernel_rate

    def engine_is_faster(self, run_bytes: int) -> bool:
        """Whether many runs of this size are copied faster by a copy engine."""
        # The engine idles while it is told of the next run: the two add up.
        return self.engine_call_s + run_bytes / self.engine_rate < run_bytes / self.kernel_rate


def run_bytes(tiles: UInt64Array) -> int:
    """Return the mean length of what is contiguous on both sides within a block, 0 if it is empty."""
    return int(tiles[:, NBYTES].sum()) // len(runs(tiles)) if len(tiles) else 0


def runs(tiles: UInt64Array) -> UInt64Array:
    """Return ``tiles`` with those joined that follow each other on both sides."""
    ends = tiles[:-1, NBYTES]
    follows = (tiles[1:, FROM] == tiles[:-1, FROM] + ends) & (tiles[1:, TO] == tiles[:-1, TO] + ends)
    first = np.flatnonzero(np.concatenate(([True], ~follows))) if len(tiles) else np.zeros(0, np.int64)
    joined = tiles[first].copy()
    if len(first):
        joined[:, NBYTES] = np.add.reduceat(tiles[:, NBYTES], first)
    return joined


def measure(copier: Copier, address: int, nbytes: int, stream: Any, multiprocessors: int) -> Costs:
    """Measure copies from ``address``, whose ``nbytes`` are only read, into scratch memory.

    Takes a few milliseconds; blocks the calling thread.

    Raises:
        BrokenError: CUDA failed.

    """
    module = driver.cupy()
    size = min(nbytes, SCRATCH_BYTES)
    with driver.errors("measure copies"), driver.use(copier.device):
        scratch = module.cuda.runtime.malloc(size)
        try:

            def kernel(nbytes: int) -> float:
                source, target = (np.array([[start, nbytes]], dtype=np.uint64) for start in (address, scratch))
                table = copier.listed(source, target, stream)
                return _time(lambda: copier.launch(table, ONCE, stream, multiprocessors), stream)

            def copy(count: int, each: int) -> None:
                for i in range(count):
                    module.cuda.runtime.memcpyAsync(scratch + i * each, address + i * each, each, 4, stream.ptr)

            kernel_rate, start_s = fit(kernel, size)
            engine_rate, _ = fit(lambda nbytes: _time(lambda: copy(1, nbytes), stream), size)
            calls = _wall(lambda: copy(_CALLS, min(size // _CALLS, 4096)), stream) / _CALLS
        finally:
            stream.synchronize()
            module.cuda.runtime.free(scratch)
    return Costs(kernel_rate, start_s, engine_rate, calls)


def fit(seconds: Callable[[int], float], nbytes: int) -> tuple[float, float]:
    """Return bytes a second, and the seconds that no bytes would take: as much as megabytes do within one GPU.

    Args:
        seconds: measures a copy of so many bytes; called for ``nbytes`` and for a part of it.
        nbytes: the most to copy.

    """
    part, whole_s = nbytes // 4, seconds(nbytes)
    part_s = seconds(max(part, 1))
    start_s = (part_s * nbytes - whole_s * part) / (nbytes - part)
    # Otherwise the two do not tell: noise, or a part that lies in a cache.
    start_s = start_s if 0 < start_s < part_s else 0.0
    return nbytes / (whole_s - start_s), start_s


def _time(enqueue: Callable[[], object], stream: Any) -> float:
    """Return the device's seconds for what ``enqueue`` puts on ``stream``: the best of a few."""
    cuda = driver.cupy().cuda
    begin, end = cuda.Event(), cuda.Event()
    best = float("inf")
    for _ in range(_ROUNDS):
        begin.record(stream)
        kept = enqueue()
        end.record(stream)
        end.synchronize()
        del kept
        best = min(best, cuda.get_elapsed_time(begin, end) / 1e3)
    return best


def _wall(enqueue: Callable[[], object], stream: Any) -> float:
    """Return this thread's seconds for ``enqueue`` and its work: the best of a few."""
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        enqueue()
        stream.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
