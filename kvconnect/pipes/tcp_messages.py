"""Messages of the tensor path over a `Link`: as they are, or with checksums.

With checksums a message is (in brackets: the seal of `kvconnect.pipes.tcp_checksum`)::

    header's fixed part [sum, sum of dims and first chunk] more dims | chunk | sum, chunk | sum, chunk …

A chunk has `CHUNK_BYTES`, the last one what is left: each is summed up while it is
in the processor's cache, on both sides, and its sum stands before it, so that a
message of one chunk costs no call more than one without sums.
"""

from __future__ import annotations

from typing import Final

from kvconnect.errors import IntegrityError
from kvconnect.pipes import tcp_checksum, wire
from kvconnect.pipes.tcp_checksum import SEAL_BYTES, SUM_BYTES
from kvconnect.pipes.tcp_link import Link
from kvconnect.pipes.wire import HEADER_BYTES

CHUNK_BYTES: Final = 512 << 10


class Messages:
    """Messages as they are. One of these belongs to one end of a pipe."""

    def send(self, link: Link, header: bytes, address: int = 0, nbytes: int = 0) -> None:
        """Send a header and the ``nbytes`` at ``address``; as `Link.send`."""
        link.send(header, address, nbytes)

    def recv_head(self, link: Link) -> bytes | memoryview | None:
        """Receive a header; ``None`` if none came in time.

        Raises:
            BrokenError: this is no header.
            DeadlineError, ClosedError: as `Link.recv`.
            IntegrityError: it is damaged.

        """
        address, view = link.head_address, link.head
        if not link.recv(address, HEADER_BYTES, idle=True):
            return None
        more = wire.read(view[:HEADER_BYTES])
        if more:
            link.recv(address + HEADER_BYTES, more)
        return view[: HEADER_BYTES + more]

    def recv_body(self, link: Link, address: int, nbytes: int) -> None:
        """Receive what belongs to the tensor whose header came last; as `Link.recv`.

        Raises:
            IntegrityError: it is damaged; the rest of the message is still to come.

        """
        if nbytes:
            link.recv(address, nbytes)


class SummedMessages(Messages):
    """Messages with checksums."""

    def __init__(self) -> None:
        self._sum = 0
        self._dims = b""

    def send(self, link: Link, header: bytes, address: int = 0, nbytes: int = 0) -> None:
        """Send a header and the ``nbytes`` at ``address``, chunk by chunk."""
        deadline = link.deadline(nbytes)
        fixed, dims = header[:HEADER_BYTES], header[HEADER_BYTES:]
        count = min(nbytes, CHUNK_BYTES)
        first = tcp_checksum.of(dims, tcp_checksum.view(address, count))
        link.send(fixed + tcp_checksum.seal(fixed, first) + dims, address, count, deadline)
        for start in range(CHUNK_BYTES, nbytes, CHUNK_BYTES):
            count = min(nbytes - start, CHUNK_BYTES)
            summed = tcp_checksum.of(tcp_checksum.view(address + start, count))
            link.send(tcp_checksum.pack(summed), address + start, count, deadline)

    def recv_head(self, link: Link) -> bytes | memoryview | None:
        """Receive a header and check it before any of its numbers is used."""
        address, view = link.head_address, link.head
        if not link.recv(address, HEADER_BYTES + SEAL_BYTES, idle=True):
            return None
        fixed = bytes(view[:HEADER_BYTES])
        self._sum = tcp_checksum.check_seal(fixed, bytes(view[HEADER_BYTES : HEADER_BYTES + SEAL_BYTES]))
        more = wire.read(fixed)
        if more:
            link.recv(address, more)
        self._dims = bytes(view[:more])
        return fixed + self._dims

    def recv_body(self, link: Link, address: int, nbytes: int) -> None:
        """Receive a tensor to its place and check it there, chunk by chunk."""
        deadline = link.deadline(nbytes)
        self._recv_chunk(link, address, min(nbytes, CHUNK_BYTES), deadline)
        for start in range(CHUNK_BYTES, nbytes, CHUNK_BYTES):
            link.recv(link.head_address, SUM_BYTES, deadline=deadline)
            self._sum, self._dims = tcp_checksum.unpack(link.head[:SUM_BYTES]), b""
            self._recv_chunk(link, address + start, min(nbytes - start, CHUNK_BYTES), deadline)

    def _recv_chunk(self, link: Link, address: int, nbytes: int, deadline: float) -> None:
        if nbytes:
            link.recv(address, nbytes, deadline=deadline)
        if tcp_checksum.of(self._dims, tcp_checksum.view(address, nbytes)) != self._sum:
            raise IntegrityError("a tensor arrived damaged")


def messages(*, checksum: bool) -> Messages:
    """Return messages as the two ends agreed on them."""
    return SummedMessages() if checksum else Messages()
