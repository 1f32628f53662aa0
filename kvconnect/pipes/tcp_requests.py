"""Which block transfers run over one TCP block connection, and what each frame means to them."""

from __future__ import annotations

import logging
from typing import Final

import numpy as np

from kvconnect.errors import BrokenError, ClosedError, HandshakeError, IntegrityError, KVConnectError, LoadError
from kvconnect.paging import IoVec, PagedMemory
from kvconnect.pipes import tcp_frames, vectored
from kvconnect.pipes.base import Transfer
from kvconnect.pipes.tcp_frames import READS, WRITES, Frame, pack
from kvconnect.pipes.tcp_stream import Cursor, FrameReader, FrameWriter, Nowhere, Outgoing
from kvconnect.pipes.wire import Kind

logger = logging.getLogger("kvconnect.pipes.tcp")

#: Transfers that one peer may have running here, and bad requests that it may make.
MAX_SERVED: Final = 4096
MAX_REFUSALS: Final = 64
#: Short frames that wait until the peer takes them: requests that are given up at once cost it none of the above.
MAX_UNHEARD: Final = 1 << 16
#: Damaged frames after which a connection is given up.
MAX_DAMAGES: Final = 64
_ANSWERS: Final = {cls.__name__: cls for cls in (BrokenError, ClosedError, HandshakeError, IntegrityError, LoadError)}


class Incoming:
    """A transfer whose bytes come to this end; ``transfer`` is set if this end asked for it."""

    def __init__(self, iov: IoVec | None, transfer: Transfer | None = None) -> None:
        """Have its bytes go to ``iov``; ``None``: nobody knows where to, nor how many they are."""
        self.cursor, self.transfer = Nowhere() if iov is None else Cursor(iov), transfer
        self.draining = iov is None


class Writing:
    """A transfer that this end writes: over once the peer has answered *and* our memory is not read any more."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.free = self.answered = False
        self.error: KVConnectError | None = None
        self.out: Outgoing | None = None

    def settle(self) -> bool:
        """End the transfer if it is over; return whether it is."""
        if self.free and self.answered:
            self.transfer.finish(self.error)
        return self.free and self.answered


class BlockRequests:
    """Both ends' requests on one connection. Runs on the reactor's thread only."""

    def __init__(self, local: PagedMemory, chunk_bytes: int, *, checksum: bool = False) -> None:
        """Serve ``local`` in chunks of ``chunk_bytes``; with ``checksum``, all frames carry sums."""
        self._local = local
        self.writer = FrameWriter(chunk_bytes, checksum=checksum)
        self.reader = FrameReader(self, checksum=checksum)
        self._reading: dict[int, Incoming] = {}
        self._writing: dict[int, Writing] = {}
        self._served: dict[int, Outgoing] = {}
        self._written: dict[int, Incoming] = {}
        self._payload = bytearray()
        self._refusals = self._damages = 0
        self._ids_bytes = tcp_frames.max_ids_bytes(local.layout)

    @property
    def busy(self) -> bool:
        """Whether this end waits for the peer."""
        return bool(self._reading or self._writing or self._served or self.writer.busy)

    # -- this end's wishes ------------------------------------------------------------

    def read(self, number: int, iov: IoVec, transfer: Transfer, ids: bytes) -> None:
        """Ask for the peer's blocks ``ids``."""
        self._reading[number] = Incoming(iov, transfer)
        self.writer.say(pack(Kind.READ, READS, number, payload=ids))

    def write(self, number: int, iov: IoVec, transfer: Transfer, ids: bytes) -> None:
        """Announce bytes for the peer's blocks ``ids`` and queue them."""
        writing = self._writing[number] = Writing(transfer)
        writing.out = Outgoing(WRITES, number, iov, self._left_written)
        self.writer.say(pack(Kind.WRITE, WRITES, number, payload=ids))
        self.writer.add(writing.out)

    def cancel(self, number: int) -> None:
        """Give up a transfer; one that is over already is left alone."""
        incoming, writing = self._reading.get(number), self._writing.get(number)
        if incoming is not None and not incoming.draining:
            self._stop_reading(number, incoming, LoadError("the transfer was cancelled"))
        elif writing is not None and writing.out is not None:
            self.writer.drop(writing.out)

    def clear(self) -> list[Transfer]:
        """Forget everything; return the transfers of this end that were running."""
        self.reader.stopped = True
        read = [incoming.transfer for incoming in self._reading.values() if incoming.transfer]
        running = [*read, *(writing.transfer for writing in self._writing.values())]
        for table in (self._reading, self._writing, self._served, self._written):
            table.clear()
        return running

    def _stop_reading(self, number: int, incoming: Incoming, error: KVConnectError) -> None:
        # What is on its way goes nowhere, so the blocks are free from here on.
        incoming.draining = True
        if self.reader.receiving(READS, number):
            self.reader.divert()
        self.writer.say(pack(Kind.CANCEL, READS, number))
        if incoming.transfer is not None:
            incoming.transfer.finish(error)

    def _left_written(self, out: Outgoing) -> None:
        writing = self._writing.get(out.transfer)
        if writing is None:
            return
        writing.free = True
        if out.dropped:
            self.writer.say(pack(Kind.CANCEL, WRITES, out.transfer))
            writing.error = writing.error or LoadError("the transfer was cancelled")
        if writing.settle():
            del self._writing[out.transfer]

    # -- frames of the peer: before the payload -----------------------------------------

    def begin(self, frame: Frame) -> IoVec | None:
        """Check a frame and say where its payload goes.

        Raises:
            BrokenError: the peer does not keep to the protocol.

        """
        if self.writer.short > MAX_UNHEARD:
            raise BrokenError("the peer asks on and on and takes no answers")
        if frame.kind is Kind.DATA:
            return self._begin_data(frame)
        limit = {Kind.READ: self._ids_bytes, Kind.WRITE: self._ids_bytes, Kind.ERROR: tcp_frames.MAX_TEXT_BYTES}
        if frame.nbytes > limit.get(frame.kind, 0):
            raise BrokenError(f"the peer sent a {frame.kind.name} frame of {frame.nbytes} bytes")
        self._payload = bytearray(frame.nbytes)
        if not frame.nbytes:
            return vectored.pieces()
        return vectored.pieces((np.frombuffer(self._payload, dtype=np.uint8).ctypes.data, frame.nbytes))

    def _begin_data(self, frame: Frame) -> IoVec | None:
        incoming = self._incoming(frame.side).get(frame.transfer)
        if incoming is None:
            raise BrokenError("the peer sent bytes that nobody asked for")
        cursor = incoming.cursor
        if frame.offset != cursor.offset or not 0 < frame.nbytes <= cursor.left:
            raise BrokenError(
                f"the peer sent bytes {frame.offset} to {frame.offset + frame.nbytes} of a transfer "
                f"of which {cursor.offset} of {cursor.nbytes} have come"
            )
        place = cursor.take(frame.nbytes)
        return None if incoming.draining else place

    def _incoming(self, side: int) -> dict[int, Incoming]:
        return self._reading if side == READS else self._written

    # -- frames of the peer: complete -----------------------------------------------------

    def end(self, frame: Frame) -> None:
        """Act on a complete frame.

        Raises:
            BrokenError: the peer does not keep to the protocol.

        """
        match frame.kind:
            case Kind.DATA:
                self._end_data(frame)
            case Kind.READ | Kind.WRITE:
                self._serve(frame)
            case Kind.CANCEL:
                self._end_cancel(frame)
            case Kind.ACK:
                self._answer(frame, None)
            case _:
                self._answer(frame, _error(bytes(self._payload)))

    def damaged(self, frame: Frame) -> None:
        """Fail the transfer that a damaged payload belongs to.

        Raises:
            IntegrityError: there is too much damage.

        """
        self._damages += 1
        error = IntegrityError(f"a {frame.kind.name} frame of {frame.nbytes} bytes arrived damaged")
        logger.warning("%s", error)
        if self._damages > MAX_DAMAGES:
            raise error
        match frame.kind:
            case Kind.DATA:
                self._end_damaged(frame, error)
            case Kind.READ:
                self.writer.say(pack(Kind.ERROR, READS, frame.transfer, payload=_travelling(error)))
            case Kind.WRITE:
                # Its bytes follow at once, until the peer has heard of it and cancels.
                self._written.setdefault(frame.transfer, Incoming(None))
                self.writer.say(pack(Kind.ERROR, WRITES, frame.transfer, payload=_travelling(error)))
            case _:
                self._answer(frame, error)

    def _end_damaged(self, frame: Frame, error: IntegrityError) -> None:
        table = self._incoming(frame.side)
        incoming = table[frame.transfer]
        if not incoming.cursor.left:
            del table[frame.transfer]
        if incoming.transfer is None:
            incoming.draining = True
            self.writer.say(pack(Kind.ERROR, WRITES, frame.transfer, payload=_travelling(error)))
        elif incoming.cursor.left:
            self._stop_reading(frame.transfer, incoming, error)
        else:
            incoming.transfer.finish(error)

    def _end_data(self, frame: Frame) -> None:
        table = self._incoming(frame.side)
        incoming = table[frame.transfer]
        if incoming.cursor.left:
            return
        del table[frame.transfer]
        if incoming.transfer is not None:
            incoming.transfer.finish()
        elif not incoming.draining:
            self.writer.say(pack(Kind.ACK, WRITES, frame.transfer))

    def _serve(self, frame: Frame) -> None:
        wanted = READS if frame.kind is Kind.READ else WRITES
        if frame.side != wanted or frame.transfer in (self._served if wanted == READS else self._written):
            raise BrokenError("the peer used a transfer number twice or on the wrong side")
        if len(self._served) + len(self._written) >= MAX_SERVED:
            raise BrokenError(f"the peer has more than {MAX_SERVED} transfers running")
        blocks = tcp_frames.unpack_ids(self._payload)
        try:
            self._local.layout.check(blocks)
            iov = self._local.iovec(blocks)
        except HandshakeError as error:
            self._refuse(frame, error)
            return
        if not len(iov):
            self._refuse(frame, HandshakeError("no blocks were named"))
        elif wanted == READS:
            out = self._served[frame.transfer] = Outgoing(READS, frame.transfer, iov, self._left_served)
            self.writer.add(out)
        else:
            self._written[frame.transfer] = Incoming(iov)

    def _refuse(self, frame: Frame, error: HandshakeError) -> None:
        self._refusals += 1
        # A peer checks its ids against our layout first; bytes of a refused write would follow at once.
        if frame.side == WRITES or self._refusals > MAX_REFUSALS:
            raise BrokenError(f"the peer asked for what it must not: {error}") from error
        logger.warning("a peer's request for blocks was refused: %s", error)
        self.writer.say(pack(Kind.ERROR, frame.side, frame.transfer, payload=_travelling(error)))

    def _left_served(self, out: Outgoing) -> None:
        if self._served.pop(out.transfer, None) is not None and out.dropped:
            self.writer.say(pack(Kind.ACK, READS, out.transfer))

    def _end_cancel(self, frame: Frame) -> None:
        if frame.side == READS:
            out = self._served.get(frame.transfer)
            if out is not None:  # else it is complete, and the peer will see so
                self.writer.drop(out)
        elif self._written.pop(frame.transfer, None) is not None:
            self.writer.say(pack(Kind.ACK, WRITES, frame.transfer))

    def _answer(self, frame: Frame, error: KVConnectError | None) -> None:
        if frame.side == READS:
            self._end_reading(frame.transfer, error)
            return
        writing = self._writing.get(frame.transfer)
        if writing is None or writing.out is None:
            return
        if error is None and not writing.free:
            raise BrokenError("the peer acknowledged bytes that it cannot have")
        writing.answered, writing.error = True, error or writing.error
        if writing.free and error is not None:
            self.writer.say(pack(Kind.CANCEL, WRITES, frame.transfer))  # it may wait for more
        self.writer.drop(writing.out)
        if writing.settle():
            self._writing.pop(frame.transfer, None)

    def _end_reading(self, number: int, error: KVConnectError | None) -> None:
        incoming = self._reading.pop(number, None)
        if incoming is None or incoming.draining:
            return
        if incoming.transfer is not None:
            incoming.transfer.finish(error or BrokenError("the peer gave up sending"))


def _travelling(error: KVConnectError) -> bytes:
    return f"{type(error).__name__}: {error}".encode()[: tcp_frames.MAX_TEXT_BYTES]


def _error(payload: bytes) -> KVConnectError:
    """Read ``ClassName: text`` of an error that travelled."""
    name, _, text = payload.decode(errors="replace").partition(": ")
    return _ANSWERS.get(name, BrokenError)(f"the peer answered: {text or name}")
