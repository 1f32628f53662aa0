"""Copies between listed pieces of one device's memory: what `kvconnect.pipes.vectored.copy` is for the CPU."""

from __future__ import annotations

import torch

from kvconnect.cuda import driver
from kvconnect.cuda.copier import ONCE, copier
from kvconnect.paging import IoVec

#: Enough to be several times faster than any wire, within one device.
_MULTIPROCESSORS = 32


def copy(device: str, target: IoVec, source: IoVec) -> None:
    """Copy one stream of pieces onto another of the same length, both on ``device``; return when it is done.

    The device's work is ordered on the caller's current stream; nothing else of the device is waited for.

    Raises:
        BrokenError: CUDA failed.

    """
    index = driver.index(device)
    current = torch.cuda.current_stream(index)
    with driver.errors("gather or scatter pieces"), driver.use(index):
        cuda = driver.cupy().cuda
        stream = cuda.ExternalStream(current.cuda_stream, index)
        table = copier(index).listed(source, target, stream)
        kept = copier(index).launch(table, ONCE, stream, _MULTIPROCESSORS)
        event = cuda.Event(block=True, disable_timing=True)
        event.record(stream)
        event.synchronize()
    del table, kept
