"""How the two ends of a TCP pipe find each other, and the pipe's options.

The serving end exchanges an address and two one-time tokens, one for the tensors'
connection and one for the blocks'. The asking end connects to the first at once
and to the second when it is attached to paged memory. If both have certificates, each
connection is secured first (`kvconnect.pipes.tcp_handshake`); if only one has, they do not meet.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from kvconnect.config import parse_options
from kvconnect.errors import BrokenError, ConfigError, DeadlineError, HandshakeError, KVConnectError
from kvconnect.pipes import tcp_listener
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.reactor import Reactor
from kvconnect.pipes.tcp_blocks import BlockConnection
from kvconnect.pipes.tcp_farewell import hang_up
from kvconnect.pipes.tcp_handshake import SECRET_BYTES, Handshake, Joined, Met
from kvconnect.pipes.tcp_io import PLAIN
from kvconnect.pipes.tcp_listener import GREETING, TOKEN_BYTES
from kvconnect.pipes.tcp_messages import messages
from kvconnect.pipes.tcp_tls import TlsOptions

_VERSION: Final = 2
_WILDCARDS: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - only looked for, to be refused
#: How long the asking end may still arrive at a serving end that has closed, to be told so.
_LATE_S: Final = 2.0
#: Bytes that wait to be sent stay in the processor's cache: a sixth less processor time a byte, as
#: measured between two processes. A smaller *receive* buffer costs more than it saves.
_SAME_HOST_SEND_BYTES: Final = 512 << 10


@dataclass(frozen=True)
class TcpOptions:
    """Options of the TCP pipe.

    Args:
        bind_host: address that the serving end listens on, if it is not the engine's.
        port: port that it listens on; 0 takes a free one. All pipes of a process share it.
        advertise_host: address that the asking end is told, if it is not that (NAT).
        chunk_bytes: most bytes of one block transfer before another has its turn.
        max_message_bytes: largest tensor that is sent, or accepted from the peer.
        checksum: send sums of all that is sent, and compare them with what has landed before it
            counts as received. On for both ends if either wants it. Unless it is set, it is wanted
            without TLS only, which lets no damage pass either (but between socket and memory).
        tls: ``{"cert": path, "key": path, "ca": path}``, see `TlsOptions`: encrypt everything, and let
            nobody in who has no certificate of the authority. Both ends, or neither.
        socket_buffer_bytes: the kernel's buffers for each connection; 0 leaves them to the kernel
            (but for 512 KiB to send within one host).

    """

    bind_host: str | None = None
    port: int = 0
    advertise_host: str | None = None
    chunk_bytes: int = 1 << 20
    max_message_bytes: int = 64 << 30
    checksum: bool | None = None
    tls: Mapping[str, Any] | None = None
    socket_buffer_bytes: int = 0

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> TcpOptions:
        """Read a pipe's options; raise `ConfigError` if one is unknown or out of range."""
        parsed = parse_options(cls, options, "pipe")
        for name, least in (("chunk_bytes", 4096), ("max_message_bytes", 1), ("socket_buffer_bytes", 0)):
            if getattr(parsed, name) < least:
                raise ConfigError(f"pipe.{name} must be at least {least}, got {getattr(parsed, name)}")
        if not 0 <= parsed.port <= 65535:
            raise ConfigError(f"pipe.port must be a TCP port (0 to 65535), got {parsed.port}")
        if parsed.bind_host in _WILDCARDS and not parsed.advertise_host:
            raise ConfigError(f"pipe.advertise_host is needed when pipe.bind_host is {parsed.bind_host!r}")
        return parsed

    def addresses(self, spec: PipeSpec) -> tuple[str, str]:
        """Return where to listen, and what to tell the other end."""
        if self.bind_host is not None:
            return self.bind_host, self.advertise_host or self.bind_host
        return spec.bind_host, self.advertise_host or spec.advertise_host or spec.bind_host

    @property
    def wants_checksum(self) -> bool:
        """Whether this end wants checksums."""
        return self.tls is None if self.checksum is None else self.checksum

    def context(self, *, server_side: bool) -> ssl.SSLContext | None:
        """Return what TLS starts from, if it is wanted; raise `ConfigError` as `TlsOptions.context`."""
        if self.tls is None:
            return None
        return parse_options(TlsOptions, self.tls, "pipe.tls").context(server_side=server_side)

    def tune(self, sock: socket.socket, *, same_host: bool) -> None:
        """Set a connection's buffers."""
        if self.socket_buffer_bytes:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, self.socket_buffer_bytes)
        elif same_host:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SAME_HOST_SEND_BYTES)


def same_host(sock: socket.socket) -> bool:
    """Whether a connection leads to this host."""
    try:
        return bool(sock.getpeername()[0] == sock.getsockname()[0])
    except OSError:
        return False  # gone already


class Serving:
    """The end that listens."""

    def __init__(self, loop: Reactor, spec: PipeSpec, options: TcpOptions, joined: Joined) -> None:
        """Listen, and tell the other end where and with which tokens.

        Raises:
            ConfigError: the address cannot be bound, or certificates cannot be read.
            HandshakeError: the other end's message is malformed, or only one end wants TLS.

        """
        self._loop, self._options, self._joined = loop, options, joined
        context, secret = options.context(server_side=True), secrets.token_bytes(SECRET_BYTES)
        self._begin = None if context is None else partial(Handshake, loop, context, secret, spec.timeout_s)
        self._handshakes: list[Handshake] = []
        self._lock = threading.Lock()
        self._blocks: BlockConnection | None = None
        self._parked: tuple[socket.socket, Met] | None = None
        self._arrived = self._ended = self._released = False
        host, told = options.addresses(spec)
        self._listener = tcp_listener.acquire(loop, host, options.port)
        self._tokens = self._listener.expect(self._arrive), self._listener.expect(self._arrive_blocks)
        try:
            theirs = spec.exchange(
                {
                    "tcp": _VERSION,
                    "checksum": options.wants_checksum,
                    "tls": context is not None,
                    "secret": secret,
                    "host": told,
                    "port": self._listener.port,
                    "token": self._tokens[0],
                    "blocks": self._tokens[1],
                }
            )
            self.checksum = options.wants_checksum | _wants_checksum(theirs)
            _check_tls(theirs, ours=context is not None)
            self.messages = messages(checksum=self.checksum)
        except BaseException:
            self.end(at_once=True)
            raise

    def meet_blocks(self, blocks: BlockConnection) -> None:
        """Hand the blocks' connection over, now or when it arrives."""
        with self._lock:
            self._blocks, parked, self._parked = blocks, self._parked, None
        if parked is not None:
            self._loop.call_soon(lambda: blocks.accept(*parked))

    def end(self, *, at_once: bool) -> None:
        """Expect nobody any more. Unless ``at_once``, who is on the way is still let in, to be told the end."""
        with self._lock:
            parked, self._parked, self._ended = self._parked, None, True
            late = not self._arrived and not at_once
        if parked is not None and not isinstance(parked[1], KVConnectError):
            hang_up(parked[0])
        for handshake in self._handshakes if at_once else ():
            handshake.cancel()
        if late:
            self._loop.call_later(_LATE_S, self._release)
        else:
            self._release()

    def _arrive(self, sock: socket.socket) -> None:
        with self._lock:
            self._arrived = True
        self._secure(sock, self._joined)

    def _arrive_blocks(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the newcomer has gone; reading from it will tell
            self._options.tune(sock, same_host=same_host(sock))
        self._secure(sock, self._joined_blocks)

    def _joined_blocks(self, sock: socket.socket, met: Met) -> None:
        with self._lock:
            blocks = self._blocks
            if blocks is None and not self._ended:
                self._parked = sock, met
                return
        if blocks is not None:
            blocks.accept(sock, met)
        elif not isinstance(met, KVConnectError):
            hang_up(sock)

    def _secure(self, sock: socket.socket, joined: Joined) -> None:
        if self._begin is None:
            joined(sock, PLAIN)
            return
        handshake = self._begin(sock)
        self._handshakes.append(handshake)
        handshake.then(joined)

    def _release(self) -> None:
        with self._lock:
            first, self._released = not self._released, True
        if first:
            for token in self._tokens:
                self._listener.forget(token)
            tcp_listener.release(self._listener)


class Asking:
    """The end that connects."""

    def __init__(self, loop: Reactor, spec: PipeSpec, options: TcpOptions, joined: Joined) -> None:
        """Learn where the other end listens and connect.

        Raises:
            ConfigError: certificates cannot be read.
            HandshakeError: the other end's message is malformed, or one end refuses the other's TLS.
            BrokenError, DeadlineError: it cannot be reached.

        """
        self._loop, self._options = loop, options
        context = options.context(server_side=False)
        theirs = spec.exchange({"tcp": _VERSION, "checksum": options.wants_checksum, "tls": context is not None})
        #: Whether either end wants sums.
        self.checksum = options.wants_checksum | _wants_checksum(theirs)
        _check_tls(theirs, ours=context is not None)
        self.messages = messages(checksum=self.checksum)
        host, port, token, self._blocks_token = _checked(theirs)
        spec.check(f"{host}:{port}")
        self._secure = None if context is None else partial(Handshake, loop, context, _secret(theirs), spec.timeout_s)
        hello = GREETING + token
        with _reaching(host, port, spec.timeout_s):
            sock = socket.create_connection((host, port), spec.timeout_s)
            try:
                if self._secure is None:
                    sock.sendall(hello)
                self._family, self._address = sock.family, sock.getpeername()
                self._same_host = same_host(sock)
            except BaseException:
                hang_up(sock)
                raise
        joined(sock, PLAIN if self._secure is None else self._secure(sock, hello).wait())

    def meet_blocks(self, blocks: BlockConnection) -> None:
        """Connect for blocks, in the background."""
        hello = GREETING + self._blocks_token
        self._loop.call_soon(lambda: blocks.connect(self._block_socket, self._address, hello, self._secure))

    def _block_socket(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._options.tune(sock, same_host=self._same_host)
        except OSError:
            sock.close()
            raise
        return sock

    def end(self, *, at_once: bool) -> None:
        """Nothing is held here."""


@contextlib.contextmanager
def _reaching(host: str, port: int, timeout_s: float) -> Iterator[None]:
    """Map what goes wrong on the way to an address that a peer named."""
    try:
        yield
    except TimeoutError as error:
        raise DeadlineError(f"no connection to {host!r} port {port} within {timeout_s} s") from error
    except OSError as error:
        raise BrokenError(f"cannot reach {host!r} port {port}: {error}") from error


def _wants_checksum(theirs: Mapping[str, Any]) -> bool:
    if theirs.get("tcp") != _VERSION:
        raise HandshakeError(f"ours is version {_VERSION} of the tcp pipe, theirs {theirs.get('tcp')!r}")
    wants = theirs.get("checksum")
    if not isinstance(wants, bool):
        raise HandshakeError(f"the peer did not say whether it wants checksums, but {wants!r}")
    return wants


def _check_tls(theirs: Mapping[str, Any], *, ours: bool) -> None:
    if theirs.get("tls", False) is not ours:
        raise HandshakeError(
            f"{'ours' if ours else 'the peer'} is a tcp pipe with certificates (pipe.tls), "
            f"{'the peer' if ours else 'ours'} one without: set pipe.tls at both ends or at neither"
        )


def _secret(theirs: Mapping[str, Any]) -> bytes:
    secret = theirs.get("secret")
    if not isinstance(secret, bytes) or len(secret) != SECRET_BYTES:
        raise HandshakeError("the peer sent no secret for TLS")
    return secret


def _checked(theirs: Mapping[str, Any]) -> tuple[str, int, bytes, bytes]:
    host, port = theirs.get("host"), theirs.get("port")
    tokens = [theirs.get("token"), theirs.get("blocks")]
    named = isinstance(host, str) and host and tcp_listener.is_host(host)
    if not named or not isinstance(port, int) or not 0 < port <= 65535:
        raise HandshakeError(f"the peer sent no address to connect to: {host!r} port {port!r}")
    if not all(isinstance(token, bytes) and len(token) == TOKEN_BYTES for token in tokens):
        raise HandshakeError("the peer sent no tokens")
    return str(host), port, bytes(theirs["token"]), bytes(theirs["blocks"])
