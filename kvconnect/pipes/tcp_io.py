"""What puts bytes onto a connected socket and takes them off it: as they are, or as TLS (`kvconnect.pipes.tcp_tls`)."""

from __future__ import annotations

from typing import Final, Protocol

from kvconnect.paging import IoVec
from kvconnect.pipes import vectored


class Io(Protocol):
    """The calls of `kvconnect.pipes.vectored`, for one connection. They raise what those raise."""

    @property
    def pending(self) -> bool:
        """Whether bytes may have come that are on the socket no more, so that its descriptor does not show them."""
        ...

    def send(self, fd: int, iov: IoVec) -> int:
        """Send from the front of ``iov``; who was told that less has gone calls again with the rest."""
        ...

    def recv(self, fd: int, iov: IoVec) -> int:
        """Receive to the front of ``iov``."""
        ...

    def recv_at(self, fd: int, address: int, count: int, flags: int = 0) -> int:
        """Receive to one piece of memory."""
        ...


class Plain:
    """Bytes as they are."""

    pending: Final = False
    send = staticmethod(vectored.send)
    recv = staticmethod(vectored.recv)
    recv_at = staticmethod(vectored.recv_at)


PLAIN: Final = Plain()
