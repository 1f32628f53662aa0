"""Frames over one TCP connection: four bytes of length, little-endian, then as many of content.

Either end greets first; nothing else leaves before the other's greeting has come, so that
no request waits in the kernel of a host whose process does not read.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from kvconnect.errors import BrokenError
from kvconnect.loop import Loop

_GREETING = b"kvconnect control 1\r\n"
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
#: What may wait for a peer that does not read.
_MOST_WAITING_BYTES = 64 << 20
#: A host that vanishes without closing its connections is noticed by these only.
_KEEPALIVE_S, _VANISHED_S = 5, 15
_BOTH = select.EPOLLIN | select.EPOLLOUT


class Frames:
    """One connection. Frames leave from any thread and arrive on the loop's.

    Args:
        loop: whose thread receives.
        limit_bytes: longest frame that is taken.
        on_frame: called with each frame.
        on_end: called once with what the peer did, unless `close` came first.

    """

    def __init__(
        self, loop: Loop, limit_bytes: int, on_frame: Callable[[bytes], None], on_end: Callable[[str], None]
    ) -> None:
        self._loop, self._limit, self._on_frame, self._on_end = loop, limit_bytes, on_frame, on_end
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._connecting = False
        #: The peer has greeted, so that it speaks this protocol and reads.
        self.ready = False
        self._ended = False
        self._stuck = False
        self._in, self._out = bytearray(), bytearray()

    def send(self, data: bytes) -> bool:
        """Send a frame, now or when the peer takes more; ``False`` if the connection has ended.

        Raises:
            BrokenError: too much waits already; the connection goes on.

        """
        frame = _LENGTH.pack(len(data)) + data
        with self._lock:
            if self._ended:
                return False
            if len(self._out) > _MOST_WAITING_BYTES:
                raise BrokenError("it takes no more messages")
            idle = not self._out
            self._out += frame
            if idle and self.ready:
                self._write()
            return True

    # -- on the loop's thread ---------------------------------------------------------

    def connect(self, host: str, port: int) -> None:
        """Start to connect."""
        if self._ended:
            return
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(family, kind)
        except OSError as error:
            self._end(f"cannot be reached: {error.strerror}")
            return
        _tune(sock)
        failure = sock.connect_ex(address)
        if failure not in (0, errno.EINPROGRESS):
            sock.close()
            self._end(_refusal(failure))
            return
        with self._lock:
            self._socket, self._connecting = sock, True
        self._loop.watch(sock, self._happened, select.EPOLLOUT)

    def accept(self, sock: socket.socket) -> None:
        """Take over a connection that a listener has accepted."""
        _tune(sock)
        with self._lock:
            self._socket = sock
        self._loop.watch(sock, self._happened)
        self._greet(sock)

    def close(self, linger_s: float = 0.0) -> None:
        """End the connection; what waits to be sent has ``linger_s`` to leave. `on_end` is not called."""
        with self._lock:
            self._ended = True
            sock, self._socket = self._socket, None
            rest = bytes(self._out) if self.ready else b""
        if sock is None:
            return
        if rest and linger_s > 0:
            _send_rest(sock, rest, linger_s)
        self._loop.unwatch(sock)

    def _end(self, reason: str) -> None:
        if not self._ended:
            self.close()
            self._on_end(reason)

    def _happened(self, events: int) -> None:
        sock = self._socket
        if sock is None:
            return
        if self._connecting:
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                self._end(_refusal(failure))
                return
            if sock.getsockname() == sock.getpeername():  # so it is when nobody listens where we come from
                self._end(_refusal(errno.ECONNREFUSED))
                return
            self._connecting = False
            self._loop.await_events(sock, select.EPOLLIN)
            self._greet(sock)
            return
        if events & select.EPOLLOUT:
            with self._lock:
                self._write()
        if events & ~select.EPOLLOUT:
            self._read(sock)

    def _greet(self, sock: socket.socket) -> None:
        try:
            sock.send(_GREETING)  # an empty socket has room for it
        except OSError as error:
            self._end(f"closed the connection: {error.strerror}")

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"closed the connection: {error.strerror}")
            return
        if not data:
            self._end("closed the connection")
            return
        self._in += data
        if self.ready or self._greeted():
            self._take()

    def _greeted(self) -> bool:
        start = self._in[: len(_GREETING)]
        if not _GREETING.startswith(start):
            self._end("does not speak the control protocol")
        elif len(start) == len(_GREETING):
            del self._in[: len(_GREETING)]
            with self._lock:
                self.ready = True
                self._write()
        return self.ready

    def _take(self) -> None:
        while len(self._in) >= _LENGTH.size and not self._ended:
            (size,) = _LENGTH.unpack_from(self._in)
            if size > self._limit:
                self._end(f"sent {size} bytes at once, over the limit of {self._limit}")
                return
            end = _LENGTH.size + size
            if len(self._in) < end:
                return
            frame = bytes(memoryview(self._in)[_LENGTH.size : end])
            del self._in[:end]
            self._on_frame(frame)

    # -- under the lock -----------------------------------------------------------------

    def _write(self) -> None:
        """Send what waits as far as the socket takes it, and have the loop look after the rest."""
        sock = self._socket
        if sock is None or not self._out:
            return
        try:
            del self._out[: sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # the loop sees the end of the connection, too, and tells of it
        stuck = bool(self._out)
        if stuck != self._stuck:
            self._stuck = stuck
            self._loop.await_events(sock, _BOTH if stuck else select.EPOLLIN)


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _KEEPALIVE_S),
        (socket.TCP_KEEPINTVL, _KEEPALIVE_S),
        (socket.TCP_KEEPCNT, _VANISHED_S // _KEEPALIVE_S - 1),
        (socket.TCP_USER_TIMEOUT, _VANISHED_S * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _refusal(number: int) -> str:
    if number == errno.ECONNREFUSED:
        return "refuses connections"
    return f"cannot be reached: {errno.errorcode.get(number, number)}"


def _send_rest(sock: socket.socket, rest: bytes, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    try:
        while rest and (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            rest = rest[sock.send(rest) :]
    except OSError:
        return  # the peer is gone, or does not read
