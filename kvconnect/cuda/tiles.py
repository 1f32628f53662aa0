"""Two paged memories → the tiles that one block copy consists of: what the kernels of ``copy.cu`` read.

Pure geometry on numpy arrays. The pieces of a block are the same for every block but
for its id, so one table serves all copies between two memories: a launch adds only
pairs of ids. Peers may lay the same block out differently; tiles are cut so that
each is one run on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvconnect.paging import IoVec, LayerLayout, PagedLayout, PagedMemory

UInt64Array = npt.NDArray[np.uint64]

#: Columns of a table: address, stride and spread of either side, and bytes.
FROM, TO, NBYTES, COLUMNS = 0, 3, 6, 8
#: What bulk copies need addresses, strides and sizes to be multiples of.
ALIGNMENT = 16


@dataclass(frozen=True)
class Paged:
    """A side that is paged memory: pieces at ``base[region] + offset + id * block_stride + …``."""

    layout: PagedLayout
    bases: Sequence[int]

    @classmethod
    def of(cls, memory: PagedMemory) -> Paged:
        """Describe a memory of this process."""
        return cls(memory.layout, [int(base) for base in memory.bases])

    def rows(self, group: int) -> list[UInt64Array]:
        """Return ``uint64[pieces, 4]`` per layer: address, stride, spread and bytes of each piece of a block."""
        return [self._layer(layer) for layer in self.layout.in_group(group)]

    def _layer(self, layer: LayerLayout) -> UInt64Array:
        offsets = layer.piece_offsets().astype(np.uint64)
        rows = np.zeros((offsets.size, 4), dtype=np.uint64)
        rows[:, 0] = offsets + np.uint64(self.bases[layer.region] + layer.offset)
        rows[:, 1] = layer.block_stride
        rows[:, 3] = layer.piece_bytes
        return rows


@dataclass(frozen=True)
class Packed:
    """A side that is one contiguous buffer: the canonical stream of the blocks of *one group*.

    Its ids are ``0, 1, 2, …`` and its address is given at launch, as a shift.
    """

    layout: PagedLayout

    def rows(self, group: int) -> list[UInt64Array]:
        """Return one piece per layer, as `Paged.rows` does."""
        rows, before = [], 0
        for layer in self.layout.in_group(group):
            nbytes = layer.block_bytes
            rows.append(np.array([[0, nbytes, before, nbytes]], dtype=np.uint64))
            before += nbytes
        return rows


Side = Paged | Packed


def table(source: Side, target: Side, group: int, tile_bytes: int) -> UInt64Array:
    """Return the tiles of one block of ``group``, ``uint64[tiles, COLUMNS]``, in canonical order.

    Args:
        source, target: layouts of the same `PagedLayout.shape`.
        group: the KV-cache group.
        tile_bytes: the most bytes of a tile, a multiple of `ALIGNMENT`.

    """
    found = [_join(a, b, tile_bytes) for a, b in zip(source.rows(group), target.rows(group), strict=True)]
    return np.concatenate(found) if found else np.zeros((0, COLUMNS), dtype=np.uint64)


def listed(source: IoVec, target: IoVec, tile_bytes: int) -> UInt64Array:
    """Return the tiles of one copy between pieces that are listed one by one, ``uint64[tiles, COLUMNS]``.

    Args:
        source, target: addresses and lengths; two streams of the same length.
        tile_bytes: as for `table`.

    """
    return _join(_rows(source), _rows(target), tile_bytes)


def _rows(pieces: IoVec) -> UInt64Array:
    rows = np.zeros((len(pieces), 4), dtype=np.uint64)
    rows[:, (0, 3)] = pieces
    return rows


def is_aligned(tiles: UInt64Array) -> bool:
    """Whether every number of a table is a multiple of `ALIGNMENT`."""
    return not (tiles[:, : NBYTES + 1] % np.uint64(ALIGNMENT)).any()


def _join(source: UInt64Array, target: UInt64Array, tile_bytes: int) -> UInt64Array:
    """Cut one layer's pieces of both sides where either begins, and at most ``tile_bytes`` apart."""
    ends_a, ends_b = np.cumsum(source[:, 3]), np.cumsum(target[:, 3])
    nbytes = [int(ends[-1]) if len(ends) else 0 for ends in (ends_a, ends_b)]
    if nbytes[0] != nbytes[1]:
        raise ValueError(f"{nbytes[0]} bytes on one side and {nbytes[1]} on the other")
    starts = np.unique(np.concatenate((np.zeros(1, np.uint64), ends_a, ends_b)))[:-1]
    lengths = np.diff(starts, append=np.uint64(nbytes[0]))
    parts = ((lengths + np.uint64(tile_bytes - 1)) // np.uint64(tile_bytes)).astype(np.int64)
    # How far into its run each tile lies.
    within = (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64)
    within *= np.uint64(tile_bytes)
    starts, lengths = np.repeat(starts, parts), np.repeat(lengths, parts)
    tiles = np.zeros((starts.size, COLUMNS), dtype=np.uint64)
    tiles[:, NBYTES] = np.minimum(lengths - within, np.uint64(tile_bytes))
    for column, side, ends in ((FROM, source, ends_a), (TO, target, ends_b)):
        piece = np.searchsorted(ends, starts, side="right")
        tiles[:, column : column + 3] = side[piece, :3]
        tiles[:, column] += starts - (ends[piece] - side[piece, 3]) + within
    return tiles
