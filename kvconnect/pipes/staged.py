"""The tensor path of a device pipe: slots of staging memory that the receiver fetches from.

Whoever moves device memory one-sidedly brings `Medium`: memory that the other end
can reach, copies into it, and a fetch out of the other end's. The rest is here,
over the two host pipes of a `Companion`:

- The sender copies a tensor into slots, as many as it takes and one after another,
  and announces each; a send returns when the last byte is in its slot. Small
  tensors travel inside the announcement.
- The receiver fetches slot by slot into the final tensor and acknowledges each.
- A sender without a free slot waits for an acknowledgement, so what the other end
  does not receive is bounded by the slots.

Frames on an end's outgoing host pipe, uint8 tensors: `_CARD` how to reach the
slots, once; `_TENSOR` a message's header (`kvconnect.pipes.wire`), with the bytes of
a small tensor behind it; `_SLOT` where a part of a large one lies. Back come
acknowledgements: the slot's number.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    DeadlineError,
    EndOfPipe,
    KVConnectError,
    TensorRejectedError,
)
from kvconnect.pipes import wire
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.companion import Companion
from kvconnect.pipes.wire import HEADER_BYTES, Kind, Meta

log = logging.getLogger(__name__)

T = TypeVar("T")

_CARD: Final = b"C"
_TENSOR: Final = b"T"
_SLOT: Final = b"S"
# number of the slot, bytes in it, their address in the sender's memory
_PART = struct.Struct("<IQQ")
_ACK = struct.Struct("<I")
#: Tensors up to here travel with their header: cheaper than a slot, a fetch and an acknowledgement,
#: and small enough for a host pipe to take them before they are received.
INLINE_BYTES: Final = 32 << 10


class Staging(Protocol):
    """Memory that the other end can fetch from."""

    @property
    def address(self) -> int:
        """Of its first byte, as the other end's fetch wants it."""
        ...

    @property
    def card(self) -> bytes:
        """What the other end has to know before it fetches."""
        ...

    def free(self, *, read_until_s: float) -> None:
        """Give it back, but not before ``read_until_s`` from now: the other end may still read it."""
        ...


class Medium(Protocol):
    """How one end's device memory is staged and fetched. One thread sends and one receives at a time."""

    @property
    def device(self) -> str:
        """Where this end's tensors are, as ``"cpu"`` or ``"cuda:0"``."""
        ...

    def allocate(self, nbytes: int) -> Staging:
        """Return new staging memory."""
        ...

    def stage(self, source: Tensor, address: int) -> None:
        """Copy ``source``, uint8 ``[n]``, to ``address`` of the staging memory; return once it is there.

        On CUDA ordered after the caller's current stream, waiting on an event; never a
        device-wide synchronisation.
        """
        ...

    def meet(self, card: bytes) -> None:
        """Learn how to reach the other end's staging memory; raise `BrokenError` at nonsense."""
        ...

    def fetch(self, address: int, out: Tensor) -> None:
        """Copy from the other end's ``address`` to ``out``, uint8 ``[n]``, by the pipe's deadline.

        Returns once the bytes may be read on the caller's current stream and the other
        end may overwrite its own. Raises `BrokenError`, `DeadlineError`.
        """
        ...

    def end(self) -> None:
        """Nothing is staged or fetched any more. Idempotent, never blocks."""
        ...


class StagedTensors:
    """`Pipe`'s tensor path for one end of a device pipe; its methods are the contract's.

    Args:
        companion: the end's host pipes; theirs to close from now on.
        medium: moves the bytes.
        slot_bytes: of each of ``slots`` slots; they are allocated by the first send that needs one.
        timeout_s: the pipe's deadline.
        max_message_bytes: largest tensor that is sent, or accepted from the peer.

    """

    def __init__(
        self,
        companion: Companion,
        medium: Medium,
        *,
        slots: int = 4,
        slot_bytes: int = 4 << 20,
        timeout_s: float = 30.0,
        max_message_bytes: int = 64 << 30,
    ) -> None:
        self._companion, self._medium, self._timeout_s = companion, medium, timeout_s
        self._slot_bytes, self._slots, self._max_bytes = slot_bytes, slots, max_message_bytes
        self._devices = (torch.device(medium.device).type,)
        self._staging: Staging | None = None
        self._free = deque(range(slots))
        self._sending, self._receiving = Alone("send"), Alone("receive")
        self._state = threading.Lock()
        self._closed = False
        self._failure: KVConnectError | None = None

    # -- sending --------------------------------------------------------------------

    def send(self, tensor: Tensor | None) -> None:
        """As `Pipe.send_tensor`."""
        self._check_usable()
        with self._sending:
            header, dense = wire.encode(tensor, self._devices)
            nbytes = 0 if dense is None else dense.nbytes
            if nbytes > self._max_bytes:
                raise TensorRejectedError(f"a tensor of {nbytes} bytes is larger than the limit of {self._max_bytes}")
            if dense is None or nbytes <= INLINE_BYTES:
                self._guard(lambda: self._tell(_TENSOR, header, dense))
                return
            try:
                # Before the header: a deadline here leaves the pipe as it was.
                slot = self._take_slot()
            except DeadlineError as error:
                if self._closed:
                    raise ClosedError("this end was closed") from error
                raise
            except Exception as error:  # noqa: BLE001 - raised again, as what it means to the caller
                self._fail(error)
            self._guard(lambda: self._send_large(header, _as_bytes(dense), slot))

    def _send_large(self, header: bytes, data: Tensor, slot: int) -> None:
        self._tell(_TENSOR, header)
        for start in range(0, data.nbytes, self._slot_bytes):
            if start:
                slot = self._take_slot()
            part = data[start : start + self._slot_bytes]
            address = self._slot_area().address + slot * self._slot_bytes
            self._medium.stage(part, address)
            self._tell(_SLOT, _PART.pack(slot, part.nbytes, address))

    def _slot_area(self) -> Staging:
        if self._staging is None:
            staging = self._medium.allocate(self._slots * self._slot_bytes)
            with self._state:
                self._staging = staging
            self._tell(_CARD, staging.card)
        return self._staging

    def _take_slot(self) -> int:
        """Return a free slot; wait for the other end to acknowledge one if there is none."""
        if not self._free:
            self._await_acknowledgement()
        return self._free.popleft()

    def _await_acknowledgement(self) -> None:
        try:
            frame = self._companion.out.recv_tensor()
        except EndOfPipe as error:
            raise BrokenError("the other end was closed and receives no more") from error
        number = _ACK.unpack(_raw(frame, _ACK.size))[0]
        if number >= self._slots or number in self._free:
            raise BrokenError(f"the other end acknowledged slot {number}, which it was not given")
        self._free.append(number)

    def _tell(self, kind: bytes, body: bytes, tensor: Tensor | None = None) -> None:
        frame = torch.frombuffer(bytearray(kind + body), dtype=torch.uint8)
        if tensor is not None and tensor.nbytes:
            # From a device this copy is ordered on the current stream, and waits for no other.
            frame = torch.cat([frame, _as_bytes(tensor).cpu()])
        try:
            self._companion.out.send_tensor(frame)
        except EndOfPipe as error:
            raise BrokenError("the other end was closed and receives no more") from error

    # -- receiving ------------------------------------------------------------------

    def receive(self) -> Tensor | None:
        """As `Pipe.recv_tensor`."""
        self._check_usable()
        with self._receiving:
            return self._receive(self._new)[1]

    def receive_into(self, out: Tensor) -> None:
        """As `Pipe.recv_tensor_into`; straight into ``out`` if its memory is the message's."""
        self._check_usable()
        plain = out.device == torch.device(self._medium.device) and out.is_contiguous() and not out.requires_grad
        plain = plain and not (out.is_conj() or out.is_neg())

        def fits(meta: Meta) -> bool:
            return meta.kind is Kind.TENSOR and meta.shape == tuple(out.shape) and meta.dtype == out.dtype

        with self._receiving:
            meta, tensor = self._receive(lambda meta: out if plain and fits(meta) else self._new(meta))
        if tensor is None or not fits(meta):
            what = "None" if tensor is None else f"{meta.shape} {meta.dtype}"
            raise TensorRejectedError(f"received {what}, expected {tuple(out.shape)} {out.dtype}")
        if tensor is not out:
            with torch.no_grad():
                out.copy_(tensor)

    def _new(self, meta: Meta) -> Tensor:
        try:
            return torch.empty(meta.shape, dtype=meta.dtype, device=self._medium.device)
        except (RuntimeError, MemoryError) as error:
            raise BrokenError(f"no memory for the tensor of {meta.nbytes} bytes that comes: {error}") from error

    def _receive(self, place: Callable[[Meta], Tensor]) -> tuple[Meta, Tensor | None]:
        try:
            kind, body = self._next()
        except (EndOfPipe, DeadlineError) as error:
            if self._closed:
                raise ClosedError("this end was closed") from error
            raise  # between two messages: no harm done
        except Exception as error:  # noqa: BLE001 - raised again, as what it means to the caller
            self._fail(error)
        return self._guard(lambda: self._take(kind, body, place))

    def _take(self, kind: bytes, body: Tensor, place: Callable[[Meta], Tensor]) -> tuple[Meta, Tensor | None]:
        """Take the rest of a message, whose first frame has come."""
        while kind == _CARD:
            self._medium.meet(body.numpy().tobytes())
            kind, body = self._next()
        if kind != _TENSOR:
            raise BrokenError(f"the other end sent a frame {kind!r} where a message should begin")
        length = HEADER_BYTES + wire.read(body[:HEADER_BYTES].numpy().tobytes())
        meta = wire.decode(body[:length].numpy().tobytes(), self._max_bytes)
        if meta.kind is not Kind.TENSOR:
            return meta, None
        tensor, inline = place(meta), body[length:]
        data = _as_bytes(tensor)
        if meta.nbytes <= INLINE_BYTES:
            if inline.nbytes != meta.nbytes:
                raise BrokenError(f"a tensor of {meta.nbytes} bytes came with {inline.nbytes}")
            data.copy_(inline)
        else:
            self._fetch(data)
        return meta, tensor

    def _fetch(self, data: Tensor) -> None:
        start = 0
        while start < data.nbytes:
            kind, body = self._next()
            if kind == _CARD:
                self._medium.meet(body.numpy().tobytes())
                continue
            number, nbytes, address = _PART.unpack(_raw(body, _PART.size))
            if kind != _SLOT or not 0 < nbytes <= data.nbytes - start:
                raise BrokenError(f"the other end sent a part of {nbytes} bytes of a tensor that lacks {data.nbytes}")
            self._medium.fetch(address, data[start : start + nbytes])
            start += nbytes
            # Only now is the part sure to be what was sent: an end that aborts frees its
            # slots after it has cut this pipe.
            self._companion.into.send_tensor(torch.frombuffer(bytearray(_ACK.pack(number)), dtype=torch.uint8))

    def _next(self) -> tuple[bytes, Tensor]:
        frame = self._companion.into.recv_tensor()
        if frame is None or frame.dtype != torch.uint8 or frame.dim() != 1 or not frame.nbytes:
            raise BrokenError("the other end sent something that is not a frame")
        return bytes([int(frame[0])]), frame[1:]

    # -- the end --------------------------------------------------------------------

    def close(self) -> None:
        """As `Pipe.close`: returns when the other end has fetched everything, or at the deadline."""
        if not self._begin_end():
            return
        self._companion.into.close()  # first: what is still to be flushed may take a while
        # In the middle of another thread's message there is no orderly end.
        if self._failure is None and self._sending.lock.acquire(blocking=False):
            try:
                while len(self._free) < self._slots:
                    self._await_acknowledgement()
                self._companion.out.close()
            except KVConnectError as error:
                log.debug("not all that was sent was fetched by the other end: %s", error)
                self._companion.out.abort()
            finally:
                self._sending.lock.release()
        else:
            self._companion.out.abort()
        self._release()

    def abort(self) -> None:
        """As `Pipe.abort`. Also cuts a `close` short that still waits for the other end."""
        self._begin_end()
        self._companion.abort()
        self._release()

    def _begin_end(self) -> bool:
        with self._state:
            first, self._closed = not self._closed, True
            return first

    def _release(self) -> None:
        with self._state:
            staging, self._staging = self._staging, None
        if staging is not None:
            staging.free(read_until_s=0.0 if len(self._free) == self._slots else self._timeout_s)
        self._medium.end()

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("this end was closed")
        if self._failure is not None:
            raise BrokenError(str(self._failure)) from self._failure

    def _guard(self, work: Callable[[], T]) -> T:
        """Do ``work``, which is in the middle of a message: whatever it raises ends the pipe."""
        try:
            return work()
        except BaseException as error:  # noqa: BLE001 - raised again, as what it means to the caller
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        """Let the pipe be dead, at both ends, and the error reach the caller."""
        if self._closed:
            raise ClosedError("this end was closed") from error
        with self._state:
            earlier, mine = self._failure, _ours(error)
            self._failure = earlier or mine
        self._companion.abort()
        if not isinstance(error, Exception):
            raise error  # such as a signal's: not ours to change
        if earlier is not None:  # the other direction failed, and cut this one
            raise BrokenError(str(earlier)) from earlier
        raise mine


def _ours(error: BaseException) -> KVConnectError:
    if isinstance(error, (BrokenError, DeadlineError, BusyError)):
        return error
    if isinstance(error, EndOfPipe):
        broken = BrokenError("the other end was closed in the middle of a message")
    else:
        broken = BrokenError(f"a message was cut short: {error!r}")
    broken.__cause__ = error
    return broken


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as uint8 ``[nbytes]``."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _raw(frame: Tensor | None, nbytes: int) -> bytes:
    if frame is None or frame.dtype != torch.uint8 or frame.dim() != 1 or frame.nbytes != nbytes:
        raise BrokenError("the other end sent something that is not a frame of this length")
    return frame.numpy().tobytes()
