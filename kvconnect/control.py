"""The control channel: requests and replies between engines (pyzmq + msgpack).

Hellos, claims and pipe openings travel here; blocks never do. A server runs on
one thread and a client on one thread, whatever the number of peers. By default
everything binds to loopback. Without keys (`kvconnect.keys`) the channel is neither
encrypted nor authenticated: then do not bind it to a network that you do not trust.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvconnect import messages
from kvconnect.clock import SYSTEM, Clock
from kvconnect.errors import BrokenError, ClosedError, ConfigError, DeadlineError, HandshakeError, KVConnectError, named
from kvconnect.keys import Keys
from kvconnect.loop import Loop, Timer

logger = logging.getLogger(__name__)

Reply = Mapping[str, Any]
Handler = Callable[[dict[str, Any]], "Reply | Future[Reply]"]

_MOST_REFUSALS = 64  # that are told in the log
_BATCH = 64  # messages taken from one socket before the loop looks at the others
_MOST_UNREAD = 32  # messages of one connection; more of them wait at their sender, not in our memory
# A host that vanishes without closing its connections is noticed by heartbeats only. The client's say how long the
# server may wait for the next, so that the server's own, rarer ones are for strangers that send no end of a message:
# of thousands of connections twice as many would be felt.
_HEARTBEAT_MS = 5_000
_SERVER_HEARTBEAT_MS = 30_000
_HEARTBEAT_LIMIT_MS = 15_000
_LINGER_MS = 200
_HANDSHAKE_MS = 10_000  # a stranger who connects and says nothing holds a descriptor no longer
_IDLE_S = 300.0  # a connection not used for this long is closed: each costs sockets and descriptors


def _tune(sock: zmq.Socket[bytes], heartbeat_ms: int) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_LIMIT_MS)
    sock.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
    sock.setsockopt(zmq.RCVHWM, _MOST_UNREAD)


#: Nothing that ZeroMQ's own addresses give a meaning to, such as ";".
_HOST = re.compile(r"[A-Za-z0-9._:%\[\]-]+")


def split(endpoint: str) -> tuple[str, str, int]:
    """Return public key, host and port of ``"[key@]host:port"``; raise `ConfigError` if it is none."""
    key, _, place = endpoint.rpartition("@")
    host, _, port = place.rpartition(":")
    numeric = port.isascii() and port.isdecimal() and len(port) <= 5
    if not _HOST.fullmatch(host) or not numeric or not 0 < int(port) < 65536:
        raise ConfigError(f"a control address must look like 'host:port', got {endpoint!r}")
    return key, host, int(port)


class ControlServer:
    """Answers requests. Handlers run on its thread: they must not block, but may return a future."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "kvconnect-control-server",
        clock: Clock = SYSTEM,
        keys: Keys | None = None,
    ) -> None:
        """Bind and start.

        Args:
            host: address to bind; loopback by default.
            port: TCP port, 0 for a free one.
            name: of the thread.
            clock: its timers'.
            keys: who is let in; everybody, without.

        Raises:
            ConfigError: the address cannot be bound.

        """
        self.malformed = 0
        self._refused: set[str] = set()
        self._handlers: dict[str, Handler] = {}
        self._loop = Loop(name, clock)
        self._socket: zmq.Socket[bytes] = self._loop.context.socket(zmq.ROUTER)
        _tune(self._socket, _SERVER_HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        if keys is not None:
            keys.guard(self._socket, self._loop)
        self._loop.watch(self._socket, self._receive)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self._loop.close()
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; "
                "choose another bind_host or port (0 takes a free one)"
            ) from error
        bound = bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT))
        self.port = int(bound.rstrip(b"\0").rpartition(b":")[2])
        self.endpoint = f"{host}:{self.port}"
        self._loop.start()

    def handle(self, op: str, handler: Handler) -> None:
        """Answer requests of ``op`` with ``handler(body)``."""
        self._handlers[op] = handler

    def close(self) -> None:
        """Stop answering. Idempotent, callable from any thread."""
        self._loop.close(_LINGER_MS)

    # -- on the thread ----------------------------------------------------------

    def _receive(self) -> bool:
        for _ in range(_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._answer(frames)
        return False

    def _answer(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise messages.MalformedError("wrong number of frames")
            message = messages.unpack(frames[1])
        except messages.MalformedError as error:
            self.malformed += 1
            logger.debug("dropped a malformed request: %s", error)
            return
        reply = partial(self._reply, frames[0], message["id"])
        try:
            answer = self._call(message)
        except KVConnectError as error:
            reply(error)
        except Exception as error:  # a fault of ours: the peer must hear of it, the server must live on
            logger.exception("the handler of %r failed", message.get("op"))
            reply(KVConnectError(f"internal error in {message.get('op')!r}: {type(error).__name__}"))
        else:
            if isinstance(answer, Future):
                answer.add_done_callback(lambda done: self._loop.soon(lambda: reply(_outcome(done))) and None)
            else:
                reply(answer)

    def _call(self, message: dict[str, Any]) -> Reply | Future[Reply]:
        self._check_version(message)
        op, body = message.get("op"), message.get("body")
        handler = self._handlers.get(op) if isinstance(op, str) else None
        if handler is None or not isinstance(body, dict):
            raise KVConnectError(f"unknown operation {op!r}")
        return handler(body)

    def _check_version(self, message: dict[str, Any]) -> None:
        try:
            messages.check_version(message)
        except HandshakeError as error:
            # Versions are the peers' choice: the log must not grow with them.
            if str(error) not in self._refused and len(self._refused) < _MOST_REFUSALS:
                self._refused.add(str(error))
                logger.warning("a peer is refused: %s", named(error))
            raise

    def _reply(self, peer: bytes, number: int, answer: Reply | KVConnectError) -> None:
        try:
            data = (
                messages.pack_error(number, answer)
                if isinstance(answer, KVConnectError)
                else messages.pack_reply(number, answer)
            )
        except KVConnectError as error:
            data = messages.pack_error(number, error)
        try:
            self._loop.send(self._socket, [peer, data])
        except zmq.ZMQError as error:
            logger.debug("a reply was dropped, its peer is gone: %s", error)


def _outcome(done: Future[Reply]) -> Reply | KVConnectError:
    if done.cancelled():
        return ClosedError("the peer gave up answering")
    error = done.exception()
    if error is None:
        return done.result()
    return error if isinstance(error, KVConnectError) else KVConnectError(f"internal error: {type(error).__name__}")


class ControlClient:
    """Asks any number of peers, on one thread. A vanished peer fails its own calls only."""

    def __init__(
        self,
        name: str = "kvconnect-control-client",
        clock: Clock = SYSTEM,
        keys: Keys | None = None,
        check: Callable[[str], None] | None = None,
    ) -> None:
        """Start the thread, called ``name``; its deadlines are ``clock``'s.

        ``keys`` prove who we are and who the peers are. ``check`` raises a `KVConnectError`
        for an endpoint that must not be contacted.
        """
        self.clock = clock
        self._loop, self._keys = Loop(name, clock), keys
        #: Raises a `KVConnectError` for an endpoint that calls would not contact.
        self.check = check or _anybody
        self._peers: dict[str, _Peer] = {}
        self._number = 0
        self._sweep: Timer | None = None
        self._loop.start()

    def call(self, endpoint: str, op: str, body: Mapping[str, Any], timeout_s: float) -> Future[dict[str, Any]]:
        """Send a request; never blocks.

        The future fails with `DeadlineError` (no answer in time; the request may
        still have been carried out), `BrokenError` (the peer is gone or refuses
        connections; likewise), `ClosedError` (this client was closed) or the
        `KVConnectError` that the peer answered with. Calls to one peer arrive in order.
        Its callbacks run on the client's thread.
        """
        future: Future[dict[str, Any]] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel: results never clash
        if not self._loop.soon(lambda: self._send(endpoint, op, body, timeout_s, future)):
            future.set_exception(ClosedError("the control client was closed"))
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
        self._loop.soon(self._close_peers)
        self._loop.close(_LINGER_MS)

    # -- on the thread ----------------------------------------------------------

    def _send(
        self, endpoint: str, op: str, body: Mapping[str, Any], timeout_s: float, future: Future[dict[str, Any]]
    ) -> None:
        self._number += 1
        late = DeadlineError(f"{endpoint} did not answer {op!r} within {timeout_s:g} s")
        # First of all, so that the call ends whatever happens.
        timer = self._loop.later(timeout_s, partial(self._expire, endpoint, self._number, future, late))
        future.add_done_callback(lambda _: timer.cancel())
        try:
            data = messages.pack_request(self._number, op, body)
            peer = self._peers.get(endpoint) or self._connect(endpoint)
            peer.send(self._number, data, future)
        except KVConnectError as error:
            future.set_exception(error)

    def _connect(self, endpoint: str) -> _Peer:
        self.check(endpoint)
        peer = _Peer(endpoint, self._loop, self._lost, self._keys)
        self._peers[endpoint] = peer
        if self._sweep is None:
            self._sweep = self._loop.later(_IDLE_S / 2, self._close_idle)
        return peer

    def _close_idle(self) -> None:
        """End connections that were not used for long; the next call opens another."""
        before = self.clock.now() - _IDLE_S
        for peer in list(self._peers.values()):
            if not peer.pending and peer.used < before:
                self._lost(peer, f"{peer.endpoint} was not asked for long")
        self._sweep = self._loop.later(_IDLE_S / 2, self._close_idle) if self._peers else None

    def _expire(self, endpoint: str, number: int, future: Future[dict[str, Any]], late: DeadlineError) -> None:
        if future.done():
            return
        peer = self._peers.get(endpoint)
        if peer is not None:
            peer.pending.pop(number, None)
        future.set_exception(late)
        if peer is not None and not peer.connected:
            # Not to be delivered late, when the caller has long acted on the failure.
            self._lost(peer, f"{endpoint} cannot be reached")

    def _lost(self, peer: _Peer, reason: str) -> None:
        if self._peers.get(peer.endpoint) is peer:
            del self._peers[peer.endpoint]
        peer.end(BrokenError(reason))

    def _close_peers(self) -> None:
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.fail(ClosedError("the control client was closed"))


_OTHER_KEYS = "has no key where we have one, or another"
_ENDED = {
    zmq.EVENT_DISCONNECTED: "closed the connection",
    zmq.EVENT_CLOSED: "refuses connections",
    zmq.EVENT_CONNECT_RETRIED: "cannot be reached",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: f"does not speak the control protocol, or {_OTHER_KEYS}",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: f"ended the handshake: it is gone (behind a forwarder), or {_OTHER_KEYS}",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "does not let this engine's key in",
}


def _anybody(_endpoint: str) -> None:
    """Contact whoever is named."""


def _sockets(
    context: zmq.Context[zmq.Socket[bytes]], host: str, named: str, keys: Keys | None
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Return a connection's socket and its monitor."""
    sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    try:
        _tune(sock, _HEARTBEAT_MS)
        sock.setsockopt(zmq.HEARTBEAT_TTL, _HEARTBEAT_LIMIT_MS)
        # A reconnecting socket would replay what it had queued; a new one never does.
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.IPV6, int(":" in host))
        if keys is not None:
            keys.sign(sock, named)
        elif named:
            raise HandshakeError("the peer lets holders of keys in only, and this engine has none")
        return sock, sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | sum(_ENDED))
    except (zmq.ZMQError, HandshakeError):
        sock.close(linger=0)
        raise


class _Peer:
    """One connection of the client, and the calls that wait on it. Lives on the client's thread."""

    def __init__(self, endpoint: str, loop: Loop, lost: Callable[[_Peer, str], None], keys: Keys | None = None) -> None:
        self.endpoint = endpoint
        self.pending: dict[int, Future[dict[str, Any]]] = {}
        self.connected = False
        self.used = loop.clock.now()
        self._loop, self._lost = loop, lost
        try:
            named, host, port = split(endpoint)
            self._socket, self._monitor = _sockets(loop.context, host, named, keys)
        except ConfigError as error:
            raise BrokenError(f"{endpoint} cannot be reached: {error}") from error
        except HandshakeError as error:
            raise HandshakeError(f"{endpoint}: {error}") from error
        except zmq.ZMQError as error:  # out of sockets or file descriptors
            raise BrokenError(f"{endpoint} cannot be reached: {error.strerror}") from error
        loop.watch(self._socket, self._receive)
        loop.watch(self._monitor, self._notice)
        try:
            self._socket.connect(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self.end(BrokenError(str(error)))
            raise BrokenError(f"{endpoint} cannot be reached: {error}") from error

    def send(self, number: int, data: bytes, future: Future[dict[str, Any]]) -> None:
        self.pending[number] = future
        try:
            self._loop.send(self._socket, [data])
        except zmq.ZMQError as error:
            if not self.connected and error.errno == zmq.EAGAIN:
                return  # it was turned away already: the monitor is about to say why
            del self.pending[number]
            raise BrokenError(f"{self.endpoint} takes no more requests: {error.strerror}") from error
        self.used = self._loop.clock.now()

    def _receive(self) -> bool:
        for _ in range(_BATCH):
            if self._socket.closed:
                return False
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._take(data)
        return False

    def _take(self, data: bytes) -> None:
        try:
            message = messages.unpack(data)
        except messages.MalformedError as error:
            logger.debug("dropped a malformed reply of %s: %s", self.endpoint, error)
            return
        future = self.pending.pop(message["id"], None)
        if future is None:
            return  # came after its deadline
        try:
            messages.check_version(message)
            if "error" in message:
                raise messages.error_of(message)
            body = message.get("body")
            if not isinstance(body, dict):
                raise BrokenError(f"{self.endpoint} sent a reply without a body")
        except KVConnectError as error:
            future.set_exception(error)
        else:
            future.set_result(body)

    def _notice(self) -> None:
        event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"])
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connected = True
        elif event in _ENDED:
            if event == zmq.EVENT_DISCONNECTED:
                self._receive()  # replies that arrived before the connection ended
            self._lost(self, f"{self.endpoint} {_ENDED[event]}")

    def fail(self, error: KVConnectError) -> None:
        pending, self.pending = self.pending, {}
        for future in pending.values():
            future.set_exception(error)

    def end(self, error: KVConnectError) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._loop.unwatch(self._monitor)
            self._loop.unwatch(self._socket)
        self.fail(error)


def wait_for(future: Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """Wait for a call's answer in a thread that may block; raise its `KVConnectError`."""
    start = time.monotonic()
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        raise DeadlineError(f"no answer within {time.monotonic() - start:.1f} s") from error
