"""Huge pages for memory that is copied often: the kernel walks both sides' page tables for every copy.

One-copy reads of 32 KiB pieces ran at 0.7 of a memcpy with 4 KiB pages on both sides
and at 0.86 with huge ones. Everything here is advice: a kernel that has none to give says
no, and all works as before.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Final

from kvconnect.paging import PagedMemory
from kvconnect.pipes.turns import Turns

log = logging.getLogger(__name__)

#: Size of a huge page on x86-64; elsewhere a multiple of it, or no harm.
HUGE_BYTES: Final = 2 << 20
_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
_MADV_HUGEPAGE: Final = 14
_MADV_COLLAPSE: Final = 25
#: Bytes collapsed by one call, about 0.1 s: other threads' page faults wait that long at most.
_SLICE_BYTES: Final = 32 << 20

#: This slice is not there yet, or is busy just now: the next one may do.
_GO_ON: Final = frozenset({errno.EAGAIN, errno.EBUSY, errno.ENOMEM})

_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_lock = threading.Lock()
_done: set[tuple[int, int, int]] = set()
_turns: dict[int, Turns] = {}


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages where none of this memory was touched yet; costs nothing."""
    start, end = _whole(address, address + nbytes, _PAGE_BYTES)
    if end > start:
        _madvise(start, end - start, _MADV_HUGEPAGE)


def collapse(memory: PagedMemory) -> None:
    """Turn ``memory``, touched or not, into huge pages, once a process and region while it lives.

    The kernel copies it page by page (0.5 to 1 s for 512 MB), so a thread does it, one
    for all memories of a process, slice by slice; the memory can be used meanwhile.
    """
    if memory.device != "cpu":
        return
    with _lock:
        pid = os.getpid()  # a forked child starts anew
        regions = {
            (pid, int(base), nbytes) for base, nbytes in zip(memory.bases, memory.layout.region_bytes, strict=True)
        }
        new = regions - _done
        _done.update(new)
        if not new:
            return
        # Other memory may be where this was. Without the lock, which the thread may hold that frees it.
        weakref.finalize(memory, _done.difference_update, new).atexit = False
        if pid not in _turns:
            _turns.clear()
            _turns[pid] = Turns("kvconnect-huge-pages", 1)
        # The step keeps `memory`, and so its owner, alive while it works.
        _turns[pid].add(functools.partial(_collapse_next, memory, deque(_slices(sorted(new)))))


def _slices(regions: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Yield address and length of one call's work after the other."""
    for _, base, nbytes in regions:
        start, end = _whole(base, base + nbytes, HUGE_BYTES)
        for at in range(start, end, _SLICE_BYTES):
            yield at, min(_SLICE_BYTES, end - at)


def _collapse_next(memory: PagedMemory, slices: deque[tuple[int, int]]) -> bool:
    """Collapse the next slice of ``memory``; return whether more remain."""
    if slices and _madvise(*slices.popleft(), _MADV_COLLAPSE) and ctypes.get_errno() not in _GO_ON:
        log.debug("no huge pages for KV memory on %s: %s", memory.device, os.strerror(ctypes.get_errno()))
        return False
    return bool(slices)


def _renew_lock() -> None:
    # Another thread of the parent may have held the lock at the moment of the fork.
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _whole(start: int, end: int, grain: int) -> tuple[int, int]:
    """Return the whole pages of ``grain`` bytes inside ``start:end``."""
    return -(-start // grain) * grain, end // grain * grain
