"""Pipes that are slow, stuck, cut or lie about what they carry: any pipe class with a fault put into it.

``faulty(MyPipe, Cut(after_bytes=1 << 20))`` is a pipe class like any other. Its pipes share the
fault, which counts what all of them carry, strikes from then on, and tells when it has (`Fault.struck`).
Faults strike messages as they are sent, and block transfers at the end that asks for them; where the
blocks are moved by the default block path, its chunks are messages.
"""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvconnect.errors import BrokenError, ClosedError, DeadlineError, LoadError
from kvconnect.pipes import wire
from kvconnect.pipes.base import Channel, Pipe, PipeSpec, Transfer

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from kvconnect.paging import BlockIds, PagedLayout, PagedMemory

_ALWAYS = 1 << 60


class Fault(ABC):
    """Something that happens to what pipes carry.

    Args:
        after_bytes: so many bytes pass unharmed.
        times: how often it strikes; may be set again at any time.

    """

    def __init__(self, after_bytes: int = 0, times: int = _ALWAYS) -> None:
        self.after_bytes, self.times = after_bytes, times
        #: Set when it has struck.
        self.struck = threading.Event()
        self.changed = threading.Condition()
        self._passed = 0

    def due(self, nbytes: int) -> bool:
        """Count bytes that are about to move, and say whether the fault strikes them."""
        with self.changed:
            self._passed += nbytes
            if self._passed <= self.after_bytes or self.times <= 0:
                return False
            self.times -= 1
        self.struck.set()
        return True

    def heal(self) -> None:
        """Strike no more, and let go of the messages that are held."""
        with self.changed:
            self.times = 0
            self.changed.notify_all()

    @abstractmethod
    def message(self, pipe: FaultyPipe, tensor: Tensor | None) -> Tensor | None:
        """Strike a message that ``pipe`` is about to send; return what it sends instead, or raise."""

    @abstractmethod
    def transfer(self, pipe: FaultyPipe, start: Callable[[], Transfer], local: BlockIds) -> Transfer:
        """Strike a transfer that ``start`` begins, from or to ``pipe``'s blocks ``local``."""


class Delay(Fault):
    """Everything takes ``seconds`` longer."""

    def __init__(self, seconds: float, after_bytes: int = 0, times: int = _ALWAYS) -> None:
        super().__init__(after_bytes, times)
        self.seconds = seconds

    def message(self, pipe: FaultyPipe, tensor: Tensor | None) -> Tensor | None:
        """Send it later."""
        pipe.ended.wait(self.seconds)
        return tensor

    def transfer(self, pipe: FaultyPipe, start: Callable[[], Transfer], local: BlockIds) -> Transfer:
        """Tell of its end later."""
        inner = start()
        outer = Transfer(inner.nbytes, inner.cancel)

        def over(_: Transfer) -> None:
            late = threading.Timer(self.seconds, outer.finish, (inner.error,))
            late.daemon, late.name = True, "kvconnect-test-delay"
            late.start()

        inner.add_done_callback(over)
        return outer


class Clog(Fault):
    """Nothing gets through any more until it is healed, and nobody says why."""

    def message(self, pipe: FaultyPipe, tensor: Tensor | None) -> Tensor | None:
        """Hold it until the pipe's deadline, after which the pipe is dead."""
        with self.changed:
            self.changed.wait_for(lambda: not self.times or pipe.ended.is_set(), pipe.limit_s)
        if pipe.ended.is_set():
            raise ClosedError("this end was closed")
        if self.times:
            pipe.abort()
            raise DeadlineError(f"nobody received within {pipe.limit_s} s")
        return tensor

    def transfer(self, pipe: FaultyPipe, start: Callable[[], Transfer], local: BlockIds) -> Transfer:
        """Hold it until it is cancelled or the pipe ends."""
        held = Transfer(pipe.nbytes(local), lambda: held.finish(LoadError("the transfer was cancelled")))
        pipe.held.append(held)
        return held


class Cut(Fault):
    """The wire breaks."""

    def __init__(self, after_bytes: int = 0, times: int = 1) -> None:
        super().__init__(after_bytes, times)

    def message(self, pipe: FaultyPipe, tensor: Tensor | None) -> Tensor | None:
        """Break instead of sending it."""
        pipe.abort()
        raise BrokenError("the wire was cut")

    def transfer(self, pipe: FaultyPipe, start: Callable[[], Transfer], local: BlockIds) -> Transfer:
        """Break while it runs."""
        inner = start()
        outer = Transfer(inner.nbytes, inner.cancel)
        inner.add_done_callback(lambda _: outer.finish(BrokenError("the wire was cut")))
        pipe.abort()
        return outer


class Corrupt(Fault):
    """One bit changes on the way.

    Args:
        offset: of the byte, counted from the end if negative, round and round where there are fewer.
        after_bytes: as for every fault.
        times: likewise; 0 to begin later.

    """

    def __init__(self, offset: int = 0, after_bytes: int = 0, times: int = 1) -> None:
        super().__init__(after_bytes, times)
        self.offset = offset

    def message(self, pipe: FaultyPipe, tensor: Tensor | None) -> Tensor | None:
        """Send a copy that is damaged; the caller's own stays whole."""
        if tensor is None or not tensor.nbytes:
            return tensor
        damaged = tensor.detach().cpu().contiguous().clone()
        wire.memory(damaged)[self.offset % damaged.nbytes] ^= 0x04
        return damaged.to(tensor.device)

    def transfer(self, pipe: FaultyPipe, start: Callable[[], Transfer], local: BlockIds) -> Transfer:
        """Damage what has arrived, in CPU memory, before anybody is told."""
        inner = start()
        outer = Transfer(inner.nbytes, inner.cancel)

        def over(_: Transfer) -> None:
            if inner.error is None:
                self._damage(pipe.local, local)
            outer.finish(inner.error)

        inner.add_done_callback(over)
        return outer

    def _damage(self, memory: PagedMemory, blocks: BlockIds) -> None:
        left = self.offset % max(1, memory.layout.nbytes(blocks))
        for address, nbytes in memory.iovec(blocks).tolist():
            if left < nbytes:
                ctypes.c_ubyte.from_address(address + left).value ^= 0x04
                return
            left -= nbytes


class FaultyPipe(Pipe):
    """What `faulty` puts before a pipe class; not a pipe by itself."""

    fault: Fault
    limit_s: float
    local: PagedMemory

    @classmethod
    def open(cls, spec: PipeSpec) -> Self:
        """Open the real pipe."""
        pipe = super().open(spec)
        pipe.limit_s, pipe.ended, pipe.held = spec.timeout_s, threading.Event(), []
        return pipe

    #: Set when this end was closed or aborted; transfers that are held until then.
    ended: threading.Event
    held: list[Transfer]

    def nbytes(self, blocks: BlockIds) -> int:
        """Return the bytes of blocks."""
        return self.local.layout.nbytes(blocks)

    def send_tensor(self, tensor: Tensor | None) -> None:
        """Send it, if the fault lets it through."""
        if self.fault.due(0 if tensor is None else tensor.nbytes):
            tensor = self.fault.message(self, tensor)
        super().send_tensor(tensor)  # type: ignore[safe-super]

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """Attach the real pipe."""
        super().attach(local, remote, channel)
        self.local = local

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Read them, as far as the fault goes."""
        return self._moved(lambda: super(FaultyPipe, self).read_blocks(remote, local), local)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Write them; what is damaged is damaged in reads only."""
        if isinstance(self.fault, Corrupt):
            return super().write_blocks(local, remote)
        return self._moved(lambda: super(FaultyPipe, self).write_blocks(local, remote), local)

    def _moved(self, start: Callable[[], Transfer], local: BlockIds) -> Transfer:
        # The default block path sends messages: each of them is struck by itself.
        if self._stream is None and self.fault.due(self.nbytes(local)):
            return self.fault.transfer(self, start, local)
        return start()

    def close(self) -> None:
        """Close the real pipe."""
        self._over()
        super().close()  # type: ignore[safe-super]

    def abort(self) -> None:
        """Abort the real pipe."""
        self._over()
        super().abort()

    def _over(self) -> None:
        self.ended.set()
        with self.fault.changed:
            self.fault.changed.notify_all()
        for transfer in self.held:
            transfer.finish(BrokenError("the pipe was closed"))


def faulty(pipe_class: type[Pipe], fault: Fault) -> type[Pipe]:
    """Return ``pipe_class`` with ``fault`` in it; name, traits and options stay its own."""
    return type(f"Faulty{pipe_class.__name__}", (FaultyPipe, pipe_class), {"fault": fault})
