"""Reading and writing the memory of another process of this host, and being sure it is that one.

The kernel copies straight between two address spaces (``process_vm_readv``), by
process number. A number can be recycled and a process can replace its program,
so each process shows a *beacon*, random bytes at a known address: the peer's
beacon is read when the pipe opens, and after each copy, before the copy is
called good. A ``pidfd`` held from before the first look says that the number
has not changed hands in between.
"""

from __future__ import annotations

import ctypes
import io
import os
import secrets
import select
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from kvconnect.errors import BrokenError, HandshakeError, KVConnectError
from kvconnect.paging import IoVec
from kvconnect.pipes import vectored

_BEACON_BYTES: Final = 32
#: Numbers beyond are none of a process (PID_MAX_LIMIT is far below); the kernel takes a C int.
_MAX_PID: Final = (1 << 31) - 1
#: More threads than this gain nothing on one stream of memory.
_MAX_THREADS: Final = 2


class Beacon:
    """Random bytes in this process's memory by which a peer knows it again."""

    def __init__(self) -> None:
        """Draw the bytes."""
        self._bytes = np.frombuffer(bytearray(secrets.token_bytes(_BEACON_BYTES)), dtype=np.uint8)

    def card(self) -> dict[str, Any]:
        """Return what `PeerMemory` needs to know; msgpack-able."""
        return {"pid": os.getpid(), "address": int(self._bytes.ctypes.data), "beacon": self._bytes.tobytes()}


class PeerMemory:
    """The memory of the process that showed ``card``. Thread-safe, except for `close`."""

    def __init__(self, card: Mapping[str, Any]) -> None:
        """Find the process and read its beacon.

        Raises:
            BrokenError: the kernel does not let this process read the other, or it is not there.
            HandshakeError: the card is malformed.

        """
        try:
            self._pid, address = int(card["pid"]), int(card["address"])
            beacon = card["beacon"]
            self._beacon = vectored.pieces((address, _BEACON_BYTES))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise HandshakeError(f"the peer's card is malformed: {error}") from error
        if not 0 < self._pid <= _MAX_PID or not isinstance(beacon, bytes) or len(beacon) != _BEACON_BYTES:
            raise HandshakeError("the peer's card is malformed: pid or beacon out of range")
        self._expected = beacon
        try:
            self._pidfd = io.FileIO(os.pidfd_open(self._pid))
        except OSError as error:
            raise BrokenError(f"process {self._pid} cannot be found: {error.strerror}") from error
        try:
            self.verify()
        except BaseException:
            self.close()
            raise

    def verify(self) -> None:
        """Raise `BrokenError` unless the very same process and program still runs."""
        self.check_runs()
        seen = bytearray(_BEACON_BYTES)
        place = ctypes.addressof(ctypes.c_char.from_buffer(seen))
        # A copy: what is read from is used up.
        self.read(vectored.pieces((place, _BEACON_BYTES)), self._beacon.copy())
        if seen != self._expected:
            raise BrokenError(f"process {self._pid} is not the peer: it does not show the peer's beacon")

    def check_runs(self) -> None:
        """Raise `BrokenError` if the process has ended: a third of the cost of `verify`."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            raise BrokenError(f"process {self._pid} has ended")

    def read(self, local: IoVec, remote: IoVec) -> None:
        """Copy the peer's ``remote`` to ``local``, streams of equal length; both arrays are used up.

        Raises:
            BrokenError: the memory is not there, or may not be read.

        """
        self._copy(vectored.process_read, local, remote)

    def write(self, local: IoVec, remote: IoVec) -> None:
        """Copy ``local`` to the peer's ``remote``; as `read`."""
        self._copy(vectored.process_write, local, remote)

    def _copy(self, call: Callable[[int, IoVec, IoVec], int], local: IoVec, remote: IoVec) -> None:
        left = vectored.nbytes(local)
        while True:
            try:
                done = call(self._pid, local, remote)
            except OSError as error:
                raise BrokenError(f"memory of process {self._pid} cannot be accessed: {error.strerror}") from error
            left -= done
            if left <= 0:
                return
            if not done:
                raise BrokenError(f"memory of process {self._pid} ends before the transfer does")
            local, remote = vectored.advance(local, done), vectored.advance(remote, done)

    def close(self) -> None:
        """Let go of the process. Nobody may be copying."""
        self._pidfd.close()


class SharedCopy:
    """A copy in chunks that several threads may work on; one of them ends it.

    Args:
        count: number of chunks.
        copy: copies chunk ``i``; called at most once for each.
        check: raises a `KVConnectError` to give up; called before each chunk.
        end: called once, after the last access to the memory, with the error if there was one.

    """

    def __init__(
        self,
        count: int,
        copy: Callable[[int], None],
        check: Callable[[], None],
        end: Callable[[KVConnectError | None], None],
    ) -> None:
        self._count, self._copy, self._check, self._end = count, copy, check, end
        self._lock = threading.Lock()
        self._next = 0
        self._running = 0
        self._error: KVConnectError | None = None

    def step(self) -> bool:
        """Copy one chunk, if any is left to take; return whether more are."""
        with self._lock:
            if self._next >= self._count:
                return False
            number, self._next = self._next, self._next + 1
            self._running += 1
        error: KVConnectError | None = BrokenError("the copy was interrupted")
        try:
            error = self._attempt(number)
        finally:
            # Also if a signal's handler raised: a chunk that nobody copies must not count as running.
            more = self._ran(error)
        return more

    def _ran(self, error: KVConnectError | None) -> bool:
        with self._lock:
            self._running -= 1
            if error is not None:
                self._error = self._error or error
                self._next = self._count
            more = self._next < self._count
            last = not more and self._running == 0
        if last:
            self._end(self._error)
        return more

    def _attempt(self, number: int) -> KVConnectError | None:
        try:
            self._check()
            self._copy(number)
        except KVConnectError as error:
            return error
        except Exception as error:  # noqa: BLE001 - whoever waits for the end must hear of a bug, too
            return unexpected("a copy", error)
        return None


def unexpected(what: str, error: Exception) -> BrokenError:
    """Return what a transfer fails with when ``what`` met an error that is none of ours."""
    broken = BrokenError(f"{what} failed unexpectedly: {error!r}")
    broken.__cause__ = error
    return broken


def useful_threads() -> int:
    """How many threads may work on one copy here: one core copies less than memory can deliver."""
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))
