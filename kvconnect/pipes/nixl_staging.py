"""Staging memory for NIXL: gather, scatter, slots, and the portions that a transfer is cut into.

`Stager` is all that differs between devices. Each of its methods returns when the
device has done the work, so that the agent of the other end may read the memory,
or vLLM reuse the blocks.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.errors import KVConnectError, LoadError, UnavailableBackendError
from kvconnect.paging import BlockIds, IoVec, PagedLayout, PagedMemory
from kvconnect.pipes import vectored
from kvconnect.pipes.nixl_agent import Agent
from kvconnect.pipes.nixl_place import Place, Registration

#: Bytes of a portion, by kind of device: what is gathered, read and scattered in one go. A
#: portion costs a round trip of the hosts, in which a GPU's link moves far more than a CPU's.
PORTION_BYTES: Final = {"cpu": 8 << 20, "cuda": 32 << 20}
#: Portions of one transfer under way at once, so that gather, wire and scatter overlap.
DEPTH: Final = {"cpu": 3, "cuda": 6}
#: Slots of a pool, shared by all pipes of a process that use the same memory.
SLOTS: Final = 6

Blocks = list[list[int]]


class Stager(Protocol):
    """Copies within one device. Threads may use one at the same time."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return new memory on the device, uint8 ``[nbytes]``."""
        ...

    def gather(self, memory: PagedMemory, blocks: BlockIds, out: Tensor) -> None:
        """Copy the canonical stream of ``blocks`` into ``out``, uint8 of that size."""
        ...

    def scatter(self, src: Tensor, memory: PagedMemory, blocks: BlockIds) -> None:
        """Copy the canonical stream ``src`` into ``blocks``."""
        ...

    def copy(self, src: Tensor, out: Tensor) -> None:
        """Copy ``src`` to ``out``, uint8 of one size, ordered after the caller's current stream."""
        ...


class HostStager:
    """`Stager` for CPU memory."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return new memory; its pages are touched when they are first used."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def gather(self, memory: PagedMemory, blocks: BlockIds, out: Tensor) -> None:
        """One pass of plain copies."""
        paged.gather(memory, memory.iovec(blocks), out)

    def scatter(self, src: Tensor, memory: PagedMemory, blocks: BlockIds) -> None:
        """One pass of plain copies."""
        paged.scatter(src, memory, memory.iovec(blocks))

    def copy(self, src: Tensor, out: Tensor) -> None:
        """One plain copy, without the GIL."""
        vectored.copy(whole(out), whole(src))


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


class Slot:
    """A part of a pool, held by one portion at a time."""

    def __init__(self, tensor: Tensor) -> None:
        """Be ``tensor``, registered uint8 memory."""
        self.tensor = tensor

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.tensor.data_ptr()


class SlotPool:
    """Registered staging memory in slots of one size, allocated when the first is asked for."""

    def __init__(self, agent: Agent, stager: Stager, place: Place, slot_bytes: int, slots: int = SLOTS) -> None:
        self._agent, self._stager, self._place = agent, stager, place
        self.slot_bytes, self._slots = slot_bytes, slots
        self._lock = threading.Lock()
        self._free: deque[Slot] = deque()
        self._waiting: deque[Callable[[Slot], None]] = deque()
        self._memory: Tensor | None = None
        self.registration: Registration | None = None

    def open(self) -> Registration:
        """Allocate and register, once; may take milliseconds.

        Raises:
            BrokenError: there is no memory, or NIXL refuses it.

        """
        with self._lock:
            if self.registration is None:
                memory = self._stager.allocate(self._slots * self.slot_bytes)
                self.registration = self._agent.register(self._place, whole(memory), memory)
                self._memory = memory
                starts = range(0, memory.nbytes, self.slot_bytes)
                self._free.extend(Slot(memory[start : start + self.slot_bytes]) for start in starts)
            return self.registration

    def take(self, then: Callable[[Slot], None]) -> None:
        """Call ``then`` with a free slot: at once, or from whoever gives one back."""
        with self._lock:
            if not self._free:
                self._waiting.append(then)
                return
            slot = self._free.popleft()
        then(slot)

    def give(self, slot: Slot) -> None:
        """Give a slot back."""
        with self._lock:
            if not self._waiting:
                self._free.append(slot)
                return
            then = self._waiting.popleft()
        then(slot)

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            registration, self.registration = self.registration, None
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
        slot_bytes = max(portion_bytes, *(memory.layout.block_bytes() or [1]))
        #: Where this end gathers for peers, and where what it reads arrives: apart, so that
        #: two processes that read from each other cannot wait for each other's slots.
        self.serving = SlotPool(agent, self.stager, self.place, slot_bytes)
        self.landing = SlotPool(agent, self.stager, self.place, slot_bytes)
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
        self.serving.close()
        self.landing.close()
        self.agent.deregister(self.registration)


class _Open:
    lock = threading.Lock()
    memories: ClassVar[dict[tuple[str, int, int], StagedMemory]] = {}


def portions(
    layout: PagedLayout, remote: BlockIds, local: BlockIds, portion_bytes: int
) -> Iterator[tuple[Blocks, Blocks]]:
    """Cut a transfer into portions of whole blocks, the same on both sides.

    Yields:
        the remote and the local blocks of a portion, of at most ``portion_bytes`` bytes,
        or one block if that is larger.

    """
    for group, size in enumerate(layout.block_bytes()):
        theirs, mine = (list(ids[group]) if group < len(ids) else [] for ids in (remote, local))
        step = max(1, portion_bytes // size) if size else len(theirs)
        for start in range(0, len(theirs) if size else 0, step):
            before: Blocks = [[] for _ in range(group)]
            yield [*before, theirs[start : start + step]], [*before, mine[start : start + step]]


def pair(local: IoVec, remote: IoVec) -> tuple[IoVec, IoVec]:
    """Cut two streams of one length at each other's seams, so that they go piece by piece."""
    ends = [np.cumsum(iov[:, 1], dtype=np.uint64) for iov in (local, remote)]
    cuts = np.union1d(*ends)
    lengths = np.diff(cuts, prepend=np.uint64(0))
    starts = cuts - lengths
    rows = []
    for iov, end in zip((local, remote), ends, strict=True):
        index = np.searchsorted(end, starts, side="right")
        row = np.empty((len(cuts), 2), dtype=np.uint64)
        row[:, 0] = iov[index, 0] + (starts - (end[index] - iov[index, 1]))
        row[:, 1] = lengths
        rows.append(row)
    return rows[0], rows[1]


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
