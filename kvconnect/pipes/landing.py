"""Memory for large tensors that arrive, used again once the tensor that had it is gone.

Fresh memory costs a page fault and a zeroed page for every 4 KiB, half the time of
a fast receive. So what a pipe's large tensors leave behind is kept for its next
ones: little of it, and not for long.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from typing import Final

import numpy as np
import torch

from kvconnect.errors import BrokenError
from kvconnect.pipes.reactor import Reactor
from kvconnect.pipes.wire import Meta

#: Smaller tensors come from the allocator, which reuses memory itself.
LEAST_BYTES: Final = 4 << 20
#: What a pipe keeps: one area for the tensor in use and one for the next, not more than this.
MOST_AREAS: Final = 2
MOST_BYTES: Final = 512 << 20

_KEEP_S: Final = 5.0
_GRAIN: Final = 2 << 20  # a huge page


class Landing:
    """The areas of one pipe. `close` gives back what is kept; tensors in use live on."""

    def __init__(self, loop: Reactor) -> None:
        """``loop`` drops what was not used for a while."""
        self._loop = loop
        # A deque, not a lock: areas come back wherever a tensor dies, even inside these methods.
        self._idle: deque[mmap.mmap] = deque()
        self._tidying = False
        self._closed = False

    def empty(self, meta: Meta) -> torch.Tensor:
        """Return a contiguous CPU tensor of ``meta``'s shape and dtype, not initialised.

        Raises:
            BrokenError: there is no memory for it. Its bytes come nevertheless, and have no place.

        """
        try:
            if meta.nbytes < LEAST_BYTES:
                return meta.empty()
            area = self._area(-(-meta.nbytes // _GRAIN) * _GRAIN)
        except (RuntimeError, OSError, MemoryError) as error:
            raise BrokenError(f"no memory for the tensor of {meta.nbytes} bytes that comes: {error}") from error
        owner = np.frombuffer(area, dtype=np.uint8, count=meta.nbytes)
        tensor = torch.from_numpy(owner).view(meta.dtype).view(meta.shape)
        # The tensor's storage holds `owner`, and nothing else does.
        weakref.finalize(owner, self._back, area).atexit = False
        return tensor

    def close(self) -> None:
        """Keep nothing from now on."""
        self._closed = True
        self._idle.clear()

    def _area(self, nbytes: int) -> mmap.mmap:
        for _ in range(len(self._idle)):
            try:
                area = self._idle.popleft()
            except IndexError:
                break  # tidied up meanwhile
            if nbytes <= len(area) <= 2 * nbytes:
                return area
            self._idle.append(area)
        area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_HUGEPAGE)
        return area

    def _back(self, area: mmap.mmap) -> None:
        # A finalizer: it may run in the middle of anything, so it takes no lock. In a forked
        # child there is no reactor to tidy up.
        if self._closed or len(area) > MOST_BYTES or self._loop.pid != os.getpid():
            return
        self._idle.append(area)
        while len(self._idle) > MOST_AREAS or sum(len(one) for one in tuple(self._idle)) > MOST_BYTES:
            try:
                self._idle.popleft()
            except IndexError:
                break
        if not self._tidying:
            self._tidying = True
            self._loop.note(self._tidy_later)

    def _tidy_later(self) -> None:
        self._loop.call_later(_KEEP_S, self._tidy)

    def _tidy(self) -> None:
        self._tidying = False
        self._idle.clear()
