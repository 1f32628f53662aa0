"""Parts of a store's entries: paged blocks to chunks, and chunks to paged blocks.

A part holds its blocks one after another, group by group, all layers of a block
together: the canonical stream of each single block. So a reader finds any blocks by
their numbers, whatever blocks it needs and wherever they lie at either end.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.store import Store
from kvconnect.buffers.store_manifest import Part, shape_of, sum_of
from kvconnect.errors import ClosedError, IntegrityError, KVConnectError, LoadError, as_ours
from kvconnect.paging import BlockIds, IoVec, PagedMemory, Pieces, merge, spans

T = TypeVar("T")

#: Chunks of one part that are moved at the same time: one is on its way while the other is checked and copied.
ABREAST = 2


class Guard:
    """Access to blocks that can be ended: from when `end` has called back, nobody touches them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._error: KVConnectError | None = None
        self._then: Callable[[], None] | None = None

    @property
    def ended(self) -> KVConnectError | None:
        """Why access has ended, if it has."""
        return self._error

    def __enter__(self) -> None:
        """Begin to touch the blocks; raise what access was ended with."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        """Leave the blocks alone."""
        with self._lock:
            self._inside -= 1
            last = self._inside == 0 and self._error is not None
            then, self._then = (self._then, None) if last else (None, self._then)
        if then is not None:
            then()

    def end(self, error: KVConnectError, then: Callable[[], None]) -> None:
        """Let nobody in any more; call ``then`` when the last has left. Only the first call counts."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            if self._inside:
                self._then = then
                return
        then()


class ChunkRun(Generic[T]):
    """Makes one step for each chunk of a part, a few at a time, on a crew that serves others in between."""

    def __init__(self, crew: Crew, steps: Sequence[T], step: Callable[[T, Guard], None]) -> None:
        """Run nothing yet. A step may touch blocks only inside the guard that it is given."""
        #: Has an outcome when nobody touches the blocks any more; the error is a `KVConnectError`.
        self.over: Future[None] = Future()
        self._guard = Guard()
        self._crew, self._step = crew, step
        self._lock = threading.Lock()
        self._due = iter(steps)
        self._left = len(steps)

    def start(self) -> None:
        """Begin."""
        if not self._left:
            self.stop(None)
        for _ in range(min(ABREAST, self._left)):
            self._submit()

    def stop(self, error: KVConnectError | None) -> None:
        """End with ``error``. Steps that run may still be at the store when it is `over`, but at no block."""
        self._guard.end(error or ClosedError("the transfer is over"), lambda: self._finish(error))

    def _finish(self, error: KVConnectError | None) -> None:
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)

    def _submit(self) -> None:
        if not self._crew.submit(self._turn):
            self.stop(ClosedError("the buffer was closed"))

    def _turn(self) -> None:
        """Take one step, then queue up again behind other transfers."""
        with self._lock:
            step = next(self._due, None)
        if step is None or self._guard.ended is not None:
            return
        try:
            self._step(step, self._guard)
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything; who waits must hear of it
            self.stop(as_ours(error, "the store failed: "))
            return
        with self._lock:
            self._left -= 1
            left = self._left
        if left:
            self._submit()
        else:
            self.stop(None)


class Rooms:
    """Host memory for a chunk, one for each thread; pinned if it is for a GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._mine = threading.local()

    def take(self, nbytes: int) -> Tensor:
        """Return this thread's room, uint8 ``[nbytes]``; it is the same memory each time."""
        room: Tensor | None = self._mine.__dict__.get("room")
        if room is None or room.nbytes < nbytes:
            room = self._mine.room = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device != "cpu")
        return room[:nbytes]


class PartWriter:
    """Reads chunks of one part out of paged memory into a store."""

    def __init__(self, memory: PagedMemory, blocks: BlockIds, store: Store, rooms: Rooms, chunk_bytes: int) -> None:
        """Write ``blocks``, null blocks left out, of the groups that this memory has."""
        kept = [[block for block in ids if block] for ids in blocks[: memory.layout.num_groups]]
        memory.layout.check(kept)
        self._memory, self._store, self._rooms = memory, store, rooms
        self._pieces = Pieces(_by_block(memory, kept))
        self.nbytes = self._pieces.nbytes
        #: To be made by `write`, in any order.
        self.steps = spans(self.nbytes, chunk_bytes)
        self._sums: dict[int, bytes] = {}

    def part(self) -> Part:
        """Describe what was written, when all steps have been made."""
        sums = b"".join(self._sums[start] for start, _ in self.steps)
        return Part(self.nbytes, shape_of(self._memory.layout), sums)

    def write(self, draft: str, rank: int, span: tuple[int, int], guard: Guard) -> None:
        """Make one step: blocks to host memory inside ``guard``, from there to the store outside of it."""
        start, stop = span
        room = self._rooms.take(stop - start)
        with guard:
            _lift(self._memory, self._pieces.cut(start, stop), room)
        data = _bytes(room)
        self._sums[start] = sum_of(data)
        self._store.put(draft, rank, start, data)


class _Run(NamedTuple):
    """Blocks that follow each other in a part, and where they go."""

    start: int
    pieces: Pieces


@dataclass(frozen=True)
class _Landing:
    """What is needed of one chunk: its span in the part, and the runs that begin or go on in it."""

    start: int
    stop: int
    runs: tuple[_Run, ...]


class PartReader:
    """Reads some blocks of one part of an entry out of a store into paged memory."""

    def __init__(
        self,
        memory: PagedMemory,
        store: Store,
        rooms: Rooms,
        part: Part,
        chunk_bytes: int,
        spoilt: Callable[[], object] = lambda: None,
    ) -> None:
        """Read from ``part``, as the entry's manifest describes it; call ``spoilt`` if it is not so."""
        self._memory, self._store, self._rooms, self._spoilt = memory, store, rooms, spoilt
        self._part, self._chunk_bytes = part, chunk_bytes
        if part.shape != shape_of(memory.layout):
            raise LoadError("the entry was written by an engine whose memory has other layers or another order")

    def plan(self, counts: Sequence[int], numbers: BlockIds, local: BlockIds) -> list[_Landing]:
        """Return the steps that bring blocks ``numbers`` of an entry that has ``counts`` blocks into ``local``.

        Raises:
            LoadError: the entry does not have these blocks.
            HandshakeError: a local block is out of range.

        """
        sizes = self._memory.layout.block_bytes
        self._memory.layout.check(local)
        if self._part.nbytes != sum(count * size for count, size in zip(counts, sizes, strict=False)):
            raise LoadError("the entry's blocks and the length of its part contradict each other")
        needed: dict[int, list[_Run]] = defaultdict(list)
        start = 0
        for group, (theirs, ours) in enumerate(zip(numbers, local, strict=True)):
            if theirs and not 0 < min(theirs) <= max(theirs) <= counts[group]:
                raise LoadError(f"group {group} of the entry has {counts[group]} blocks, not {max(theirs)}")
            # A pipeline stage may have no layer of a group: its blocks have no bytes here.
            for first, ids in _runs(theirs, ours) if sizes[group] else ():
                pieces = Pieces(_by_block(self._memory, [*[()] * group, ids]))
                run = _Run(start + (first - 1) * sizes[group], pieces)
                last = run.start + pieces.nbytes - 1
                for chunk in range(run.start // self._chunk_bytes, last // self._chunk_bytes + 1):
                    needed[chunk].append(run)
            start += counts[group] * sizes[group]
        return [self._landing(chunk, runs) for chunk, runs in sorted(needed.items())]

    def _landing(self, chunk: int, runs: Sequence[_Run]) -> _Landing:
        start = chunk * self._chunk_bytes
        return _Landing(start, min(start + self._chunk_bytes, self._part.nbytes), tuple(runs))

    def read(self, place: str, rank: int, step: _Landing, guard: Guard) -> None:
        """Make one step; raise `IntegrityError` if the chunk is not what was written. Nothing of it is used then."""
        room = self._rooms.take(step.stop - step.start)
        data = _bytes(room)
        try:
            self._store.get(place, rank, step.start, data)
            if sum_of(data) != self._part.sum(step.start // self._chunk_bytes):
                raise IntegrityError(f"bytes {step.start} to {step.stop} of the entry's part {rank} are damaged")
        except (IntegrityError, LoadError):
            self._spoilt()
            raise
        with guard:
            for run in step.runs:
                first, last = max(step.start, run.start), min(step.stop, run.start + run.pieces.nbytes)
                iov = run.pieces.cut(first - run.start, last - run.start)
                _land(room[first - step.start : last - step.start], self._memory, iov)


def _by_block(memory: PagedMemory, blocks: BlockIds) -> IoVec:
    """Place blocks one after another, each with all its layers."""
    layout, found = memory.layout, [np.empty((0, 2), dtype=np.uint64)]
    for group, ids in enumerate(blocks):
        others: list[tuple[int, ...]] = [()] * group
        region, offset, nbytes = layout.pieces([*others, (0,)])
        stride = layout.pieces([*others, (1,)])[1] - offset  # block 1 need not be there to know this
        starts = memory.bases[region].astype(np.int64) + offset
        placed = np.empty((len(ids), len(region), 2), dtype=np.uint64)
        placed[:, :, 0] = starts + np.asarray(ids, dtype=np.int64)[:, None] * stride
        placed[:, :, 1] = nbytes
        found.append(placed.reshape(-1, 2))
    return merge(np.concatenate(found))


def _runs(numbers: Sequence[int], local: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return which blocks follow each other in a part: the first one's number, and where they go."""
    pairs = sorted(zip(numbers, local, strict=True))
    runs = []
    for _, run in itertools.groupby(enumerate(pairs), lambda item: item[1][0] - item[0]):
        found = [pair for _, pair in run]
        runs.append((found[0][0], [block for _, block in found]))
    return runs


def _bytes(room: Tensor) -> memoryview:
    return memoryview(room.numpy().data)


def _lift(memory: PagedMemory, iov: IoVec, room: Tensor) -> None:
    """Copy pieces of paged memory to host memory."""
    if memory.device == "cpu":
        paged.gather(memory, iov, room)
        return
    with paged.own_stream(memory.device):
        there = torch.empty(room.nbytes, dtype=torch.uint8, device=memory.device)
        paged.gather(memory, iov, there)
        room.copy_(there)


def _land(room: Tensor, memory: PagedMemory, iov: IoVec) -> None:
    """Copy host memory to pieces of paged memory."""
    if memory.device == "cpu":
        paged.scatter(room, memory, iov)
        return
    with paged.own_stream(memory.device):
        paged.scatter(room.to(memory.device), memory, iov)
