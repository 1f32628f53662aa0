"""One direction of a shared-memory pipe: packets over a Unix socket, and how two ends meet.

Packets (``SOCK_SEQPACKET``) arrive whole or not at all, so there is no half-sent
header. A lane carries one direction's messages and, the other way, the receiver's
replies to them; each end of it belongs to one thread at a time. Waiting is
blocking in the kernel; a peer that dies ends the wait, for its socket closes.
Sockets have abstract names: no file exists at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Final

from kvconnect.errors import BrokenError, DeadlineError, HandshakeError

log = logging.getLogger(__name__)

_TIMEVAL: Final = struct.Struct("@ll")
_BUFFER_BYTES: Final = 1 << 20
_TOKEN_BYTES: Final = 16
#: Between a peer's connecting and its introduction.
_GRACE_S: Final = 0.1
_CREDENTIALS: Final = struct.Struct("@iII")


class Lane:
    """One end of one direction."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        """Take over ``sock``; every wait on it lasts at most ``timeout_s``."""
        self._sock = sock
        self._timeout_s = timeout_s
        _set_timeout(sock, timeout_s)
        # As much as the system lets an ordinary user have.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def fileno(self) -> int:
        """Return the socket's fd."""
        return self._sock.fileno()

    def send(self, *parts: Any) -> None:
        """Send one packet made of buffers; nothing of it is sent if this raises.

        Raises:
            BrokenError: the peer receives no more.
            DeadlineError: there was no room in time.

        """
        try:
            self._sock.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise DeadlineError(f"the peer made no room within {self._timeout_s} s") from None
        except OSError as error:
            raise BrokenError(f"the peer is gone: {error.strerror}") from error

    def send_fd(self, packet: bytes, fd: int) -> None:
        """Send one packet and a file descriptor."""
        try:
            socket.send_fds(self._sock, [packet], [fd], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise DeadlineError(f"the peer made no room within {self._timeout_s} s") from None
        except OSError as error:
            raise BrokenError(f"the peer is gone: {error.strerror}") from error

    def recv_into(self, buffer: bytearray) -> int:
        """Receive one packet; return its length.

        Raises:
            BrokenError: the peer's end is gone and all it sent was received.
            DeadlineError: no packet came in time.

        """
        while True:
            try:
                got = self._sock.recv_into(buffer)
            except ConnectionResetError:
                # Reported once, ahead of packets that are still queued here.
                continue
            except BlockingIOError:
                raise DeadlineError(f"nothing came from the peer within {self._timeout_s} s") from None
            except OSError as error:
                raise BrokenError(f"the peer is gone: {error.strerror}") from error
            if not got:
                raise BrokenError("the peer is gone without saying goodbye")
            return got

    def recv_tag(self) -> int:
        """Receive a packet of one byte and return that."""
        packet = bytearray(2)
        if self.recv_into(packet) != 1:
            raise BrokenError("the peer sent a reply that makes no sense")
        return packet[0]

    def recv_fd(self, expected: bytes) -> int:
        """Receive the packet ``expected`` with a file descriptor and return that; the caller closes it.

        Raises:
            BrokenError: another packet came, or the peer is gone.
            DeadlineError: no packet came in time.

        """
        packet, fd = _recv_fd(self._sock)
        if packet != expected:
            os.close(fd)
            raise BrokenError("the peer sent a file descriptor that makes no sense")
        return fd

    def shutdown(self) -> None:
        """End both directions and wake whoever waits; what the peer has queued stays there."""
        _shutdown(self._sock)

    def close(self) -> None:
        """Free the fd. Nobody may be using it."""
        self._sock.close()


def hung_up(*lanes: Lane) -> bool:
    """Whether the peer's end of any is closed. Messages may still be queued here."""
    poll = select.poll()
    for lane in lanes:
        poll.register(lane, select.POLLRDHUP)
    return bool(poll.poll(0))


class Listener:
    """Where the serving end waits for its one peer."""

    def __init__(self) -> None:
        """Bind to a name that nobody can guess; raise `BrokenError` if the system gives no socket."""
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._name = "kvconnect-" + secrets.token_hex(16)
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise BrokenError(f"no socket to meet the peer at: {error.strerror}") from error
        try:
            self._sock.bind("\0" + self._name)
            self._sock.listen(4)
        except OSError as error:
            self._sock.close()
            raise BrokenError(f"no socket to meet the peer at: {error.strerror}") from error

    def invitation(self) -> dict[str, Any]:
        """Return what `connect` needs to know; msgpack-able."""
        return {"name": self._name, "token": self._token}

    def accept(self, wait_s: float, timeout_s: float, pid: int | None) -> tuple[Lane, Lane]:
        """Wait for the peer; return the lane to send on and the lane to receive from.

        Args:
            wait_s: how long to wait for it; may be 0.
            timeout_s: for the two lanes.
            pid: the process that is expected, if its number means something here.

        Raises:
            DeadlineError: the peer did not come in time.
            BrokenError: the listener was shut down.

        """
        deadline = time.monotonic() + wait_s
        while True:
            if not _readable(self._sock, deadline - time.monotonic()):
                raise DeadlineError(f"the peer did not connect within {wait_s} s")
            try:
                visitor, _ = self._sock.accept()
            except OSError as error:
                raise BrokenError(f"no longer listening: {error.strerror}") from error
            # The peer introduces itself as soon as it is connected.
            own = self._admit(visitor, max(deadline - time.monotonic(), _GRACE_S), pid)
            if own is not None:
                return Lane(own, timeout_s), Lane(visitor, timeout_s)
            log.warning("turned away a connection that is not the peer's")
            visitor.close()

    def _admit(self, visitor: socket.socket, wait_s: float, pid: int | None) -> socket.socket | None:
        """Return the socket that the peer brings for the other direction; ``None`` for a stranger."""
        raw = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if pid is not None and _CREDENTIALS.unpack(raw)[0] != pid:
            return None
        if not _readable(visitor, wait_s):
            return None
        try:
            token, fd = _recv_fd(visitor)
        except (BrokenError, DeadlineError):
            return None
        if not secrets.compare_digest(token, self._token):
            os.close(fd)
            return None
        try:
            brought = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)  # no socket at all
            return None
        if brought.family == socket.AF_UNIX and brought.type == socket.SOCK_SEQPACKET:
            return brought
        brought.close()
        return None

    def shutdown(self) -> None:
        """Wake whoever waits in `accept`."""
        _shutdown(self._sock)

    def close(self) -> None:
        """Free the fd."""
        self._sock.close()


def connect(invitation: Mapping[str, Any], timeout_s: float) -> tuple[Lane, Lane]:
    """Meet the listening end; return the lane to send on and the lane to receive from.

    Raises:
        HandshakeError: the invitation is malformed.
        BrokenError: nobody listens any more, or the system gives no sockets.

    """
    name, token = invitation.get("name"), invitation.get("token")
    if not isinstance(name, str) or not isinstance(token, bytes):
        raise HandshakeError("the peer's invitation is malformed: it has no name or no token")
    out, mine, theirs = _three_sockets()
    try:
        _set_timeout(out, timeout_s)
        out.connect("\0" + name)
        socket.send_fds(out, [token], [theirs.fileno()], socket.MSG_NOSIGNAL)
    except OSError as error:
        out.close()
        mine.close()
        raise BrokenError(f"the serving end cannot be reached: {error.strerror}") from error
    finally:
        theirs.close()
    return Lane(out, timeout_s), Lane(mine, timeout_s)


def _three_sockets() -> tuple[socket.socket, socket.socket, socket.socket]:
    """Return one to connect, and both ends of the other direction."""
    try:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise BrokenError(f"no sockets to meet the peer with: {error.strerror}") from error
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), mine, theirs
    except OSError as error:
        mine.close()
        theirs.close()
        raise BrokenError(f"no sockets to meet the peer with: {error.strerror}") from error


def _shutdown(sock: socket.socket) -> None:
    # It may be over already, which is all that was wanted.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _set_timeout(sock: socket.socket, timeout_s: float) -> None:
    """Let the kernel time the waits: one system call a packet, and none to arm anything."""
    sock.setblocking(True)
    micros = max(1, round(timeout_s * 1e6))  # 0 would mean for ever
    value = _TIMEVAL.pack(*divmod(micros, 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _readable(sock: socket.socket, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, wait_s) * 1e3))


def _recv_fd(sock: socket.socket) -> tuple[bytes, int]:
    try:
        # A few more than expected, so that a peer's surplus is seen and closed.
        packet, fds, _, _ = socket.recv_fds(sock, 64, 4, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise DeadlineError("nothing came from the peer in time") from None
    except OSError as error:
        raise BrokenError(f"the peer is gone: {error.strerror}") from error
    if len(fds) == 1:
        return packet, fds[0]
    for fd in fds:
        os.close(fd)
    raise BrokenError(f"the peer should have passed one file descriptor, not {len(fds)}")
