"""A gate between two copies of one `shm` read: the counterpart of `DataWire`, where no wire carries the bytes."""

from __future__ import annotations

import mmap
import threading

from kvconnect.pipes import shm_blocks
from kvconnect.pipes.peer_memory import PeerMemory

#: So that the few hundred kilobytes of a test's load are several copies.
_STEP_BYTES = 32 << 10
_LEFT, _HELD, _CLOSED = range(3)


class CopyGate:
    """Made by the parent, put in the way by the engine; both see the same flags."""

    def __init__(self) -> None:
        self._flags = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("i")

    def after(self, copies: int) -> None:
        """Hold the next read before its copy number ``copies``, until `let_go`."""
        self._flags[_LEFT], self._flags[_HELD], self._flags[_CLOSED] = copies, 0, 1

    def let_go(self) -> None:
        """Let through what is held, and hold nothing more."""
        self._flags[_CLOSED] = 0

    heal = let_go

    @property
    def held(self) -> bool:
        """Whether something waits at the gate, or has."""
        return bool(self._flags[_HELD])

    def put_in_the_way(self) -> None:
        """Have every copy of this process go through it."""
        real, flags, lock = PeerMemory.read, self._flags, threading.Lock()

        def read(peer: PeerMemory, local: object, remote: object) -> None:
            with lock:  # a read's copies run on several threads
                flags[_LEFT] -= 1
                waits = flags[_CLOSED] and flags[_LEFT] <= 0
                flags[_HELD] |= int(waits)
            while waits and flags[_CLOSED]:
                threading.Event().wait(0.002)
            real(peer, local, remote)  # type: ignore[arg-type]

        shm_blocks._STEP_BYTES = _STEP_BYTES  # type: ignore[misc]
        PeerMemory.read = read  # type: ignore[method-assign, assignment]
