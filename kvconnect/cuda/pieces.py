"""Copies between listed pieces of one device's memory: what `kvconnect.pipes.vectored.copy` is for the CPU."""

from __future__ import annotations

from typing import Any

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
        stream = _Given(current.cuda_stream).for_cupy(cuda, index)
        table = copier(index).listed(source, target, stream)
        kept = copier(index).launch(table, ONCE, stream, _MULTIPROCESSORS)
        event = cuda.Event(block=True, disable_timing=True)
        event.record(stream)
        event.synchronize()
    del table, kept


class _Given:
    """Another library's stream, as one that has ``__cuda_stream__`` shows it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return version 0 of the protocol, and the stream."""
        return 0, self._handle

    def for_cupy(self, cuda: Any, device: int) -> Any:
        """Return it as a stream of CuPy's; releases before 14 do not know the protocol."""
        given = getattr(cuda.Stream, "from_external", None)
        return cuda.ExternalStream(self._handle, device) if given is None else given(self)
