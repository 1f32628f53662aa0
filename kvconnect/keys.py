"""Keys of the control channel: who is let in, and proof to a client of whom it talks to (CurveZMQ).

Either all engines hold one shared secret, from which both key pairs of the protocol
are derived; or each has a key pair of its own and knows the public keys of the others.
All that travels is encrypted, and what was recorded cannot be played again. Secrets
appear in no text that this module makes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from kvconnect.errors import ConfigError, HandshakeError

if TYPE_CHECKING:
    from kvconnect.loop import Loop

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES: Final = 4096
#: Shorter ones are guessed by whoever records one handshake.
_MIN_SECRET_CHARS: Final = 16
_Z85_CHARS: Final = 40
_SALT: Final = b"kvconnect control 1"
_MAKE_SHARED: Final = "openssl rand -hex 32 > FILE && chmod 600 FILE"
_MAKE_PAIR: Final = "python -m kvconnect keygen FILE"
_MAX_TOLD: Final = 64


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair; both in Z85, 40 characters."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> KeyPair:
        """Complete the pair of a secret key in Z85; raise `ValueError` if it is none."""
        if len(secret) != _Z85_CHARS:
            raise ValueError(f"a key has {_Z85_CHARS} characters, not {len(secret)}")
        try:
            return cls(zmq.curve_public(secret), secret)
        except zmq.ZMQError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Keys:
    """What one engine proves itself with, and whom it believes.

    Args:
        server: of its servers.
        client: of its clients.
        allowed: public keys of the clients that its servers let in.
        servers: public keys of the servers that its clients may trust.
        shared: derived from one secret of all engines; otherwise addresses name the key that
            answers there: ``"<public key>@host:port"``.

    """

    server: KeyPair
    client: KeyPair
    allowed: frozenset[bytes]
    servers: frozenset[bytes]
    shared: bool

    @classmethod
    def from_shared(cls, path: str, option: str) -> Keys:
        """Derive keys from the secret in the file ``path``, which ``option`` names in errors.

        Raises:
            ConfigError: the file cannot be read, others can read it, or it holds too little.

        """
        secret = _read(path, option, _MAKE_SHARED)
        if len(secret) < _MIN_SECRET_CHARS:
            raise ConfigError(
                f"{option}: {path} holds {len(secret)} characters, which can be guessed; "
                f"at least {_MIN_SECRET_CHARS} are needed ({_MAKE_SHARED})"
            )
        server, client = _derived(secret)
        return cls(server, client, frozenset([client.public]), frozenset([server.public]), shared=True)

    @classmethod
    def from_pair(cls, path: str, peers: Iterable[str], option: str, peers_option: str) -> Keys:
        """Read this engine's own secret key from ``path``; believe the public keys ``peers`` and its own.

        Raises:
            ConfigError: the file cannot be read, others can read it, or something is no key.

        """
        try:
            own = KeyPair.of(_read(path, option, _MAKE_PAIR))
        except ValueError:  # it says nothing of the content, neither does this
            raise ConfigError(f"{option}: {path} holds no CURVE secret key in Z85 ({_MAKE_PAIR})") from None
        known = {own.public, *(_public(key, f"{peers_option}[{i}]") for i, key in enumerate(peers))}
        return cls(own, own, frozenset(known), frozenset(known), shared=False)

    @property
    def name(self) -> str:
        """What comes before ``"@host:port"`` in this engine's addresses, if anything does."""
        return "" if self.shared else self.server.public.decode()

    def guard(self, sock: zmq.Socket[bytes], loop: Loop) -> None:
        """Let only holders of an allowed key in at ``sock``, which is to be bound after this."""
        _Door(loop, self.allowed)
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.server.secret)
        sock.setsockopt(zmq.ZAP_DOMAIN, b"kvconnect")
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without somebody to ask, nobody is let in

    def sign(self, sock: zmq.Socket[bytes], named: str) -> None:
        """Prove ourselves on ``sock``, and believe only the server whose key is ``named``.

        Raises:
            HandshakeError: that key is not one to trust, or no key is named where one has to be.

        """
        sock.setsockopt(zmq.CURVE_SERVERKEY, self._server_key(named))
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.client.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.client.secret)

    def _server_key(self, named: str) -> bytes:
        if named and self.shared:
            raise HandshakeError("the peer has a key pair of its own, this engine a key_file: set the same at both")
        if named:
            key = named.encode(errors="backslashreplace")  # which Z85 has not
            if key not in self.servers:
                raise HandshakeError("the public key in the peer's address is not among this engine's peer_keys")
            return key
        candidates = self.servers if self.shared else self.servers - {self.server.public}
        if len(candidates) != 1:
            raise HandshakeError("the address names no public key: write '<public key>@host:port'")
        return next(iter(candidates))


class _Door:
    """Answers libzmq's question whether a client is let in (ZAP 1.0), on the loop's thread."""

    def __init__(self, loop: Loop, allowed: frozenset[bytes]) -> None:
        self._allowed = {z85.decode(key) for key in allowed}
        self._told: set[bytes] = set()
        self._socket: zmq.Socket[bytes] = loop.context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        loop.watch(self._socket, self._answer)

    def _answer(self) -> None:
        # version, request id, domain, address, identity, mechanism, credentials
        frames = self._socket.recv_multipart(zmq.NOBLOCK)
        request, address, mechanism, *credentials = frames[1], frames[3], *frames[5:]
        known = mechanism == b"CURVE" and len(credentials) == 1 and credentials[0] in self._allowed
        if not known and address not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(address)
            logger.warning("a client at %s was turned away: its key is not allowed", address.decode(errors="replace"))
        verdict = (b"200", b"OK") if known else (b"400", b"key not allowed")
        self._socket.send_multipart([b"1.0", request, *verdict, b"", b""])


def make_pair(path: str) -> str:
    """Write a new secret key to the new file ``path``; return its public key.

    Raises:
        ConfigError: the file is there already or cannot be written.

    """
    public, secret = zmq.curve_keypair()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name a new file") from error
    return public.decode()


@functools.lru_cache(maxsize=4)  # it is slow on purpose, and both ends of an engine may live in one process
def _derived(secret: bytes) -> tuple[KeyPair, KeyPair]:
    raw = hashlib.scrypt(secret, salt=_SALT, n=1 << 14, r=8, p=1, dklen=64)
    server, client = (KeyPair.of(z85.encode(half)) for half in (raw[:32], raw[32:]))
    return server, client


def _read(path: str, option: str, cure: str) -> bytes:
    if not zmq.has("curve"):
        raise ConfigError(f"{option}: this pyzmq was built without CURVE; install one of its own wheels")
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the mode below is that of the very file that is read
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: cannot read {path}: {reason} (make one: {cure})") from error
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"{option}: {path} is open to other users (mode {mode & 0o777:o}); chmod 600 it")
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{option}: {path} is longer than {_MAX_FILE_BYTES} bytes: it is no key file ({cure})")
    return content.strip()


def _public(key: str, option: str) -> bytes:
    data = key.encode(errors="backslashreplace")  # which Z85 has not
    try:
        if len(data) == _Z85_CHARS:
            z85.decode(data)
            return data
    except (KeyError, struct.error):
        pass  # said below
    raise ConfigError(f"{option} is no public CURVE key in Z85 (40 characters, as printed by: {_MAKE_PAIR})")
