"""Staging memory for NIXL: gather, scatter, slots, and the portions that a transfer is cut into.

`Stager` is all that differs between devices. What gathers or scatters only begins, and
returns what tells whether the device has done it: only then may the agent of the other
end read the memory, or vLLM reuse the blocks.
"""

from __future__ import annotations

import enum
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import ClassVar, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.errors import KVConnectError, LoadError, UnavailableBackendError
from kvconnect.paging import BlockIds, IoVec, PagedLayout, PagedMemory
from kvconnect.pipes import turns, vectored
from kvconnect.pipes.nixl_agent import Agent
from kvconnect.pipes.nixl_place import Place, Registration

Blocks = list[list[int]]
#: Whether a copy is over; raises what it failed with. For one thread, which asks until it is.
IsOver = Callable[[], bool]


class Sizes(NamedTuple):
    """Bytes of a portion, and how many slots there are for portions, by kind of device.

    A portion costs the hosts about 80 µs of steps, in which a GPU's link moves far more
    than a CPU's. The slots for GPUs take 57 MB in all.
    """

    portion_bytes: int
    slots: int


SIZES: Final = {"cpu": Sizes(8 << 20, 8), "cuda": Sizes(18 << 20, 3)}
#: Portions of one transfer that are under way at once.
DEPTH: Final = 3


class Stager(Protocol):
    """Copies within one device."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return new memory on the device, uint8 ``[nbytes]``."""
        ...

    def gather(self, memory: PagedMemory, blocks: BlockIds, out: Tensor) -> IsOver:
        """Begin to copy the canonical stream of ``blocks`` into ``out``, uint8 of that size."""
        ...

    def scatter(self, src: Tensor, memory: PagedMemory, blocks: BlockIds) -> IsOver:
        """Begin to copy the canonical stream ``src`` into ``blocks``."""
        ...

    def copy(self, src: Tensor, out: Tensor) -> None:
        """Copy ``src`` to ``out``, uint8 of one size, ordered after the caller's current stream; return when done."""
        ...


class HostStager:
    """`Stager` for CPU memory."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return new memory; its pages are touched when they are first used."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def gather(self, memory: PagedMemory, blocks: BlockIds, out: Tensor) -> IsOver:
        """One pass of plain copies, on a thread of its own."""
        return _beside(lambda: paged.gather(memory, memory.iovec(blocks), out))

    def scatter(self, src: Tensor, memory: PagedMemory, blocks: BlockIds) -> IsOver:
        """One pass of plain copies, on a thread of its own."""
        return _beside(lambda: paged.scatter(src, memory, memory.iovec(blocks)))

    def copy(self, src: Tensor, out: Tensor) -> None:
        """One plain copy, without the GIL."""
        vectored.copy(whole(out), whole(src))


def _beside(copy: Callable[[], None]) -> IsOver:
    """Run ``copy`` on a thread that all pipes share."""
    over: Future[bool] = Future()

    def step() -> bool:
        try:
            copy()
            over.set_result(True)
        except Exception as error:  # noqa: BLE001 - whatever it is, its transfer ends with it
            over.set_exception(error)
        return False

    def is_over() -> bool:
        return over.done() and over.result()

    turns.shared().add(step)
    return is_over


def stager_for(device: str) -> Stager:
    """Return the stager of a device.

    Raises:
        UnavailableBackendError: there is none for this kind of device.

    """
    kind = torch.device(device).type
    make = STAGERS.get(kind)
    if make is None:
        raise UnavailableBackendError("pipe", "nixl", f"it cannot gather and scatter {kind} memory")
    return make(device)


def _cuda_stager(device: str) -> Stager:
    from kvconnect.cuda.stager import CudaStager

    return CudaStager(device)


#: How to make a device's stager, by kind of device. The pipe carries what is here.
STAGERS: dict[str, Callable[[str], Stager]] = {"cpu": lambda _: HostStager(), "cuda": _cuda_stager}


def whole(tensor: Tensor) -> IoVec:
    """Return a contiguous tensor's memory as one piece."""
    return np.array([[tensor.data_ptr(), tensor.nbytes]], dtype=np.uint64)


class Use(enum.IntEnum):
    """What a slot is for: where this end gathers for its peers, or where what it reads arrives."""

    LENDING = 0
    LANDING = 1


class Slot:
    """A part of a pool, held by one portion at a time."""

    def __init__(self, tensor: Tensor) -> None:
        """Be ``tensor``, registered uint8 memory."""
        self.tensor = tensor
        self.use = Use.LENDING

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.tensor.data_ptr()


class SlotPool:
    """Registered staging memory in slots of one size, allocated when the first is asked for. For the agent's thread.

    Once anything is to land here, lending leaves a slot to it: of two processes that read
    from each other, neither can hold all of its slots for what the other one has no slot to
    read into. A process that has only lent so far lends to some that have one, so that its
    slots come back.
    """

    def __init__(self, agent: Agent, stager: Stager, place: Place, slot_bytes: int, slots: int) -> None:
        self._agent, self._stager, self._place = agent, stager, place
        self.slot_bytes, self._slots = slot_bytes, slots
        self._free: list[Slot] = []
        self._held = dict.fromkeys(Use, 0)
        self._lands = False
        self._waiting: dict[Use, deque[Callable[[Slot], None]]] = {use: deque() for use in Use}
        self._memory: Tensor | None = None
        self._registration: Registration | None = None

    def expect(self) -> None:
        """Keep a slot for what lands, from now on: before a peer is asked to lend."""
        self._lands = True

    def open(self) -> Registration:
        """Allocate and register, once; may take milliseconds.

        Raises:
            BrokenError: NIXL refuses the memory; or whatever the device's allocator raises.

        """
        if self._registration is None:
            memory = self._stager.allocate(self._slots * self.slot_bytes)
            self._registration = self._agent.register(self._place, whole(memory), memory)
            self._memory = memory
            starts = range(0, memory.nbytes, self.slot_bytes)
            self._free.extend(Slot(memory[start : start + self.slot_bytes]) for start in starts)
        return self._registration

    def take(self, use: Use, then: Callable[[Slot], None]) -> None:
        """Call ``then`` with a free slot: at once, or when one is given back."""
        self._waiting[use].append(then)
        self._hand_out(use)

    def give(self, slot: Slot) -> None:
        """Give a slot back."""
        self._held[slot.use] -= 1
        self._free.append(slot)
        # The other one first: neither waits for all of what the other one wants.
        self._hand_out(Use(1 - slot.use))
        self._hand_out(slot.use)

    def _hand_out(self, use: Use) -> None:
        most = self._slots - 1 if use is Use.LENDING and self._lands else self._slots
        while self._waiting[use] and self._free and self._held[use] < most:
            slot = self._free.pop()
            slot.use = use
            self._held[use] += 1
            self._waiting[use].popleft()(slot)

    def close(self) -> None:
        """Give the memory back."""
        registration, self._registration = self._registration, None
        self._memory = None
        self._free.clear()
        if registration is not None:
            self._agent.deregister(registration)


class StagedMemory:
    """One engine's paged memory as NIXL sees it: registered once per process, for all pipes."""

    def __init__(self, agent: Agent, memory: PagedMemory, portion_bytes: int) -> None:
        self.agent, self.memory = agent, memory
        self.place = Place.of(memory.device)
        self.kind = torch.device(memory.device).type
        self.stager = stager_for(memory.device)
        slot_bytes = max(portion_bytes, *(memory.layout.block_bytes or (1,)))
        self.slots = SlotPool(agent, self.stager, self.place, slot_bytes, SIZES[self.kind].slots)
        self._registration: Registration | None = None
        self._users = 0

    @property
    def registration(self) -> Registration:
        """Of the paged memory."""
        if self._registration is None:
            raise RuntimeError("not opened")
        return self._registration

    @classmethod
    def open(cls, agent: Agent, memory: PagedMemory, portion_bytes: int) -> StagedMemory:
        """Return what all pipes over ``memory`` share; pair it with `leave`."""
        with _Open.lock:
            key = (agent.name, id(memory), portion_bytes)
            found = _Open.memories.get(key)
            if found is None:
                found = cls(agent, memory, portion_bytes)
                sizes = np.asarray(memory.layout.region_bytes, dtype=np.uint64)
                iov = np.stack([memory.bases, sizes], axis=1)
                found._registration = agent.register(found.place, iov[sizes > 0], memory)
                _Open.memories[key] = found
            found._users += 1
            return found

    def leave(self) -> None:
        """One pipe less; the last one gives everything back."""
        with _Open.lock:
            self._users -= 1
            if self._users:
                return
            for key in [key for key, other in _Open.memories.items() if other is self]:
                del _Open.memories[key]
        self.agent.soon(self.slots.close)
        self.agent.deregister(self.registration)


class _Open:
    lock = threading.Lock()
    memories: ClassVar[dict[tuple[str, int, int], StagedMemory]] = {}


def portions(layout: PagedLayout, blocks: BlockIds, portion_bytes: int) -> Iterator[Blocks]:
    """Cut a transfer into portions of whole blocks, the same for either side.

    Yields:
        the blocks of a portion, of at most ``portion_bytes`` bytes, or one block if that is larger.

    """
    for group, (ids, size) in enumerate(zip(blocks, layout.block_bytes, strict=False)):
        step = max(1, portion_bytes // size) if size else 1
        for start in range(0, len(ids) if size else 0, step):
            yield [*([] for _ in range(group)), list(ids[start : start + step])]


def failed(error: BaseException) -> KVConnectError:
    """Return whatever a copy raised as one of ours."""
    if isinstance(error, KVConnectError):
        return error
    wrapped = LoadError(f"blocks could not be copied: {error!r}")
    wrapped.__cause__ = error
    return wrapped


def _renew_lock() -> None:
    # Another thread of the parent may have held the lock at the moment of the fork.
    _Open.lock = threading.Lock()
    _Open.memories.clear()


os.register_at_fork(after_in_child=_renew_lock)
