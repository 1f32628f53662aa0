"""How a TCP connection ends without taking back what was sent over it."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from typing import Final

from kvconnect.pipes import reactor
from kvconnect.pipes.reactor import Reactor

_DRAIN_BYTES: Final = 64 << 10
_DRAINS: Final = 16


def hang_up(sock: socket.socket) -> None:
    """Close ``sock`` so that the peer hears of it, although a forked child may hold a copy. Never raises."""
    with contextlib.suppress(OSError):  # not connected, or the peer was faster
        sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):  # the descriptor is given back nevertheless
        sock.close()


class Farewell:
    """Stays after this end has closed, until the peer's kernel has everything or the peer ends, too.

    Closing a socket with unread data resets the connection, and what the peer's
    kernel does not have by then is lost. So what the peer still sends is dropped,
    and answered with a reset once nothing of ours is on its way any more: a sender
    learns that nobody receives. (What has reached the peer's kernel stays readable
    there after a reset.)
    """

    def __init__(self, loop: Reactor, sock: socket.socket, timeout_s: float) -> None:
        """Take over ``sock``, whose user has left. From any thread; never blocks.

        Args:
            loop: what drops the peer's bytes.
            sock: a connected socket; its sending side may be shut.
            timeout_s: after this long it is closed anyhow.

        """
        self._loop, self._sock = loop, sock
        sock.setblocking(False)
        if self._is_over():
            hang_up(sock)
            return
        self._timer = loop.call_later(timeout_s, self._leave)
        loop.watch(sock.fileno(), reactor.READ | reactor.EDGE, self._read)

    def _read(self, _events: int) -> None:
        if self._is_over():
            self._leave()

    def _leave(self) -> None:
        self._timer.cancel()
        if self._sock.fileno() >= 0:
            self._loop.unwatch(self._sock.fileno())
            hang_up(self._sock)

    def _is_over(self) -> bool:
        """Drop what has come; return whether closing now loses nothing."""
        try:
            for _ in range(_DRAINS):
                came = self._sock.recv(_DRAIN_BYTES)
                if not came or _unacknowledged(self._sock) == 0:
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True  # a reset is an end as well
        # Others have their turn; there will be no edge for what has come already.
        self._loop.call_soon(lambda: self._read(0))
        return False


def _unacknowledged(sock: socket.socket) -> int:
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])
