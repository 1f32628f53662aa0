"""Frames onto and off a non-blocking socket: chunks of many transfers, straight from and to their memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np

from kvconnect.errors import BrokenError
from kvconnect.paging import IoVec, Pieces
from kvconnect.pipes import tcp_checksum, vectored
from kvconnect.pipes.tcp_checksum import SEAL_BYTES
from kvconnect.pipes.tcp_frames import FRAME_BYTES, Frame, pack_data, unpack
from kvconnect.pipes.tcp_io import PLAIN, Io
from kvconnect.pipes.wire import Kind

_SCRATCH_BYTES: Final = 256 << 10
_NOTHING: Final[IoVec] = np.empty((0, 2), dtype=np.uint64)


class Cursor:
    """A stream of pieces that is taken from its front, part by part."""

    def __init__(self, iov: IoVec) -> None:
        self._pieces = Pieces(iov)
        self.nbytes = self._pieces.nbytes
        self.offset = 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return self.nbytes - self.offset

    def take(self, count: int) -> IoVec:
        """Return the next ``count`` bytes' pieces, as an array of the caller's own."""
        start, self.offset = self.offset, self.offset + count
        return self._pieces.cut(start, self.offset)


class Nowhere:
    """In place of a `Cursor`, a stream of any length that has no place."""

    nbytes = left = 1 << 64

    def __init__(self) -> None:
        self.offset = 0

    def take(self, count: int) -> IoVec:
        """Return no pieces."""
        self.offset += count
        return _NOTHING


class Outgoing:
    """A transfer whose bytes this end sends. ``left`` is called once its memory is not read any more."""

    def __init__(self, side: int, transfer: int, iov: IoVec, left: Callable[[Outgoing], None]) -> None:
        self.side, self.transfer, self.left = side, transfer, left
        self.cursor = Cursor(iov)
        self.dropped = False


class FrameWriter:
    """What goes out: short frames first, then one chunk of each transfer in turn."""

    def __init__(self, chunk_bytes: int, *, checksum: bool = False) -> None:
        self._chunk_bytes, self._checksum = chunk_bytes, checksum
        self.io: Io = PLAIN
        self._short: deque[bytes] = deque()
        self._waiting: deque[Outgoing] = deque()
        self._current: Outgoing | None = None
        self._iov, self._left = _NOTHING, 0
        self._blob = np.empty(0, dtype=np.uint8)

    @property
    def busy(self) -> bool:
        """Whether anything is left to send."""
        return bool(self._left or self._short or self._waiting)

    @property
    def short(self) -> int:
        """Number of short frames that wait."""
        return len(self._short)

    def say(self, frame: bytes) -> None:
        """Queue a short frame, ahead of all chunks."""
        if self._checksum:
            header, payload = frame[:FRAME_BYTES], frame[FRAME_BYTES:]
            frame = header + tcp_checksum.seal(header, tcp_checksum.of(payload)) + payload
        self._short.append(frame)

    def say_first(self, words: bytes) -> None:
        """Queue bytes ahead of everything that waits."""
        self._short.appendleft(words)

    def add(self, outgoing: Outgoing) -> None:
        """Queue a transfer (not an empty one)."""
        self._waiting.append(outgoing)

    def drop(self, outgoing: Outgoing) -> None:
        """Send no more of a transfer; a chunk that is on its way is completed first."""
        if outgoing.dropped or (outgoing is not self._current and outgoing not in self._waiting):
            return
        outgoing.dropped = True
        if outgoing is not self._current:
            self._waiting.remove(outgoing)
            outgoing.left(outgoing)

    def pump(self, fd: int) -> int:
        """Send up to one chunk; return the bytes sent.

        Raises:
            OSError: the connection failed.

        """
        if not self._left:
            self._compose()
        if not self._left:
            return 0
        try:
            done = self.io.send(fd, self._iov)
        except BlockingIOError:
            return 0
        self._left -= done
        if self._left:
            self._iov = vectored.advance(self._iov, done)
        else:
            self._sent()
        return done

    def _compose(self) -> None:
        head, chunk = b"".join(self._short), _NOTHING
        self._short.clear()
        if self._waiting:
            self._current = out = self._waiting.popleft()
            count = min(out.cursor.left, self._chunk_bytes)
            header = pack_data(out.side, out.transfer, out.cursor.offset, count)
            chunk = out.cursor.take(count)
            head += header
            if self._checksum:
                head += tcp_checksum.seal(header, tcp_checksum.of_pieces(chunk))
            self._left = count
        self._blob = np.frombuffer(head, dtype=np.uint8)  # keeps `head` alive
        self._left += len(head)
        self._iov = np.concatenate((vectored.pieces((self._blob.ctypes.data, len(head))), chunk))

    def _sent(self) -> None:
        out, self._current = self._current, None
        if out is None:
            return
        if out.cursor.left and not out.dropped:
            self._waiting.append(out)
        else:
            out.left(out)


class FrameHandler(Protocol):
    """What a `FrameReader` asks and tells."""

    def begin(self, frame: Frame) -> IoVec | None:
        """Check a frame and say where its payload goes; ``None``: nowhere. `BrokenError` ends the connection."""
        ...

    def end(self, frame: Frame) -> None:
        """Act on a frame whose payload is complete."""
        ...

    def damaged(self, frame: Frame) -> None:
        """Act on a frame whose payload is complete, but not what was sent."""
        ...


class FrameReader:
    """What comes in: a header, checked, then its payload straight to where it belongs."""

    def __init__(self, handler: FrameHandler, *, checksum: bool = False) -> None:
        self._handler, self._checksum = handler, checksum
        self.io: Io = PLAIN
        self._head = np.empty(FRAME_BYTES + SEAL_BYTES * checksum, dtype=np.uint8)
        self._head_iov = vectored.pieces((self._head.ctypes.data, self._head.nbytes))
        #: Where the payload lands that is to be checked, and its sum.
        self._place: IoVec | None = None
        self._sum = 0
        self._scratch = np.empty(0, dtype=np.uint8)
        self.frame: Frame | None = None
        #: Set when the connection ended, perhaps by whoever a frame was reported to.
        self.stopped = False
        self._left = 0
        #: The rest of this frame's payload *and* the next header, so that one call fetches both.
        self._iov = self._head_iov.copy()

    def pump(self, fd: int, budget: int) -> int:
        """Receive about ``budget`` bytes, or what has come; return how many.

        Raises:
            OSError: the connection failed.
            BrokenError: the peer ended it, or does not keep to the protocol.
            IntegrityError: a header is damaged.

        """
        got = 0
        while (got < budget or self.io.pending) and not self.stopped:
            try:
                done = self.io.recv(fd, self._iov)
            except BlockingIOError:
                break
            if not done:
                raise BrokenError("the peer closed the connection")
            got += done
            self._take(done)
        return got

    def receiving(self, side: int, transfer: int) -> bool:
        """Whether the payload being received are bytes of this transfer.

        Both ends number their own transfers: a *request* of the peer may bear the same numbers.
        """
        frame = self.frame
        return frame is not None and frame.kind is Kind.DATA and (frame.side, frame.transfer) == (side, transfer)

    def divert(self) -> None:
        """Let the rest of the payload being received go nowhere."""
        self._place = None
        if self._left:
            self._iov = np.concatenate((self._drain(self._left), self._iov[-1:]))

    def _take(self, done: int) -> None:
        self._iov = vectored.advance(self._iov, done)
        if self.frame is not None:
            self._left = max(0, self._left - done)
            if self._left:
                return
            self._end(self.frame)
        if not len(self._iov):
            self._begin()

    def _begin(self) -> None:
        head = self._head.tobytes()
        if self._checksum:
            self._sum = tcp_checksum.check_seal(head[:FRAME_BYTES], head[FRAME_BYTES:])
        frame = unpack(head[:FRAME_BYTES])
        place = self._handler.begin(frame)
        self._place = place if self._checksum else None
        if place is None:
            place = self._drain(frame.nbytes)
        self.frame, self._left = frame, frame.nbytes
        self._iov = np.concatenate((place, self._head_iov))
        if not frame.nbytes:
            self._end(frame)

    def _end(self, frame: Frame) -> None:
        self.frame = None
        place, self._place = self._place, None
        if place is None or tcp_checksum.of_pieces(place) == self._sum:
            self._handler.end(frame)
        else:
            self._handler.damaged(frame)

    def _drain(self, nbytes: int) -> IoVec:
        if not self._scratch.size:
            self._scratch = np.empty(_SCRATCH_BYTES, dtype=np.uint8)
        full, rest = divmod(nbytes, _SCRATCH_BYTES)
        address = self._scratch.ctypes.data
        return vectored.pieces(*[(address, _SCRATCH_BYTES)] * full, *[(address, rest)] * bool(rest))
