"""Tensors over CUDA IPC: the `kvconnect.pipes.staged.Medium` of `CudaIpcPipe`."""

from __future__ import annotations

import logging
import threading
import time

import msgpack
import torch
from torch import Tensor

from kvconnect.cuda import driver, ipc
from kvconnect.cuda.lanes import lanes
from kvconnect.errors import BrokenError, KVConnectError

log = logging.getLogger(__name__)

_MAX_CARD_BYTES = 4096


class CudaIpcMedium:
    """Copies between this end's tensors and staging memory of either process, by copy engines."""

    def __init__(self, device: int) -> None:
        self._index = device
        self._lock = threading.Lock()  # held while the peer's memory is read
        self._mapped: ipc.Mapped | None = None
        self._theirs = (0, 0)

    @property
    def device(self) -> str:
        """Where this end's tensors are."""
        return f"cuda:{self._index}"

    def allocate(self, nbytes: int) -> _Staging:
        """Return memory that the peer can map."""
        return _Staging(self._index, nbytes)

    def stage(self, source: Tensor, address: int) -> None:
        """Copy ``source`` to ``address``, after the work of the caller's current stream."""
        self._copy(address, source.data_ptr(), source.nbytes)

    def meet(self, card: bytes) -> None:
        """Map the peer's staging memory."""
        try:
            if len(card) > _MAX_CARD_BYTES:
                raise ValueError(f"{len(card)} bytes")
            exported = msgpack.unpackb(card, max_ext_len=0)
            nbytes, address = int(exported["nbytes"]), int(exported["address"])
            mapped = ipc.Mapped(exported, [nbytes], self._index)
        except KVConnectError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise BrokenError(f"the peer's staging memory is described by nonsense: {error}") from error
        with self._lock:
            self._mapped, self._theirs = mapped, (address, nbytes)

    def fetch(self, address: int, out: Tensor) -> None:
        """Copy from the peer's ``address`` to ``out``, after the work of the caller's current stream."""
        with self._lock:
            start, size = self._theirs
            if self._mapped is None or not start <= address <= address + out.nbytes <= start + size:
                raise BrokenError("the peer names bytes outside its staging memory")
            self._copy(out.data_ptr(), self._mapped.bases[0] + address - start, out.nbytes)

    def end(self) -> None:
        """Unmap the peer's memory, elsewhere: that may wait for the device."""
        lanes(self._index).chore(lambda _: self._unmap(), _quiet)

    def _unmap(self) -> None:
        """Unmap the peer's memory once it is not being read."""
        with self._lock:
            mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.close()

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        with driver.errors("copy a tensor"), torch.cuda.device(self._index):
            stream = torch.cuda.current_stream()
            driver.cupy().cuda.runtime.memcpyAsync(target, source, nbytes, 4, stream.cuda_stream)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
            event.synchronize()


class _Staging:
    """Device memory of its own allocation, as a handle needs."""

    def __init__(self, device: int, nbytes: int) -> None:
        _graves.sweep()
        self._device = device
        module = driver.cupy()
        with driver.errors("allocate staging memory"), driver.use(device):
            self.address = int(module.cuda.runtime.malloc(nbytes))
        described = ipc.describe([self.address], device)
        self.card = bytes(msgpack.packb({**described, "address": self.address, "nbytes": nbytes}))

    def free(self, *, read_until_s: float) -> None:
        """Free it as soon as the peer cannot be reading it any more."""
        _graves.bury(time.monotonic() + read_until_s, self._device, self.address)


class _Graves:
    """Memory to be freed after a time, looked at when more is allocated or freed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, int, int]] = []

    def bury(self, due: float, device: int, address: int) -> None:
        with self._lock:
            self._waiting.append((due, device, address))
        self.sweep()

    def sweep(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [grave for grave in self._waiting if grave[0] <= now]
            self._waiting = [grave for grave in self._waiting if grave[0] > now]
        for _, device, address in due:
            lanes(device).chore(lambda _, address=address: driver.cupy().cuda.runtime.free(address), _quiet)  # type: ignore[misc]


_graves = _Graves()


def _quiet(error: KVConnectError | None) -> None:
    if error is not None:
        log.warning("could not give staging memory back: %s", error)
