"""Where asking ends of TCP pipes arrive: one listening socket for each address of a process.

A newcomer says which pipe it belongs to with a one-time random token that was
exchanged over the control channel. Whoever knows no token is shown the door.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Final

from kvconnect.errors import ConfigError
from kvconnect.pipes import reactor
from kvconnect.pipes.reactor import Reactor
from kvconnect.pipes.tcp_farewell import hang_up

logger = logging.getLogger("kvconnect.pipes.tcp")

TOKEN_BYTES: Final = 16
GREETING: Final = b"kvctcp1\n"
HELLO_BYTES: Final = len(GREETING) + TOKEN_BYTES

_HELLO_TIMEOUT_S: Final = 5.0
#: Connections that have not shown a token yet; beyond, the one that has waited longest goes. Each costs a descriptor.
_MAX_NEWCOMERS: Final = 256
_PAUSE_S: Final = 0.2
_OUT_OF_DESCRIPTORS: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Called on the reactor's thread with a connected, non-blocking socket.
Arrival = Callable[[socket.socket], None]


class Listener:
    """One listening socket, kept while anybody uses it."""

    def __init__(self, loop: Reactor, host: str, port: int) -> None:
        """Listen at ``host``.

        Raises:
            ConfigError: the address cannot be bound.

        """
        if not is_host(host):
            raise ConfigError(f"pipe.bind_host must be an address or a host's name, got {host!r}")
        try:
            self._sock = socket.create_server((host, port), backlog=1024, family=_family(host))
        except OSError as error:
            raise ConfigError(f"pipe.bind_host: cannot listen on {host!r} port {port}: {error}") from error
        self._sock.setblocking(False)
        self.port: int = self._sock.getsockname()[1]
        self.users = 0
        self._loop = loop
        self._expected: dict[bytes, Arrival] = {}
        self._newcomers: dict[_Newcomer, None] = {}
        loop.watch(self._sock.fileno(), reactor.READ, self._accept)

    def expect(self, arrival: Arrival) -> bytes:
        """Return a new token; whoever brings it is handed to ``arrival``, once."""
        token = secrets.token_bytes(TOKEN_BYTES)
        self._expected[token] = arrival
        return token

    def forget(self, token: bytes) -> None:
        """Expect this token no more."""
        self._expected.pop(token, None)

    def close(self) -> None:
        """Stop listening."""
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()

    def drop_after_fork(self) -> None:
        """Close a forked child's copy of the socket, which would keep the port taken."""
        self._sock.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in _OUT_OF_DESCRIPTORS:
                self._pause(error)
            return  # else the newcomer left before it was accepted
        sock.setblocking(False)
        self._newcomers[_Newcomer(self._loop, sock, self._decide)] = None
        if len(self._newcomers) > _MAX_NEWCOMERS:
            next(iter(self._newcomers)).leave()

    def _pause(self, error: OSError) -> None:
        # The connection stays in the backlog and would wake the loop at once, again and again.
        logger.warning("cannot accept a connection: %s", error)
        fd = self._sock.fileno()
        if fd < 0:
            return
        self._loop.change(fd, 0)
        self._loop.call_later(_PAUSE_S, lambda: self._resume(fd))

    def _resume(self, fd: int) -> None:
        if self._sock.fileno() == fd:
            self._loop.change(fd, reactor.READ)

    def _decide(self, newcomer: _Newcomer, hello: bytes | None, sock: socket.socket) -> None:
        if newcomer not in self._newcomers:
            return  # decided already
        del self._newcomers[newcomer]
        if hello is None:
            hang_up(sock)
        else:
            self._admit(hello, sock)

    def _admit(self, hello: bytes, sock: socket.socket) -> None:
        greeting, token = hello[: len(GREETING)], hello[len(GREETING) :]
        arrival = self._expected.pop(token, None) if greeting == GREETING else None
        if arrival is None:
            logger.warning("a connection without a valid token was closed")
            hang_up(sock)
            return
        arrival(sock)


class _Newcomer:
    """A connection that has not shown its token yet; ``over`` gets its hello, or ``None`` for a stranger."""

    def __init__(
        self, loop: Reactor, sock: socket.socket, over: Callable[[_Newcomer, bytes | None, socket.socket], None]
    ) -> None:
        self._loop, self._sock, self._over = loop, sock, over
        self._hello = b""
        self._timer = loop.call_later(_HELLO_TIMEOUT_S, self.leave)
        loop.watch(sock.fileno(), reactor.READ, self._read)

    def _read(self, _events: int) -> None:
        try:
            part = self._sock.recv(HELLO_BYTES - len(self._hello))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        self._hello += part
        if not part or not GREETING.startswith(self._hello[: len(GREETING)]):
            self.leave()
        elif len(self._hello) == HELLO_BYTES:
            self._end(self._hello)

    def leave(self) -> None:
        """Go, without having shown a token."""
        self._end(None)

    def _end(self, hello: bytes | None) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._sock.fileno())
        self._over(self, hello, self._sock)


_listeners: dict[tuple[str, int], Listener] = {}
_lock = threading.Lock()


def acquire(loop: Reactor, host: str, port: int) -> Listener:
    """Return the process's listener at ``host`` (``port`` 0: any free one); `release` it after use."""
    with _lock:
        listener = _listeners.get((host, port))
        if listener is None:
            listener = _listeners[host, port] = Listener(loop, host, port)
        listener.users += 1
        return listener


def release(listener: Listener) -> None:
    """Give a listener back; the last user closes it."""
    with _lock:
        listener.users -= 1
        if listener.users:
            return
        for key in [key for key, one in _listeners.items() if one is listener]:
            del _listeners[key]
        listener.close()


def is_host(host: str) -> bool:
    """Whether ``host`` has the form of an address or a host's name; others make `socket` raise other errors."""
    try:
        return b"\0" not in host.encode("idna")
    except UnicodeError:
        return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a thread that does not exist in the child may hold it
    _lock = threading.Lock()
    for listener in _listeners.values():
        listener.drop_after_fork()
    _listeners.clear()


os.register_at_fork(after_in_child=_after_fork)
