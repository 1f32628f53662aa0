"""Which runs of memory a block transfer consists of, when it is read straight into place.

Bytes may go in any order as long as both sides keep to the same one, so that what lies
together on both sides goes in one piece: the layers of a block in a block-outermost
layout, and blocks that are neighbours at both ends.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvconnect.cuda.costs import runs
from kvconnect.cuda.tiles import FROM, NBYTES, TO, Paged, table
from kvconnect.paging import BlockIds, IoVec

#: No run of a block is longer: nothing is cut.
_ANY_LENGTH = 1 << 48


class Runs:
    """The runs of the blocks of two memories of one `PagedLayout.shape`. Never changes: threads may share it."""

    def __init__(self, remote: Paged, local: Paged) -> None:
        """Find what lies together within a block; takes milliseconds, once for a pair of memories."""
        groups = range(remote.layout.num_groups)
        self._tables = [runs(table(remote, local, group, _ANY_LENGTH)) for group in groups]

    def count(self, remote: BlockIds, local: BlockIds) -> int:
        """Return in how many runs these blocks are read; cheaper than to `cut` them."""
        found = 0
        for rows, theirs, ours in zip(self._tables, remote, local, strict=False):
            joined = (rows[:, NBYTES] == rows[:, FROM + 1]) & (rows[:, NBYTES] == rows[:, TO + 1])
            follow = int(((np.diff(theirs) == 1) & (np.diff(ours) == 1)).sum())
            found += len(rows) * len(theirs) - int(joined.sum()) * follow
        return found

    def cut(self, remote: BlockIds, local: BlockIds) -> tuple[IoVec, IoVec]:
        """Return the runs of the peer's blocks and of ours, pair by pair of equal length."""
        parts = [
            (_place(rows, FROM, theirs), _place(rows, TO, ours))
            for rows, theirs, ours in zip(self._tables, remote, local, strict=False)
        ]
        empty = np.zeros((0, 2), dtype=np.uint64)
        far, near = (np.concatenate([empty, *(part[side] for part in parts)]) for side in (0, 1))
        if not len(far):
            return far, near
        follows = _follows(far) & _follows(near)
        first = np.flatnonzero(np.concatenate(([True], ~follows)))
        lengths = np.add.reduceat(far[:, 1], first)
        return tuple(np.stack([side[first, 0], lengths], axis=1) for side in (far, near))  # type: ignore[return-value]


def _place(rows: npt.NDArray[np.uint64], column: int, ids: BlockIds | npt.ArrayLike) -> IoVec:
    """Return where each row lies in each block: block by block within a row, since neighbours join there."""
    numbers = np.asarray(ids, dtype=np.uint64)
    placed = np.empty((len(rows), len(numbers), 2), dtype=np.uint64)
    placed[:, :, 0] = rows[:, column, None] + rows[:, column + 1, None] * numbers
    placed[:, :, 1] = rows[:, NBYTES, None]
    return placed.reshape(-1, 2)


def _follows(iov: IoVec) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = iov[1:, 0] == iov[:-1, 0] + iov[:-1, 1]
    return found
