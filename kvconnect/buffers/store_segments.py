"""A claim on entries of a store: the segments of one prompt, joined by the scheduler and taken apart by workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvconnect.buffers.base import Claim
from kvconnect.buffers.store import Found
from kvconnect.buffers.store_manifest import Manifest
from kvconnect.errors import LoadError
from kvconnect.paging import BlockIds


class Segment(NamedTuple):
    """One entry as a worker needs it; plain data, for it crosses to other processes."""

    place: str
    chunk_bytes: int
    #: Blocks that it has in each group; null blocks are not there.
    counts: tuple[int, ...]
    parts: tuple[tuple[int, str, bytes], ...]
    #: Under which it is offered to others, too; empty if it was taken.
    name: str


@dataclass(frozen=True)
class Wanted:
    """What is needed of one segment: which of its blocks, by their numbers in it, and where they go."""

    segment: Segment
    numbers: BlockIds
    local: BlockIds


def claim(grant: str, entries: Sequence[tuple[Found, Manifest]], *, offered: bool) -> Claim:
    """Join the entries of a prompt, in its order, ``offered`` to others or taken.

    Blocks are numbered on, from 1, through all of them.
    """
    blocks: list[list[int]] = [[] for _ in entries[0][1].blocks]
    before = [0] * len(blocks)
    segments = []
    for found, manifest in entries:
        counts = tuple(max(ids, default=0) for ids in manifest.blocks)
        for group, ids in enumerate(manifest.blocks):
            blocks[group] += [number and before[group] + number for number in ids]
            before[group] += counts[group]
        parts = tuple((part.nbytes, part.shape, part.sums) for part in manifest.parts)
        name = manifest.name if offered else ""
        segments.append(tuple(Segment(found.place, manifest.chunk_bytes, counts, parts, name)))
    return Claim(grant, entries[-1][1].key, tuple(map(tuple, blocks)), {"segments": segments})


def wanted(claimed: Claim, remote: BlockIds, local: BlockIds) -> Iterator[Wanted]:
    """Say which blocks of which segments a load of ``remote`` into ``local`` needs.

    Raises:
        LoadError: the claim does not have these blocks.

    """
    segments = [Segment._make(each) for each in claimed.data["segments"]]
    groups = []
    for group, (theirs, ours) in enumerate(zip(remote, local, strict=True)):
        ends = np.cumsum([segment.counts[group] for segment in segments])
        numbers = np.asarray(theirs, dtype=np.int64)
        if numbers.size and not 0 < numbers.min() <= numbers.max() <= ends[-1]:
            raise LoadError(f"group {group} of the entry has {ends[-1]} blocks, not {theirs}")
        groups.append((numbers, np.asarray(ours, dtype=np.int64), np.searchsorted(ends, numbers), ends))
    for index, segment in enumerate(segments):
        here = [
            (numbers[of == index] - ends[index] + segment.counts[group], ours[of == index])
            for group, (numbers, ours, of, ends) in enumerate(groups)
        ]
        if any(len(numbers) for numbers, _ in here):
            yield Wanted(segment, [numbers.tolist() for numbers, _ in here], [ours.tolist() for _, ours in here])
