"""TLS 1.3 for the TCP pipe: both ends show a certificate that the other end's authority has signed.

Names in certificates are not compared with addresses. An end is known by the control channel
that it is met over, which hands out the address (of an interface, behind NAT, of a container: what
certificates seldom name), and by the secret that came over that channel and that it shows
inside TLS (`kvconnect.pipes.tcp_handshake`). So the authority has to be one of these engines' own;
of a public one, everybody has certificates.

Python's ``ssl`` (OpenSSL) works on memory, never on the socket: so the calls that wait for the
socket, and all that ends a connection, are those of a plain one. Nothing here relies on TLS's own end
mark: the pipe's end marks travel inside. A certificate that runs out ends no connection that stands. Python
cannot renew keys, and RFC 8446 (5.5) would have AES-GCM's renewed after 390 GB: past that, an
observer's chance to tell the traffic from noise is no longer below 2**-57, and grows slowly.
"""

from __future__ import annotations

import errno
import os
import ssl
import threading
from dataclasses import dataclass, fields
from typing import Final, cast

import numpy as np

from kvconnect.errors import ConfigError
from kvconnect.paging import IoVec
from kvconnect.pipes import vectored
from kvconnect.sums import room, view

#: Encrypted at once, and fetched at once: what each connection holds in memory, in each direction.
_PART_BYTES: Final = 256 << 10
#: Looked at, at once, of pieces of memory.
_PIECES: Final = 64
_CURE: Final = "name a file in PEM format that this user may read"


@dataclass(frozen=True)
class TlsOptions:
    """Option ``tls`` of the TCP pipe: paths of PEM files, read anew for every pipe.

    Args:
        cert: this end's certificate (and those between it and the authority), good for clients and servers.
        key: its key, not encrypted.
        ca: certificates of the authorities that may have signed the other end's.

    """

    cert: str = ""
    key: str = ""
    ca: str = ""

    def context(self, *, server_side: bool) -> ssl.SSLContext:
        """Return what handshakes start from.

        Raises:
            ConfigError: a file is missing or is not what it should be.

        """
        for field in fields(self):
            _check_file(f"pipe.tls.{field.name}", getattr(self, field.name))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # why: see the module
        context.verify_mode = ssl.CERT_REQUIRED
        if server_side:
            context.num_tickets = 0  # no connection is ever resumed
        try:
            # A key that is encrypted must not ask for its password on the engine's terminal.
            context.load_cert_chain(self.cert, self.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"pipe.tls.cert, pipe.tls.key: {self.cert!r} and {self.key!r} are no certificate and its key "
                f"({error}); both have to be in PEM format, the key not encrypted"
            ) from error
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"pipe.tls.ca: {self.ca!r} holds no certificates ({error}); {_CURE}") from error
        return context


def _check_file(option: str, path: str) -> None:
    try:
        with open(path, "rb"):  # noqa: PTH123 - whether it can be read; OpenSSL does not say which file cannot
            return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: cannot read {path!r} ({reason}); {_CURE}") from error


class TlsIo:
    """TLS over one connected socket, for one sending and one receiving thread: an `kvconnect.pipes.tcp_io.Io`."""

    def __init__(self, context: ssl.SSLContext, preface: bytes = b"") -> None:
        """Be one side of a handshake to come, which `tls` is for; ``preface`` is sent ahead, as it is."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._outgoing.write(preface)
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=context.protocol is ssl.PROTOCOL_TLS_SERVER
        )
        #: OpenSSL's state is one for both directions. No system call is made under this lock.
        self._lock = threading.Lock()
        self.pending = True
        self._fetched = np.empty(_PART_BYTES, dtype=np.uint8)
        #: What the socket has not taken of the last part, and the bytes that it was made from and that are not gone.
        self._left = vectored.pieces()
        self._blob = np.empty(0, dtype=np.uint8)
        self._owed = 0

    def send(self, fd: int, iov: IoVec) -> int:
        """Send from the front of ``iov``; the last byte of a part counts as sent once all of the part is.

        After less than all has gone, or `BlockingIOError`, the next call must be for the rest: it is encrypted already.

        Raises:
            OSError: as `kvconnect.pipes.vectored.send`, or of TLS.

        """
        if not len(self._left):
            self._owed = self._encrypt(iov)
        sent = self.flush(fd)
        done = min(sent, self._owed - 1) if len(self._left) else self._owed
        self._owed -= done
        return done

    def recv(self, fd: int, iov: IoVec) -> int:
        """Receive to the front of ``iov``. Zero is the end of the connection, in order or not.

        Raises:
            OSError: as `kvconnect.pipes.vectored.recv`, or of TLS. `BlockingIOError` also if less than
                a record has come.

        """
        done = self._decrypt(iov) if self.pending else 0
        if done or not self.fetch(fd):
            return done
        done = self._decrypt(iov)
        if not done:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return done

    def recv_at(self, fd: int, address: int, count: int, flags: int = 0) -> int:
        """Receive to one piece of memory; as `recv`. Flags have no meaning here."""
        return self.recv(fd, vectored.pieces((address, count)))

    def flush(self, fd: int) -> int:
        """Send what TLS has to say; return the bytes sent, of which some may be left."""
        if not len(self._left):
            with self._lock:
                blob = self._outgoing.read()
            if not blob:
                return 0
            self._blob = np.frombuffer(blob, dtype=np.uint8)  # keeps it alive
            self._left = vectored.pieces((self._blob.ctypes.data, len(blob)))
        sent = vectored.send(fd, self._left)
        self._left = vectored.advance(self._left, sent)
        return sent

    @property
    def flushed(self) -> bool:
        """Whether the socket has taken all that TLS had to say."""
        return not len(self._left) and not self._outgoing.pending

    def fetch(self, fd: int) -> int:
        """Receive for TLS, in one call; return how many bytes."""
        done = vectored.recv_at(fd, self._fetched.ctypes.data, _PART_BYTES)
        with self._lock:
            self._incoming.write(self._fetched.data[:done])
        return done

    def _encrypt(self, iov: IoVec) -> int:
        taken = 0
        with self._lock:
            for address, nbytes in iov[:_PIECES].tolist():
                part = view(address, min(nbytes, _PART_BYTES - taken))
                if part:
                    taken += self.tls.write(part)
        return taken

    def _decrypt(self, iov: IoVec) -> int:
        done = 0
        with self._lock:
            self.pending = True
            for address, nbytes in iov[:_PIECES].tolist():
                at = 0
                while at < nbytes:
                    want = min(nbytes - at, _PART_BYTES)
                    try:
                        got = cast("int", self.tls.read(want, room(address + at, want)))
                    except ssl.SSLWantReadError:
                        self.pending = False
                        return done + at
                    if not got:
                        raise ConnectionResetError(errno.ECONNRESET, "the peer ended TLS")
                    at += got
                done += nbytes
        return done
