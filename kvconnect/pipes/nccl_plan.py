"""In which order blocks travel over NCCL: transfers cut into chunks that take turns. Pure logic.

NCCL matches a send with a receive by nothing but their order, so one end decides it, and
it is the one that receives: it knows at once what it wants to read. It tells the other
end of each chunk (`Chunk.row`) and both enqueue their halves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvconnect import blocks as paged
from kvconnect.errors import HandshakeError
from kvconnect.paging import BlockIds, PagedLayout
from kvconnect.pipes.flows import Kind, count, unpack

#: Who asked for a transfer, and that end's number for it.
Key = tuple[Kind, int]

#: The first chunk of a transfer is this small, so that the wire soon has something to carry;
#: each further one is twice as large, up to a slot. Smaller ones cost more than they hide.
FIRST_BYTES = 8 << 20
#: Slots' worth of bytes that may be under way: more than a wire carries during one round trip of
#: a message. A small transfer waits for so many (0.75 ms of NVLink).
WINDOW_SLOTS = 10


@dataclass(frozen=True)
class Chunk:
    """Blocks ``start`` to ``start + count`` of one group of a transfer."""

    key: Key
    group: int
    start: int
    count: int
    nbytes: int

    def row(self) -> list[int]:
        """As a message carries it."""
        kind, number = self.key
        return [int(kind), number, self.group, self.start, self.count]


def slot_bytes(layout: PagedLayout, ours: int, theirs: int) -> int:
    """Return how large a chunk may be between two ends that wish for these sizes: a block at least."""
    return max(min(ours, theirs), max(layout.block_bytes, default=0), 1)


def counts(blocks: BlockIds) -> list[int]:
    """Return the number of blocks of each group."""
    return [len(ids) for ids in blocks]


def cut(key: Key, counts: Sequence[int], block_bytes: Sequence[int], slot_bytes: int) -> Iterator[Chunk]:
    """Cut a transfer of ``counts[g]`` blocks of each group ``g`` into chunks, small ones first."""
    size = min(FIRST_BYTES, slot_bytes)
    for group, (total, block) in enumerate(zip(counts, block_bytes, strict=False)):
        start = 0
        while block and start < total:
            count = min(total - start, max(1, size // block))
            yield Chunk(key, group, start, count, count * block)
            start += count
            size = min(2 * size, slot_bytes)


class Plan:
    """Transfers that take turns, chunk by chunk."""

    def __init__(self) -> None:
        self._turns: deque[tuple[Chunk, Iterator[Chunk]]] = deque()

    def add(self, chunks: Iterator[Chunk]) -> None:
        """Let a transfer join, behind those that wait already."""
        first = next(chunks, None)
        if first is not None:
            self._turns.append((first, chunks))

    def drop(self, key: Key) -> bool:
        """Forget a transfer; whether there was something left of it."""
        rest = [turn for turn in self._turns if turn[0].key != key]
        dropped = len(rest) < len(self._turns)
        self._turns = deque(rest)
        return dropped

    def __contains__(self, key: Key) -> bool:
        """Whether chunks of a transfer are still to come."""
        return any(chunk.key == key for chunk, _ in self._turns)

    def __bool__(self) -> bool:
        """Whether any chunk is still to come."""
        return bool(self._turns)

    def next(self) -> Chunk | None:
        """Return the chunk whose turn it is."""
        if not self._turns:
            return None
        chunk, rest = self._turns.popleft()
        following = next(rest, None)
        if following is not None:
            self._turns.append((following, rest))
        return chunk


def read_selection(layout: PagedLayout, body: Any) -> tuple[int, BlockIds]:
    """Read a transfer's number and this end's blocks from a peer; raise `HandshakeError` if malformed."""
    if not isinstance(body, dict):
        raise HandshakeError(f"a transfer of the peer is malformed: {body!r}")
    ids = unpack(body.get("groups"))
    layout.check(ids)
    paged.check_counts(layout, ids)
    nbytes = layout.nbytes(ids)
    if not nbytes or body.get("nbytes") != nbytes:
        raise HandshakeError(f"these blocks have {nbytes} bytes here, {body.get('nbytes')} at the other end")
    return count(body, "number"), ids


@dataclass
class Source:
    """What the sending end knows of one transfer: its own blocks, and how many are still to be named."""

    ids: BlockIds
    left: int

    @classmethod
    def of(cls, ids: BlockIds, block_bytes: Sequence[int]) -> Source:
        """Expect each block that has bytes here to be named once."""
        return cls(ids, sum(len(some) for some, nbytes in zip(ids, block_bytes, strict=False) if nbytes))


def read_row(row: Any) -> tuple[Key, int, int, int]:
    """Read `Chunk.row` from a peer: key, group, start, count; raise `HandshakeError` if malformed."""
    whole = isinstance(row, (list, tuple)) and len(row) == 5
    if not whole or not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in row):
        raise HandshakeError(f"a chunk of the peer is malformed: {row!r}")
    kind, number, group, start, count = row
    if kind not in (Kind.READ, Kind.WRITE) or not count:
        raise HandshakeError(f"a chunk of the peer is malformed: {row!r}")
    return (Kind(kind), number), group, start, count
