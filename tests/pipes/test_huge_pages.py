"""Huge pages are asked for by one thread, however many memories there are."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import TYPE_CHECKING

from kvconnect.pipes import huge_pages
from kvconnect.testing.layouts import noisy_memory, regions, separate_layers
from kvconnect.testing.peers import LIMIT_S

if TYPE_CHECKING:
    import pytest


def test_many_memories_are_collapsed_by_one_thread_that_keeps_each_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SLICE_BYTES", huge_pages.HUGE_BYTES)
    asked, real, all_done, go = [], huge_pages._madvise, threading.Event(), threading.Event()

    def madvise(address: int, nbytes: int, advice: int) -> int:
        assert go.wait(LIMIT_S)
        asked.append((threading.current_thread().name, address, nbytes))
        if len(asked) == 12:
            all_done.set()
        return real(address, nbytes, advice)

    monkeypatch.setattr(huge_pages, "_madvise", madvise)
    layout = separate_layers(1, 4, 1, huge_pages.HUGE_BYTES)
    memories = [noisy_memory(layout, seed) for seed in range(4)]
    before = [regions(memory)[0].clone() for memory in memories]
    for memory in memories:
        huge_pages.collapse(memory)
        huge_pages.collapse(memory)  # once a region
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("kvconnect-huge-pages-0") == 1
    last = weakref.ref(memories[-1])
    kept = [regions(memory)[0] for memory in memories]
    del memories, memory
    gc.collect()
    assert last() is not None
    go.set()
    assert all_done.wait(LIMIT_S)
    assert {name for name, *_ in asked} == {"kvconnect-huge-pages-0"}
    assert all(now.equal(then) for now, then in zip(kept, before, strict=True))


def test_what_comes_to_lie_where_collapsed_memory_was_is_collapsed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    done = set[tuple[int, int, int]]()
    monkeypatch.setattr(huge_pages, "_done", done)
    memory = noisy_memory(separate_layers(1, 4, 1, huge_pages.HUGE_BYTES), 1)
    huge_pages.collapse(memory)
    assert done
    gone = weakref.ref(memory)
    del memory
    until = time.monotonic() + LIMIT_S
    while gone() is not None:  # the thread has it until it is through
        assert time.monotonic() < until
        gc.collect()
    assert not done
