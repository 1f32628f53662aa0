"""A connected socket for one sending and one receiving thread that may block, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from typing import Final, NoReturn

import numpy as np

from kvconnect.errors import BrokenError, ClosedError, DeadlineError
from kvconnect.pipes import reactor, vectored
from kvconnect.pipes.reactor import Reactor
from kvconnect.pipes.wire import MAX_HEADER_BYTES

#: A message may take this long a byte on top of the pipe's time-out, so that size alone never fails it.
_SECONDS_A_BYTE: Final = 1 / (32 << 20)
_DRAIN_BYTES: Final = 64 << 10


class Link:
    """The socket of a pipe's tensor path.

    It blocks in the kernel, with the pipe's time-out as ``SO_RCVTIMEO`` and
    ``SO_SNDTIMEO``: a message costs one call to send and two to receive, none of
    them to wait. `end` wakes whoever is blocked; the descriptor is closed by the
    last thread that leaves, so its number cannot be taken while it is in use.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        """Take over a connected ``sock``."""
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Rounded up: a timeval of zero would mean "for ever".
        timeval = struct.pack("ll", int(timeout_s), min(999_999, int(timeout_s % 1 * 1e6) + 1))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._sock, self._timeout_s = sock, timeout_s
        self._lock = threading.Lock()
        self._users = 0
        self._ended = False
        self._out_head, self._out_address = _header_memory()
        #: Where the receiving thread may put a header.
        self.head, self.head_address = _header_memory()
        self._out = vectored.pieces((0, 0), (0, 0))

    def send(self, header: bytes, address: int = 0, nbytes: int = 0) -> None:
        """Send ``header`` and then ``nbytes`` bytes at ``address``. For one thread at a time.

        Raises:
            DeadlineError, BrokenError: part of it may have gone.
            ClosedError: `end` was called.

        """
        left = len(header) + nbytes
        deadline = time.monotonic() + self._timeout_s + left * _SECONDS_A_BYTE
        # One array for all messages: building one would cost as much as the call that sends it.
        self._out_head[: len(header)] = header
        iov = self._out
        iov[0, 0], iov[0, 1], iov[1, 0], iov[1, 1] = self._out_address, len(header), address, nbytes
        fd = self._enter()
        try:
            while left:
                try:
                    done = vectored.send(fd, iov)
                except InterruptedError:
                    continue  # a signal; its Python handler ran on the way here
                except BlockingIOError:
                    self._late("the peer takes no data")
                except OSError as error:
                    self._fail("sending failed", error)
                left -= done
                if left:
                    iov = vectored.advance(iov, done)
                    self._check(deadline, "the peer takes data too slowly")
        finally:
            self._leave()

    def recv(self, address: int, nbytes: int, *, idle: bool = False) -> bool:
        """Receive ``nbytes`` bytes to ``address``. For one thread at a time.

        With ``idle``, nothing of a message has come yet: running out of time before
        the first byte returns ``False`` and harms nothing.

        Raises:
            DeadlineError, BrokenError: part of it may have come.
            ClosedError: `end` was called.

        """
        deadline = time.monotonic() + self._timeout_s + nbytes * _SECONDS_A_BYTE
        fd = self._enter()
        try:
            while nbytes:
                try:
                    done = vectored.recv_at(fd, address, nbytes, socket.MSG_WAITALL)
                except InterruptedError:
                    continue  # a signal; its Python handler ran on the way here
                except BlockingIOError:
                    if idle:
                        return False
                    self._late("the rest of a message did not come")
                except OSError as error:
                    self._fail("receiving failed", error)
                if not done:
                    self._fail("the connection was cut")
                idle = False
                address, nbytes = address + done, nbytes - done
                if nbytes:
                    self._check(deadline, "a message comes too slowly")
        finally:
            self._leave()
        return True

    def end(self, *, reset: bool) -> None:
        """Wake whoever is blocked and close; with ``reset`` unsent data is thrown away. Never blocks."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            with contextlib.suppress(OSError):  # the peer may be faster
                if reset:
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._sock.shutdown(socket.SHUT_RDWR)
            if not self._users:
                self._sock.close()

    def linger(self, loop: Reactor) -> None:
        """Close once the peer has all that was sent. Never blocks.

        Closing a socket with unread data resets the connection, and what the peer
        has not fetched by then is lost. So the reactor reads on until the peer ends too.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
            with contextlib.suppress(OSError):  # the peer may be faster
                # With both directions shut whoever is blocked wakes, and closes as it leaves.
                self._sock.shutdown(socket.SHUT_RDWR if self._users else socket.SHUT_WR)
            if self._users:
                return
        self._sock.setblocking(False)
        _Farewell(loop, self._sock, self._timeout_s)

    def _enter(self) -> int:
        with self._lock:
            if self._ended:
                raise ClosedError("this end was closed")
            self._users += 1
            return self._sock.fileno()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._ended and not self._users:
                self._sock.close()

    def _check(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            self._late(what)

    def _late(self, what: str) -> NoReturn:
        if self._ended:
            raise ClosedError("this end was closed")
        raise DeadlineError(f"{what} (time-out {self._timeout_s} s)")

    def _fail(self, what: str, error: OSError | None = None) -> NoReturn:
        if self._ended:
            raise ClosedError("this end was closed")
        raise BrokenError(f"{what}: {error}" if error else what) from error


def _header_memory() -> tuple[memoryview, int]:
    memory = np.empty(MAX_HEADER_BYTES, dtype=np.uint8)
    return memoryview(memory.data), int(memory.ctypes.data)


class _Farewell:
    """Stays after this end has closed, until the peer's kernel has everything or the peer ends, too.

    What the peer still sends is dropped, and once nothing of ours is on its way any
    more, answered with a reset: a sender learns that nobody receives. (What has
    reached the peer's kernel stays readable there after a reset.)
    """

    def __init__(self, loop: Reactor, sock: socket.socket, timeout_s: float) -> None:
        self._loop, self._sock = loop, sock
        if _over(sock):
            sock.close()
            return
        self._timer = loop.call_later(timeout_s, self._leave)
        loop.watch(sock.fileno(), reactor.READ, self._read)

    def _read(self, _events: int) -> None:
        if _over(self._sock):
            self._leave()

    def _leave(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()


def _over(sock: socket.socket) -> bool:
    """Drop some of what has come; return whether closing now loses nothing."""
    try:
        return not sock.recv(_DRAIN_BYTES) or _unacknowledged(sock) == 0
    except BlockingIOError:
        return False
    except OSError:
        return True  # a reset is an end as well


def _unacknowledged(sock: socket.socket) -> int:
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])
