"""The control channel: requests and replies between engines (msgpack in frames over TCP).

Hellos, claims and pipe openings travel here; blocks never do. A server runs on
one thread and a client on one thread, whatever the number of peers; what is sent leaves on
the caller's own thread, for a change of threads costs more than the message. By default
everything binds to loopback: the channel is neither encrypted nor authenticated,
so do not bind it to a network that you do not trust.
"""

from __future__ import annotations

import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from kvconnect import messages
from kvconnect.errors import BrokenError, ClosedError, ConfigError, DeadlineError, KVConnectError
from kvconnect.frames import Frames
from kvconnect.loop import Loop, Timer

logger = logging.getLogger(__name__)

Reply = Mapping[str, Any]
Handler = Callable[[dict[str, Any]], "Reply | Future[Reply]"]

_BACKLOG = 1024
_ACCEPT_AGAIN_S = 1.0  # after there were no file descriptors left
_LINGER_S = 0.2
_IDLE_S = 300.0  # a connection not used for this long is closed: each costs a descriptor


def address(endpoint: str) -> tuple[str, int]:
    """Return host and port of ``"host:port"``; raise `ConfigError` if it is none."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"a control address must look like 'host:port', got {endpoint!r}")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    """Bind a socket and listen; on all addresses of both families for ``"::"`` and ``"*"``."""
    name = "::" if host == "*" and socket.has_dualstack_ipv6() else host.strip("[]*") or None
    family, kind, _, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(where)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


class ControlServer:
    """Answers requests. Handlers run on its thread: they must not block, but may return a future."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, name: str = "kvconnect-control-server") -> None:
        """Bind and start.

        Args:
            host: address to bind; loopback by default.
            port: TCP port, 0 for a free one.
            name: of the thread.

        Raises:
            ConfigError: the address cannot be bound.

        """
        self.malformed = 0
        self._handlers: dict[str, Handler] = {}
        self._connections: set[Frames] = set()
        try:
            self._socket = _listen(host, port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; "
                "choose another bind_host or port (0 takes a free one)"
            ) from error
        self._loop = Loop(name)
        self._loop.watch(self._socket, self._accept)
        self.port: int = self._socket.getsockname()[1]
        self.endpoint = f"{host}:{self.port}"
        self._loop.start()

    def handle(self, op: str, handler: Handler) -> None:
        """Answer requests of ``op`` with ``handler(body)``."""
        self._handlers[op] = handler

    def close(self) -> None:
        """Stop answering. Idempotent, callable from any thread."""
        self._loop.soon(self._end_all)
        self._loop.close()

    # -- on the thread ----------------------------------------------------------

    def _accept(self, _: int) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone meanwhile
        except OSError as error:  # no more file descriptors: whoever waits is looked after when there may be some
            logger.warning("cannot accept a connection now: %s", error.strerror)
            self._loop.await_events(self._socket, 0)
            self._loop.later(_ACCEPT_AGAIN_S, lambda: self._loop.await_events(self._socket, select.EPOLLIN))
            return
        connection = Frames(
            self._loop,
            messages.MAX_MESSAGE_BYTES,
            lambda data: self._answer(connection, data),
            lambda reason: self._lost(connection, reason),
        )
        self._connections.add(connection)
        connection.accept(sock)

    def _lost(self, connection: Frames, reason: str) -> None:
        logger.debug("a peer %s", reason)
        self._connections.discard(connection)

    def _end_all(self) -> None:
        for connection in self._connections:
            connection.close(_LINGER_S)
        self._connections.clear()

    def _answer(self, connection: Frames, data: bytes) -> None:
        try:
            message = messages.unpack(data)
        except messages.MalformedError as error:
            self.malformed += 1
            logger.debug("dropped a malformed request: %s", error)
            return
        reply = partial(_reply, connection, message["id"])
        try:
            answer = self._call(message)
        except KVConnectError as error:
            reply(error)
        except Exception as error:  # a fault of ours: the peer must hear of it, the server must live on
            logger.exception("the handler of %r failed", message.get("op"))
            reply(KVConnectError(f"internal error in {message.get('op')!r}: {type(error).__name__}"))
        else:
            if isinstance(answer, Future):
                answer.add_done_callback(lambda done: reply(_outcome(done)))
            else:
                reply(answer)

    def _call(self, message: dict[str, Any]) -> Reply | Future[Reply]:
        messages.check_version(message)
        op, body = message.get("op"), message.get("body")
        handler = self._handlers.get(op) if isinstance(op, str) else None
        if handler is None or not isinstance(body, dict):
            raise KVConnectError(f"unknown operation {op!r}")
        return handler(body)


def _reply(connection: Frames, number: int, answer: Reply | KVConnectError) -> None:
    try:
        data = (
            messages.pack_error(number, answer)
            if isinstance(answer, KVConnectError)
            else messages.pack_reply(number, answer)
        )
    except KVConnectError as error:
        data = messages.pack_error(number, error)
    try:
        connection.send(data)  # if its peer is gone, so is the question
    except KVConnectError as error:
        logger.debug("a reply was dropped: %s", error)


def _outcome(done: Future[Reply]) -> Reply | KVConnectError:
    if done.cancelled():
        return ClosedError("the peer gave up answering")
    error = done.exception()
    if error is None:
        return done.result()
    return error if isinstance(error, KVConnectError) else KVConnectError(f"internal error: {type(error).__name__}")


class ControlClient:
    """Asks any number of peers, on one thread. A vanished peer fails its own calls only."""

    def __init__(self, name: str = "kvconnect-control-client") -> None:
        """Start the thread, called ``name``."""
        self._loop = Loop(name)
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._numbers = itertools.count(1)
        self._sweep: Timer | None = None
        self._closed = False
        self._loop.start()

    def call(self, endpoint: str, op: str, body: Mapping[str, Any], timeout_s: float) -> Future[dict[str, Any]]:
        """Send a request; never blocks.

        The future fails with `DeadlineError` (no answer in time; the request may
        still have been carried out), `BrokenError` (the peer is gone or refuses
        connections; likewise), `ClosedError` (this client was closed) or the
        `KVConnectError` that the peer answered with. Calls of one thread to one peer arrive
        in order. Its callbacks run on the client's thread.
        """
        future: Future[dict[str, Any]] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel: results never clash
        number = next(self._numbers)
        try:
            data = messages.pack_request(number, op, body)
            peer = self._join(endpoint, number, future)
        except KVConnectError as error:
            future.set_exception(error)
            return future
        what = f"{endpoint} did not answer {op!r} within {timeout_s:g} s"
        timer = self._loop.later(timeout_s, lambda: self._expire(peer, number, what))
        future.add_done_callback(lambda _: timer.cancel())
        try:
            peer.connection.send(data)
        except KVConnectError as error:
            reason = BrokenError(f"{endpoint}: {error}")
            self._loop.soon(lambda: peer.answer(number, reason))
        return future

    def later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Make ``call`` on the client's thread in ``delay_s`` seconds."""
        return self._loop.later(delay_s, call)

    def soon(self, call: Callable[[], None]) -> bool:
        """Make ``call`` on the client's thread; ``False`` if the client was closed."""
        return self._loop.soon(call)

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until what was posted before has run, so that its own calls count as made before `close`."""
        done = threading.Event()
        if self._loop.soon(done.set) and not self._loop.on_thread:
            done.wait(timeout_s)

    def close(self) -> None:
        """Fail what is unanswered and end the thread. Idempotent, callable from any thread."""
        with self._lock:
            self._closed = True
        self._loop.soon(self._close_peers)
        self._loop.close()

    def _join(self, endpoint: str, number: int, future: Future[dict[str, Any]]) -> _Peer:
        """Have a call wait on the connection to a peer, a new one if need be."""
        with self._lock:
            if self._closed:
                raise ClosedError("the control client was closed")
            peer = self._peers.get(endpoint)
            if peer is None:
                host, port = address(endpoint)
                peer = self._peers[endpoint] = _Peer(endpoint, self._loop, self._lost)
                self._loop.soon(lambda: self._connect(peer, host, port))
            peer.pending[number] = future
            peer.used = time.monotonic()
            return peer

    # -- on the thread ----------------------------------------------------------

    def _connect(self, peer: _Peer, host: str, port: int) -> None:
        peer.connection.connect(host, port)
        if self._sweep is None:
            self._sweep = self._loop.later(_IDLE_S / 2, self._close_idle)

    def _close_idle(self) -> None:
        """End connections that were not used for long; the next call opens another."""
        before = time.monotonic() - _IDLE_S
        with self._lock:
            idle = [peer for peer in self._peers.values() if not peer.pending and peer.used < before]
            for peer in idle:
                del self._peers[peer.endpoint]
            self._sweep = self._loop.later(_IDLE_S / 2, self._close_idle) if self._peers else None
        for peer in idle:
            peer.connection.close()

    def _expire(self, peer: _Peer, number: int, what: str) -> None:
        peer.answer(number, DeadlineError(what))
        if not peer.connection.ready:
            # Not to be delivered late, when the caller has long acted on the failure.
            self._lost(peer, "cannot be reached")

    def _lost(self, peer: _Peer, reason: str) -> None:
        with self._lock:
            if self._peers.get(peer.endpoint) is peer:
                del self._peers[peer.endpoint]
        peer.end(BrokenError(f"{peer.endpoint} {reason}"))

    def _close_peers(self) -> None:
        with self._lock:
            peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.end(ClosedError("the control client was closed"), _LINGER_S)


class _Peer:
    """One connection of the client, and the calls that wait on it.

    Whoever finds it among the client's peers, under the client's lock, may add a call;
    calls end on the client's thread.
    """

    def __init__(self, endpoint: str, loop: Loop, lost: Callable[[_Peer, str], None]) -> None:
        self.endpoint = endpoint
        self.pending: dict[int, Future[dict[str, Any]]] = {}
        self.used = 0.0
        self.connection = Frames(loop, messages.MAX_MESSAGE_BYTES, self._take, lambda reason: lost(self, reason))

    def answer(self, number: int, answer: dict[str, Any] | KVConnectError) -> None:
        """End a call; one that is over already stays what it is."""
        future = self.pending.pop(number, None)
        if future is None:
            return
        if isinstance(answer, KVConnectError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def end(self, error: KVConnectError, linger_s: float = 0.0) -> None:
        """Close the connection; its calls fail."""
        self.connection.close(linger_s)
        for number in list(self.pending):
            self.answer(number, error)

    def _take(self, data: bytes) -> None:
        try:
            message = messages.unpack(data)
        except messages.MalformedError as error:
            logger.debug("dropped a malformed reply of %s: %s", self.endpoint, error)
            return
        try:
            messages.check_version(message)
            if "error" in message:
                raise messages.error_of(message)
            body = message.get("body")
            if not isinstance(body, dict):
                raise BrokenError(f"{self.endpoint} sent a reply without a body")
        except KVConnectError as error:
            self.answer(message["id"], error)
        else:
            self.answer(message["id"], body)


def wait_for(future: Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """Wait for a call's answer in a thread that may block; raise its `KVConnectError`."""
    start = time.monotonic()
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        raise DeadlineError(f"no answer within {time.monotonic() - start:.1f} s") from error
