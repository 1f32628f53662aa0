"""A connected socket for one sending and one receiving thread that may block, and how it ends."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from typing import Final, NoReturn

import numpy as np

from kvconnect.errors import BrokenError, ClosedError, DeadlineError
from kvconnect.pipes import vectored
from kvconnect.pipes.reactor import Reactor
from kvconnect.pipes.tcp_checksum import SEAL_BYTES
from kvconnect.pipes.tcp_farewell import Farewell, hang_up
from kvconnect.pipes.tcp_io import PLAIN, Io
from kvconnect.pipes.wire import MAX_HEADER_BYTES

#: A message may take this long a byte on top of the pipe's time-out, so that size alone never fails it.
_SECONDS_A_BYTE: Final = 1 / (32 << 20)
#: Sides of the connection, as indices.
_SENDS: Final = 0
_RECEIVES: Final = 1
#: A receive blocks in the kernel for so long at first; there, only the connection's end would wake it.
_BLOCKED_S: Final = 0.05


class Link:
    """The socket of a pipe's tensor path.

    It blocks in the kernel (``SO_SNDTIMEO``, ``SO_RCVTIMEO``): a message costs one call
    to send and two to receive, none of them to wait. A receive that finds nothing for a
    moment waits for an event as well, since shutting the socket's receiving side to wake
    it would lose what was sent (see `Farewell`). `end` wakes whoever is blocked; the
    descriptor is closed by the last thread that leaves, so its number cannot be taken
    while it is in use.
    """

    def __init__(self, sock: socket.socket, timeout_s: float, io: Io = PLAIN) -> None:
        """Take over a connected ``sock``, which ``io`` sends and receives over."""
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        self._blocked_s = min(_BLOCKED_S, timeout_s / 2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(self._blocked_s))
        self._sock, self._timeout_s, self._io = sock, timeout_s, io
        self._lock = threading.Lock()
        self._users = [0, 0]
        self._ended = self._deaf = False
        #: Wakes the receiving thread, while it waits.
        self._waker: int | None = None
        self._loop: Reactor | None = None
        self._out_head, self._out_address = _header_memory()
        #: Where the receiving thread may put a header.
        self.head, self.head_address = _header_memory()
        self._out = vectored.pieces((0, 0), (0, 0))

    def deadline(self, nbytes: int) -> float:
        """Return when a message of ``nbytes`` that starts now has to be over, a time of `time.monotonic`."""
        return time.monotonic() + self._timeout_s + nbytes * _SECONDS_A_BYTE

    def send(self, header: bytes, address: int = 0, nbytes: int = 0, deadline: float | None = None) -> None:
        """Send ``header`` and then ``nbytes`` bytes at ``address``. For one thread at a time.

        ``deadline`` is that of the message whose part this is; without it, this is a whole one.

        Raises:
            DeadlineError, BrokenError: part of it may have gone.
            ClosedError: `end` was called.

        """
        left = len(header) + nbytes
        deadline = deadline or self.deadline(left)
        # One array for all messages: building one would cost as much as the call that sends it.
        self._out_head[: len(header)] = header
        iov = self._out
        iov[0, 0], iov[0, 1], iov[1, 0], iov[1, 1] = self._out_address, len(header), address, nbytes
        fd = self._enter(_SENDS)
        try:
            while left:
                try:
                    done = self._io.send(fd, iov)
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
            self._leave(_SENDS)

    def recv(self, address: int, nbytes: int, *, idle: bool = False, deadline: float | None = None) -> bool:
        """Receive ``nbytes`` bytes to ``address``, by ``deadline`` as in `send`. For one thread at a time.

        With ``idle``, nothing of a message has come yet: running out of time before
        the first byte returns ``False`` and harms nothing.

        Raises:
            DeadlineError, BrokenError: part of it may have come.
            ClosedError: `end` or `stop_receiving` was called.

        """
        deadline = deadline or self.deadline(nbytes)
        fd = self._enter(_RECEIVES)
        try:
            while nbytes:
                try:
                    done = self._io.recv_at(fd, address, nbytes, socket.MSG_WAITALL)
                except InterruptedError:
                    continue  # a signal; its Python handler ran on the way here
                except BlockingIOError:
                    # With TLS, bytes may come for ever that are no record yet.
                    if time.monotonic() < deadline and self._await_bytes(fd):
                        continue
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
                    if self._deaf:
                        raise ClosedError("this end was closed")
                    self._check(deadline, "a message comes too slowly")
        finally:
            self._leave(_RECEIVES)
        return True

    def _await_bytes(self, fd: int) -> bool:
        """Wait until there is something to receive; ``False`` if nothing comes in time."""
        try:
            waker = os.eventfd(0)
        except OSError as error:
            self._fail("receiving failed", error)
        try:
            with self._lock:
                self._check_open()
                self._waker = waker
            poll = select.poll()
            for waited in (fd, waker):
                poll.register(waited, select.POLLIN)
            came = poll.poll(1e3 * (self._timeout_s - self._blocked_s))
            self._check_open()
            return bool(came)
        finally:
            with self._lock:
                self._waker = None
            os.close(waker)

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
            leave = not any(self._users)
        if leave:
            self._part()

    def stop_receiving(self) -> None:
        """Let nobody receive any more and wake whoever is blocked in it; sending goes on. Never blocks."""
        with self._lock:
            if self._ended or self._deaf:
                return
            self._deaf = True
            if self._waker is not None:
                os.eventfd_write(self._waker, 1)

    def linger(self, loop: Reactor) -> None:
        """Wake whoever is blocked, and close once the peer has all that was sent. Never blocks."""
        self.stop_receiving()
        with self._lock:
            if self._ended:
                return
            self._ended, self._loop = True, loop
            # Not the other direction: with both shut, whatever the peer sends resets the connection,
            # and what it has not fetched by then is lost.
            with contextlib.suppress(OSError):  # the peer may be faster
                self._sock.shutdown(socket.SHUT_WR)
            leave = not any(self._users)
        if leave:
            self._part()

    def _part(self) -> None:
        """Give up the socket; the last user does so."""
        if self._loop is None:
            hang_up(self._sock)
        else:
            Farewell(self._loop, self._sock, self._timeout_s)

    def _enter(self, side: int) -> int:
        with self._lock:
            if self._ended or (side == _RECEIVES and self._deaf):
                raise ClosedError("this end was closed")
            self._users[side] += 1
            return self._sock.fileno()

    def _leave(self, side: int) -> None:
        with self._lock:
            self._users[side] -= 1
            leave = self._ended and not any(self._users)
        if leave:
            self._part()

    def _check(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            self._late(what)

    def _check_open(self) -> None:
        if self._ended or self._deaf:
            raise ClosedError("this end was closed")

    def _late(self, what: str) -> NoReturn:
        self._check_open()
        raise DeadlineError(f"{what} (time-out {self._timeout_s} s)")

    def _fail(self, what: str, error: OSError | None = None) -> NoReturn:
        self._check_open()
        raise BrokenError(f"{what}: {error}" if error else what) from error


def _timeval(seconds: float) -> bytes:
    # Rounded up: a timeval of zero would mean "for ever".
    return struct.pack("ll", int(seconds), min(999_999, int(seconds % 1 * 1e6) + 1))


def _header_memory() -> tuple[memoryview, int]:
    memory = np.empty(MAX_HEADER_BYTES + SEAL_BYTES, dtype=np.uint8)
    return memoryview(memory.data), int(memory.ctypes.data)
