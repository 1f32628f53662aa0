"""What a process of a pair holds, and the interface of everything that is measured in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.memory import BLOCK_BYTES, BLOCKWISE, PIECE_BYTES, Pool
from kvconnect.bench.link import Link
from kvconnect.testing.channels import ConnectionChannel

Ids = Sequence[int]


@dataclass(frozen=True)
class Host:
    """One of the two processes: D (``near``), which receives, or P, whose blocks they are."""

    near: bool
    #: ``"cuda:N"``; tests run on ``"cpu"``.
    device: str
    pools: Mapping[str, Pool]
    #: Straight to the other process, for what a medium exchanges and for samples of both.
    peer: Link
    channel: ConnectionChannel

    @property
    def gpu(self) -> int:
        """The index of its GPU; 0 on the CPU."""
        return int(self.device.partition(":")[2] or 0)

    def settle(self) -> None:
        """Wait until the device has done everything."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.gpu)


class Contender(ABC):
    """One medium in one process. Failures are exceptions; the run goes on without it."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        self.host, self.options = host, options

    def describe(self) -> dict[str, Any]:
        """Return what the other process needs."""
        return {}

    def meet(self, theirs: dict[str, Any]) -> None:  # noqa: B027 - most media have to, not all
        """Connect; both processes do at the same time."""

    @abstractmethod
    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """Move ``far[i]`` of P onto ``near[i]`` of D, one selection after the other; return the seconds of each."""

    def assist(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> None:  # noqa: B027 - likewise
        """Do what the process that does not time has to, for the same arguments."""

    def multiprocessors(self, way: str, layout: str, near: Ids, far: Ids) -> int | None:
        """Return how many multiprocessors one move occupied, if the kernel can be asked."""
        return None


def piece_bytes(layout: str) -> int:
    """Return the length of what is contiguous in a block."""
    return BLOCK_BYTES if layout == BLOCKWISE else PIECE_BYTES


def on_stream(device: int, stream: Any, enqueue: Callable[[], Any]) -> float:
    """Return the device's seconds for what ``enqueue`` puts on a CuPy ``stream``, without the host's.

    The stream is kept busy until all is enqueued: what a launch costs the host would
    otherwise lie between the two events.
    """
    import cupy  # type: ignore[import-not-found,unused-ignore]

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    with cupy.cuda.Device(device), torch.cuda.device(device):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=device)):  # type: ignore[no-untyped-call]
            torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]  # noqa: SLF001 - torch has no public one
        begin.record(stream)
        kept = enqueue()
        end.record(stream)
        end.synchronize()
        del kept
        return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3


#: About 1 ms: several launches of a kernel from Python.
_BUSY_CYCLES = 2_000_000
