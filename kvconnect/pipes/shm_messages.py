"""The messages of a shared-memory pipe: small ones in a packet, large ones by one copy or a ring.

A packet is a tag and what belongs to it; a message's header is that of `kvconnect.pipes.wire`.

========  ===================================  ==========================================
sender    ``MESSAGE header payload``           a whole small message
sender    ``LARGE address header``             the payload lies at ``address`` (0: may not be read there)
sender    ``RING`` + memfd                     the ring, once, before its first use
sender    ``FILLED``                           the next slot holds the next chunk
receiver  ``DONE``                             the large message was copied: the memory is the sender's
receiver  ``STREAM``                           it cannot be read from here: send it through the ring
receiver  ``FREED``                            the oldest filled slot may be filled again
========  ===================================  ==========================================

A sender has at most one large message out and waits for its ``DONE``. One that gives
up shuts the lane; the receiver looks at the lane *after* it has copied, so
it never takes memory for the message that the sender has got back meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from kvconnect.errors import BrokenError, DeadlineError, EndOfPipe, KVConnectError, TensorRejectedError
from kvconnect.pipes import huge_pages, ring, turns, vectored, wire
from kvconnect.pipes.huge_pages import HUGE_BYTES
from kvconnect.pipes.peer_memory import PeerMemory, SharedCopy, useful_threads
from kvconnect.pipes.ring import Ring
from kvconnect.pipes.shm_lane import Lane, hung_up

if TYPE_CHECKING:
    from torch import Tensor

#: Up to here a message's bytes travel in its packet: two small copies cost less than an acknowledgement.
INLINE_BYTES: Final = 64 << 10

_MESSAGE, _LARGE, _RING, _FILLED, _DONE, _STREAM, _FREED = range(1, 8)
_TAGS: Final = [bytes([tag]) for tag in range(8)]
_ADDRESS: Final = struct.Struct("<BQ")
_BUFFER_BYTES: Final = INLINE_BYTES + 4096
#: Kinds of messages on a lane; the wire has more, for other media.
_KINDS: Final = (wire.Kind.TENSOR, wire.Kind.NONE, wire.Kind.END)
#: Far more than a copy of any size takes.
_STUCK_S: Final = 60.0


class Sender:
    """The sending end of one lane, for one thread at a time."""

    def __init__(self, lane: Lane, ring_bytes: int, *, readable: bool) -> None:
        """Send on ``lane``; with ``readable`` unset all large messages go through the ring."""
        self.lane = lane
        self._ring_bytes = ring_bytes
        self._readable = readable
        self._ring: Ring | None = None

    def send(self, tensor: Tensor | None) -> None:
        """Send one message; as `kvconnect.pipes.base.Pipe.send_tensor`."""
        header, dense = wire.encode(tensor)
        if dense is None or dense.nbytes == 0:
            self.lane.send(_TAGS[_MESSAGE], header)
        elif dense.nbytes <= INLINE_BYTES:
            payload = (ctypes.c_char * dense.nbytes).from_address(dense.data_ptr())
            self.lane.send(_TAGS[_MESSAGE], header, payload)
        else:
            self._send_large(header, dense)

    def end(self) -> None:
        """Tell the peer that nothing follows."""
        self.lane.send(_TAGS[_MESSAGE], wire.control(wire.Kind.END))

    def close(self) -> None:
        """Free lane and ring. Nobody may be sending."""
        self.lane.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _send_large(self, header: bytes, dense: Tensor) -> None:
        self.lane.send(_ADDRESS.pack(_LARGE, dense.data_ptr() if self._readable else 0), header)
        try:
            reply = self.lane.recv_tag()
            if reply == _STREAM:
                reply = self._fill_ring(dense)
            if reply != _DONE:
                raise BrokenError(f"the peer sent a reply that makes no sense ({reply})")
        except BaseException:
            # The memory is the caller's again: from now on the receiver must not count on it.
            self.lane.shutdown()
            raise

    def _fill_ring(self, dense: Tensor) -> int:
        slots = self._ring or self._make_ring()
        start, total, step = dense.data_ptr(), dense.nbytes, slots.slot_bytes
        for number, at in enumerate(range(0, total, step)):
            if number >= ring.SLOTS and self.lane.recv_tag() != _FREED:
                raise BrokenError("the peer sent a reply that makes no sense while its message was under way")
            ctypes.memmove(slots.slot(number), start + at, min(step, total - at))
            self.lane.send(_TAGS[_FILLED])
        return self.lane.recv_tag()

    def _make_ring(self) -> Ring:
        try:
            self._ring, fd = ring.create(self._ring_bytes)
        except OSError as error:
            raise BrokenError(f"no memory for a ring of {self._ring_bytes} bytes: {error.strerror}") from error
        try:
            self.lane.send_fd(_TAGS[_RING], fd)
        finally:
            os.close(fd)
        return self._ring


class Receiver:
    """The receiving end of one lane, for one thread at a time."""

    def __init__(self, lane: Lane, peer: PeerMemory | None) -> None:
        """Receive on ``lane``; large messages are read from ``peer``, or come through the ring."""
        self.lane = lane
        self._peer = peer
        self._ring: Ring | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = ctypes.addressof((ctypes.c_char * _BUFFER_BYTES).from_buffer(self._buffer))
        self._ended = False
        #: Why nothing more can be received.
        self._failure = ""
        #: The last header and what it says: peers repeat themselves.
        self._last = (b"", wire.Meta(wire.Kind.NONE))

    def receive(self, out: Tensor | None = None) -> Tensor | None:
        """Receive one message, into ``out`` if given; as `Pipe.recv_tensor` and `Pipe.recv_tensor_into`."""
        if self._ended:
            raise EndOfPipe("the peer has closed its end")
        if self._failure:
            # Packets may still be queued, but what follows half a message cannot be told apart.
            raise BrokenError(f"the pipe had failed: {self._failure}")
        begun = False
        try:
            length = self.lane.recv_into(self._buffer)
            begun = True
            return self._take(length, out)
        except (EndOfPipe, TensorRejectedError):
            raise
        except BaseException as error:
            if begun or not isinstance(error, DeadlineError):
                self._failure = str(error) or repr(error)
                self.lane.shutdown()
            raise

    def close(self) -> None:
        """Free lane and ring. Nobody may be receiving."""
        self.lane.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _take(self, length: int, out: Tensor | None) -> Tensor | None:
        tag = self._buffer[0]
        if tag == _MESSAGE:
            meta, end = self._header(1, length)
            if meta.kind not in _KINDS:
                raise BrokenError(f"the peer sent a {meta.kind.name} message, which this pipe does not have")
            if end + meta.nbytes != length:
                raise BrokenError(f"the peer announced {meta.nbytes} bytes and sent {length - end}")
            return self._deliver(meta, out, lambda target: self._copy_inline(end, meta.nbytes, target))
        if tag == _LARGE and length > _ADDRESS.size:
            address = _ADDRESS.unpack_from(self._buffer)[1]
            meta, end = self._header(_ADDRESS.size, length)
            if end != length or not meta.nbytes:
                raise BrokenError("the peer sent a malformed announcement")
            return self._deliver(meta, out, lambda target: self._copy_large(address, target))
        raise BrokenError(f"the peer sent something that is not a message (tag {tag})")

    def _header(self, start: int, length: int) -> tuple[wire.Meta, int]:
        header, meta = self._last
        if header and self._buffer.startswith(header, start) and start + len(header) <= length:
            return meta, start + len(header)
        fixed = min(start + wire.HEADER_BYTES, length)
        end = min(fixed + wire.read(self._view[start:fixed]), length)
        header, meta = self._last = bytes(self._view[start:end]), wire.decode(self._view[start:end])
        return meta, start + len(header)

    def _deliver(self, meta: wire.Meta, out: Tensor | None, fill: Callable[[Tensor | None], None]) -> Tensor | None:
        """Fill a new tensor, or ``out``; ``fill(None)`` consumes a message that does not fit."""
        if meta.kind is wire.Kind.END:
            self._ended = True
            raise EndOfPipe("the peer has closed its end")
        is_tensor = meta.kind is wire.Kind.TENSOR
        if out is None:
            target = _fresh(meta) if is_tensor else None
            if target is not None:
                fill(target)
            return target
        if not is_tensor or tuple(out.shape) != meta.shape or out.dtype != meta.dtype:
            fill(None)
            what = f"{meta.shape} {meta.dtype}" if is_tensor else "None"
            raise TensorRejectedError(f"received {what}, expected {tuple(out.shape)} {out.dtype}")
        target = out if _is_plain(out) else _fresh(meta)
        fill(target)
        if target is not out:
            try:
                out.copy_(target)
            except RuntimeError as error:
                raise TensorRejectedError(f"the message cannot be written to the tensor given: {error}") from error
        return out

    def _copy_inline(self, at: int, nbytes: int, target: Tensor | None) -> None:
        if target is not None and nbytes:
            ctypes.memmove(target.data_ptr(), self._start + at, nbytes)

    def _copy_large(self, address: int, target: Tensor | None) -> None:
        if target is None:
            pass  # nobody wants it
        elif self._peer is not None and address:
            self._read_peer(self._peer, address, target)
            self._peer.verify()
            if hung_up(self.lane):
                raise BrokenError("the peer gave up while its message was being read")
        else:
            self.lane.send(_TAGS[_STREAM])
            self._drain_ring(target)
        self.lane.send(_TAGS[_DONE])

    def _read_peer(self, peer: PeerMemory, address: int, target: Tensor) -> None:
        start, nbytes = target.data_ptr(), target.nbytes
        if nbytes <= 2 * HUGE_BYTES or useful_threads() == 1:
            peer.read(vectored.pieces((start, nbytes)), vectored.pieces((address, nbytes)))
            return
        # Cut at huge pages, which two threads must not fault in both.
        cuts = [0, *range(-start % HUGE_BYTES or HUGE_BYTES, nbytes, HUGE_BYTES), nbytes]
        outcome: list[KVConnectError | None] = []
        over = threading.Event()

        def end(error: KVConnectError | None) -> None:
            outcome.append(error)
            over.set()

        def read(number: int, _target: Tensor = target) -> None:
            # The pieces are bare addresses: the default keeps the memory behind them alive.
            at, length = cuts[number], cuts[number + 1] - cuts[number]
            peer.read(vectored.pieces((start + at, length)), vectored.pieces((address + at, length)))

        copy = SharedCopy(len(cuts) - 1, read, lambda: None, end)
        turns.shared().add(copy.step)
        try:
            while copy.step():
                pass
        finally:
            # Usually bounded by the one chunk that the other thread is still copying. After an
            # interrupt, too, the memory must not be written to once the caller has it back.
            if not over.wait(_STUCK_S):
                raise BrokenError("the copy of a message did not end")
        if outcome[0] is not None:
            raise outcome[0]

    def _drain_ring(self, target: Tensor) -> None:
        slots = self._ring or self._adopt_ring()
        start, total, step = target.data_ptr(), target.nbytes, slots.slot_bytes
        count = -(-total // step)
        for number, at in enumerate(range(0, total, step)):
            if self.lane.recv_tag() != _FILLED:
                raise BrokenError("the peer did not fill the ring as announced")
            ctypes.memmove(start + at, slots.slot(number), min(step, total - at))
            if number + ring.SLOTS < count:
                self.lane.send(_TAGS[_FREED])

    def _adopt_ring(self) -> Ring:
        fd = self.lane.recv_fd(_TAGS[_RING])
        try:
            self._ring = ring.adopt(fd)
        finally:
            os.close(fd)
        return self._ring


def _is_plain(out: Tensor) -> bool:
    """Whether bytes can be written to ``out`` as they came."""
    dense = out.device.type == "cpu" and out.layout is torch.strided and not out.is_nested
    return dense and out.is_contiguous() and not (out.is_conj() or out.is_neg())


def _fresh(meta: wire.Meta) -> Tensor:
    """Return a new tensor; large ones in huge pages, since zeroing small ones costs more than the copy.

    Raises:
        BrokenError: there is not so much memory; the message is lost.

    """
    try:
        target = meta.empty()
    except (RuntimeError, MemoryError) as error:
        raise BrokenError(f"no memory for the peer's message of {meta.nbytes} bytes") from error
    if meta.nbytes >= 2 * HUGE_BYTES:
        huge_pages.advise(target.data_ptr(), meta.nbytes)
    return target
