"""One direction of an NCCL pipe on this end's device: streams, staging slots and the communicator.

Blocks → gather → slot → send ⇒ receive → slot → scatter → blocks. The wire has one stream
and the copies have another; events order them, so that a slot is filled (or emptied)
while the other is on the wire. The host enqueues as many chunks as it likes ahead; between
two of them it has no part.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvconnect.cuda import driver, nccl
from kvconnect.cuda.copier import Copier, Part, Table, copier
from kvconnect.cuda.tiles import Packed, Paged
from kvconnect.errors import BrokenError, HandshakeError
from kvconnect.paging import PagedMemory
from kvconnect.pipes.nccl_lines import Move
from kvconnect.pipes.nccl_loop import bind
from kvconnect.pipes.turns import Turns

log = logging.getLogger(__name__)

#: Two suffice: gather and scatter take a third of a chunk's time on the wire.
SLOTS = 2
_ALIGNMENT = 256
#: ``cudaErrorNotReady``
_NOT_READY = 600


@dataclass(frozen=True)
class Setting:
    """What a wire needs.

    Args:
        device: index of the GPU.
        memory: this end's blocks, on it.
        slot_bytes: the largest chunk.
        max_ctas: the most CTAs of a send or receive.
        multiprocessors: the most that a gather or scatter may occupy.
        meetings: threads for what takes long.

    """

    device: int
    memory: PagedMemory
    slot_bytes: int
    max_ctas: int
    multiprocessors: int
    meetings: Turns


class _Slot:
    """Staging memory, and the event after which it may be used anew."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.free: Any = None


class _Wire:
    """What both directions share. Made on a thread that may wait, then used by one at a time; the device is current."""

    def __init__(self, setting: Setting, name: bytes, *, sends: bool) -> None:
        """Start to meet the other end.

        Raises:
            BrokenError: CUDA or NCCL failed.

        """
        self._device, self.slot_bytes = setting.device, setting.slot_bytes
        self._multiprocessors, self._meetings = setting.multiprocessors, setting.meetings
        self._cuda = driver.cupy().cuda
        self._copier: Copier = copier(setting.device)
        self._table: Table = self._lay_out(self._copier, setting.memory)
        size = -(-setting.slot_bytes // _ALIGNMENT) * _ALIGNMENT
        self._slots: list[_Slot] = []
        self._turn = 0
        self._kept: deque[tuple[Any, object]] = deque()
        self._aborted = threading.Event()
        with driver.errors("prepare the wire"):
            # Above vLLM's own priority: a few multiprocessors shortly, rather than soon.
            self._copies = self._cuda.Stream(non_blocking=True, priority=-1)
            self._stream = self._cuda.Stream(non_blocking=True, priority=-1)
            self._slots = [_Slot(address) for address in _staging(setting.device).take(size, SLOTS)]
            self._size = size
            try:
                # Nothing is filled or received before the trial is over.
                self._communicator = nccl.Communicator(
                    name,
                    sends=sends,
                    max_ctas=setting.max_ctas,
                    address=self._slots[0].address,
                    stream=self._stream.ptr,
                )
            except BaseException:
                self._give_back()
                raise

    def settled(self) -> bool:
        """See `kvconnect.pipes.nccl_lines.Wire`."""
        return self._communicator.settled()

    def abort(self) -> None:
        """See `kvconnect.pipes.nccl_lines.Wire`."""

        def step() -> bool:
            try:
                bind(self._device)
                self._communicator.abort()
            finally:
                self._aborted.set()
            return False

        self._meetings.add(step)

    def at_rest(self) -> bool:
        """See `kvconnect.pipes.nccl_lines.Wire`."""
        if not self._aborted.is_set():
            return False
        if self._slots:
            if not all(map(_is_over, (self._copies, self._stream))):
                return False
            self._kept.clear()
            self._give_back()
        return True

    def _lay_out(self, copies: Copier, memory: PagedMemory) -> Table:
        raise NotImplementedError

    def _check(self, move: Move) -> None:
        if move.nbytes > self.slot_bytes:
            raise HandshakeError(f"a chunk of {move.nbytes} bytes does not fit a slot of {self.slot_bytes}")

    def _event(self, stream: Any) -> Any:
        event = self._cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def _next_slot(self) -> _Slot:
        slot = self._slots[self._turn % SLOTS]
        self._turn += 1
        return slot

    def _keep(self, event: Any, what: object) -> None:
        """Let ``what`` live until ``event``."""
        while self._kept and _event_is_over(self._kept[0][0]):
            self._kept.popleft()
        self._kept.append((event, what))

    def _give_back(self) -> None:
        slots, self._slots = self._slots, []
        _staging(self._device).give(self._size, [slot.address for slot in slots])


class SendWire(_Wire):
    """Gathers blocks into slots and sends these."""

    def __init__(self, setting: Setting, name: bytes) -> None:
        super().__init__(setting, name, sends=True)

    def _lay_out(self, copies: Copier, memory: PagedMemory) -> Table:
        return copies.table(Paged.of(memory), Packed(memory.layout))

    def launch(self, move: Move) -> Callable[[], bool]:
        """Gather into the next slot, once what it held has been sent, and send it."""
        self._check(move)
        slot, ids = self._next_slot(), move.ids or []
        part = Part(move.group, ids, range(len(ids)), to_shift=slot.address)
        with driver.errors("send a chunk"):
            if slot.free is not None:
                self._copies.wait_event(slot.free)
            kept = self._copier.launch(self._table, part, self._copies, self._multiprocessors)
            full = self._event(self._copies)
            self._keep(full, kept)
            self._stream.wait_event(full)
            self._communicator.move(slot.address, move.nbytes, self._stream.ptr)
            event = slot.free = self._event(self._stream)
        return lambda: _event_is_over(event)


class RecvWire(_Wire):
    """Receives into slots and scatters these to blocks."""

    def __init__(self, setting: Setting, name: bytes) -> None:
        super().__init__(setting, name, sends=False)

    def _lay_out(self, copies: Copier, memory: PagedMemory) -> Table:
        return copies.table(Packed(memory.layout), Paged.of(memory))

    def launch(self, move: Move) -> Callable[[], bool]:
        """Receive into the next slot, once what it held has been scattered, and scatter it."""
        self._check(move)
        slot = self._next_slot()
        with driver.errors("receive a chunk"):
            if slot.free is not None:
                self._stream.wait_event(slot.free)
            self._communicator.move(slot.address, move.nbytes, self._stream.ptr)
            event = full = self._event(self._stream)
            if move.ids is not None:
                self._copies.wait_event(full)
                part = Part(move.group, range(len(move.ids)), move.ids, from_shift=slot.address)
                kept = self._copier.launch(self._table, part, self._copies, self._multiprocessors)
                event = self._event(self._copies)
                self._keep(event, (kept, full))
        slot.free = event
        return lambda: _event_is_over(event)


class _Staging:
    """Staging memory of one device. Freeing would wait for the whole device, so it is kept for the next."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {}

    def take(self, nbytes: int, count: int) -> list[int]:
        with self._lock:
            free = self._free.setdefault(nbytes, [])
            found = [free.pop() for _ in range(min(count, len(free)))]
        runtime = driver.cupy().cuda.runtime
        with driver.errors("allocate staging memory"), driver.use(self._device):
            while len(found) < count:
                found.append(int(runtime.malloc(nbytes)))
                log.debug("%d bytes of staging memory on device %d", nbytes, self._device)
        return found

    def give(self, nbytes: int, addresses: list[int]) -> None:
        with self._lock:
            self._free.setdefault(nbytes, []).extend(addresses)


@driver.per_process
def _staging(device: int) -> _Staging:
    return _Staging(device)


def _event_is_over(event: Any) -> bool:
    return _answer(lambda: driver.cupy().cuda.runtime.eventQuery(event.ptr))


def _is_over(stream: Any) -> bool:
    """Whether a stream is empty; a context that failed runs nothing any more, either."""
    try:
        return _answer(lambda: driver.cupy().cuda.runtime.streamQuery(stream.ptr))
    except BrokenError as error:
        log.warning("the device failed: %s", error)
        return True


def _answer(query: Callable[[], int]) -> bool:
    """Whether a query says that the device is done; CuPy returns some codes and raises others."""
    failed = driver.cupy().cuda.runtime.CUDARuntimeError
    try:
        code = query()
    except failed as error:
        code = error.status
        if code != _NOT_READY:
            raise BrokenError(f"CUDA failed: {error}") from error
    if code not in {0, _NOT_READY}:
        raise BrokenError(f"CUDA failed with error {code}")
    return code == 0
