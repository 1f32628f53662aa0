"""The block path of a TCP pipe: reads and writes of paged blocks over a connection of its own.

A reader sends READ with the peer's block ids and gets DATA; a writer sends WRITE
and DATA and gets ACK. Chunks of all transfers take turns; payloads go straight
from and to the blocks. What the peer sends is checked before memory is touched,
and costs it this connection if it is wrong. The socket belongs to the reactor's
thread; `BlockConnection.read`, `write` and `close` may come from any.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from kvconnect import blocks as paged
from kvconnect.errors import (
    BrokenError,
    ClosedError,
    DeadlineError,
    HandshakeError,
    IntegrityError,
    KVConnectError,
)
from kvconnect.paging import BlockIds, IoVec, PagedLayout, PagedMemory
from kvconnect.pipes import reactor, tcp_frames
from kvconnect.pipes.base import Transfer
from kvconnect.pipes.reactor import Reactor, Timer
from kvconnect.pipes.tcp_farewell import Farewell, hang_up
from kvconnect.pipes.tcp_handshake import Handshake, Met
from kvconnect.pipes.tcp_io import PLAIN
from kvconnect.pipes.tcp_requests import BlockRequests

#: Number, our pieces, transfer, packed ids of the peer's blocks.
_Begin = Callable[[int, IoVec, Transfer, bytes], None]
#: Begins to secure a connecting socket, saying a hello first.
Secure = Callable[[socket.socket, bytes], Handshake]


class BlockConnection:
    """One end of a block connection. Its socket comes later; requests wait for it."""

    def __init__(
        self,
        loop: Reactor,
        local: PagedMemory,
        remote: PagedLayout,
        chunk_bytes: int,
        timeout_s: float,
        *,
        checksum: bool,
    ) -> None:
        """Prepare to serve ``local`` and to ask for blocks of ``remote``.

        Args:
            loop: what serves the connection.
            local: this end's memory.
            remote: the peer's layout.
            chunk_bytes: most bytes of a transfer before another has its turn.
            timeout_s: how long nothing may move while something should.
            checksum: all frames carry sums; the peer has to agree.

        Raises:
            HandshakeError: the two layouts have different shapes.

        """
        paged.check_shapes(local.layout, remote)
        self._loop, self._local, self._remote = loop, local, remote
        self._chunk_bytes, self._timeout_s = chunk_bytes, timeout_s
        self._requests = BlockRequests(local, chunk_bytes, checksum=checksum)
        self._numbers = itertools.count(1)
        self._sock: socket.socket | None = None
        self._handshake: Handshake | None = None
        self._events = 0
        self._error: KVConnectError | None = None
        self._progress = 0.0
        self._timer: Timer | None = None

    # -- from any thread ----------------------------------------------------------------

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to copy the peer's blocks into ours; see `Pipe.read_blocks`."""
        return self._start(self._requests.read, local, remote)

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to copy our blocks into the peer's; see `Pipe.write_blocks`."""
        return self._start(self._requests.write, local, remote)

    def close(self, *, wait: bool) -> None:
        """End; with ``wait``, what was sent arrives and the memory is not touched any more on return.

        Raises:
            DeadlineError: the memory may still be touched, since the reactor hangs in somebody's callback.

        """

        def job() -> None:
            self._fail(ClosedError("this end was closed"), flush=wait)

        if not wait:
            self._loop.call_soon(job)
        elif not self._loop.run(job, self._timeout_s):
            raise DeadlineError(f"the blocks are still in use after {self._timeout_s} s")

    def _start(self, begin: _Begin, local: BlockIds, remote: BlockIds) -> Transfer:
        self._check_usable()
        nbytes = paged.check_pair(self._local.layout, local, self._remote, remote)
        ids = tcp_frames.pack_ids(remote)
        if len(ids) > tcp_frames.max_ids_bytes(self._remote):
            raise HandshakeError("more block ids than the peer's memory has blocks")
        number = next(self._numbers) & 0xFFFFFFFF
        transfer = Transfer(nbytes, lambda: self._loop.call_soon(lambda: self._cancel(number)))
        if nbytes:
            iov = self._local.iovec(local)
            self._loop.call_soon(lambda: self._begin(begin, number, iov, transfer, ids))
        else:
            transfer.finish()
        return transfer

    def _check_usable(self) -> None:
        error = self._error
        if isinstance(error, ClosedError):
            raise ClosedError(str(error)) from error
        if error is not None:
            raise BrokenError(str(error)) from error

    # -- on the reactor's thread ----------------------------------------------------------

    def connect(
        self, make: Callable[[], socket.socket], address: Any, hello: bytes, secure: Secure | None = None
    ) -> None:
        """Connect what ``make`` returns, a non-blocking socket, to ``address`` and say ``hello`` first."""
        if self._error is not None:
            return
        try:
            sock = make()
        except OSError as error:
            self._fail(BrokenError(f"cannot reach the peer's blocks: {error}"), error)
            return
        number = sock.connect_ex(address)
        if number not in {0, errno.EINPROGRESS}:
            hang_up(sock)
            self._fail(BrokenError(f"cannot reach the peer's blocks: {os.strerror(number)}"))
            return
        if secure is None:
            self._requests.writer.say_first(hello)
            self.accept(sock)
        else:
            self._handshake = secure(sock, hello)
            self._handshake.then(self.accept)

    def accept(self, sock: socket.socket, met: Met = PLAIN) -> None:
        """Take over a connected (or connecting) non-blocking socket, or learn why there is none."""
        if isinstance(met, KVConnectError):
            self._fail(met, met.__cause__)
            return
        if self._error is not None or self._sock is not None:
            hang_up(sock)
            return
        self._sock = sock
        self._requests.writer.io = self._requests.reader.io = met
        self._events = reactor.READ | reactor.WRITE
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Little more than a chunk waits in the kernel, so that a new transfer is not far behind it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._chunk_bytes)
            self._loop.watch(sock.fileno(), self._events, self._ready)
        except OSError as error:
            self._fail(BrokenError(f"the connection failed: {error}"), error)
            return
        if met.pending:
            self._ready(reactor.READ)

    def _begin(self, begin: _Begin, number: int, iov: IoVec, transfer: Transfer, ids: bytes) -> None:
        if self._error is not None:
            transfer.finish(self._error)
            return
        begin(number, iov, transfer, ids)
        self._ready(reactor.WRITE)

    def _cancel(self, number: int) -> None:
        if self._error is None:
            self._requests.cancel(number)
            self._ready(reactor.WRITE)

    def _ready(self, events: int) -> None:
        """Receive and send a chunk each, then watch for what is wanted next."""
        try:
            self._move(events)
        except (BrokenError, IntegrityError) as error:
            self._fail(error)
        except OSError as error:
            self._fail(BrokenError(f"the connection failed: {error}"), error)

    def _move(self, events: int) -> None:
        if self._timer is None and self._requests.busy:
            self._progress = time.monotonic()
            self._timer = self._loop.call_later(self._timeout_s, self._look)
        if self._sock is None:
            return
        fd, writer, moved = self._sock.fileno(), self._requests.writer, 0
        if events & ~reactor.WRITE:
            moved = self._requests.reader.pump(fd, self._chunk_bytes)
        if writer.busy and not self._gone():
            moved += writer.pump(fd)
        if moved:
            self._progress = time.monotonic()
        if self._gone():
            return  # whoever a finished transfer was reported to has closed the pipe
        wanted = reactor.READ | (reactor.WRITE if writer.busy else 0)
        if wanted != self._events:
            self._events = wanted
            self._loop.change(fd, wanted)

    def _gone(self) -> bool:
        return self._sock is None

    def _look(self) -> None:
        """See whether anything moved lately; transfers have no deadline of their own."""
        self._timer = None
        if self._error is not None or not self._requests.busy:
            return
        left_s = self._progress + self._timeout_s - time.monotonic()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._fail(BrokenError(f"no byte moved for {self._timeout_s} s"))

    def _fail(self, error: KVConnectError, cause: BaseException | None = None, *, flush: bool = False) -> None:
        """End the connection and everything on it; with ``flush``, what the kernel has been given arrives."""
        if self._error is not None:
            return
        error.__cause__ = cause
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        if self._handshake is not None:
            self._handshake.cancel()
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.unwatch(sock.fileno())
            self._part(sock, flush=flush)
        for transfer in self._requests.clear():
            transfer.finish(error)

    def _part(self, sock: socket.socket, *, flush: bool) -> None:
        if flush:
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # not connected yet, or the peer was faster: there is nothing to flush
            else:
                Farewell(self._loop, sock, self._timeout_s)
                return
        hang_up(sock)
