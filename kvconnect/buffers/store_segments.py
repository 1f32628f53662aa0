"""A claim on entries of a store: the segments of one prompt, joined by the scheduler and taken apart by workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvconnect.buffers.base import Claim, LookupKey
from kvconnect.buffers.store import Found
from kvconnect.buffers.store_manifest import Manifest
from kvconnect.paging import BlockIds


class Segment(NamedTuple):
    """One entry as a worker needs it; plain data, for it crosses to other processes."""

    place: str
    chunk_bytes: int
    #: Blocks that it has in each group; null blocks are not there.
    counts: tuple[int, ...]
    parts: tuple[tuple[int, str, bytes], ...]


@dataclass(frozen=True)
class Wanted:
    """What is needed of one segment: which of its blocks, by their numbers in it, and where they go."""

    segment: Segment
    numbers: BlockIds
    local: BlockIds


def claim(grant: str, key: LookupKey, entries: Sequence[tuple[Found, Manifest]]) -> Claim:
    """Join the entries of a prompt, in its order. Blocks are numbered on, from 1, through all of them."""
    blocks: list[list[int]] = [[] for _ in entries[0][1].blocks]
    before = [0] * len(blocks)
    segments = []
    for found, manifest in entries:
        counts = tuple(max(ids, default=0) for ids in manifest.blocks)
        for group, ids in enumerate(manifest.blocks):
            blocks[group] += [number and before[group] + number for number in ids]
            before[group] += counts[group]
        parts = tuple((part.nbytes, part.shape, part.sums) for part in manifest.parts)
        segments.append(tuple(Segment(found.place, manifest.chunk_bytes, counts, parts)))
    return Claim(grant, key, tuple(map(tuple, blocks)), {"segments": segments})


def wanted(claimed: Claim, remote: BlockIds, local: BlockIds) -> Iterator[Wanted]:
    """Say which blocks of which segments a load of ``remote`` into ``local`` needs."""
    before = [0] * len(remote)
    for segment in map(Segment._make, claimed.data["segments"]):
        numbers, ours = [], []
        for group, (theirs, mine) in enumerate(zip(remote, local, strict=True)):
            first, last = before[group], before[group] + segment.counts[group]
            pairs = [
                (number - first, block) for number, block in zip(theirs, mine, strict=True) if first < number <= last
            ]
            numbers.append([number for number, _ in pairs])
            ours.append([block for _, block in pairs])
            before[group] = last
        if any(numbers):
            yield Wanted(segment, numbers, ours)
