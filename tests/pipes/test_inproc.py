"""The reference pipe obeys every law."""

from __future__ import annotations

import threading
import weakref

import pytest

from kvconnect.errors import BrokenError
from kvconnect.pipes import vectored
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.pipes.turns import CHUNK_BYTES
from kvconnect.testing.block_laws import attach
from kvconnect.testing.layouts import noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S, open_pair
from kvconnect.testing.pipe_tests import PipeTests


class TestInprocPipe(PipeTests):
    pipe_class = InprocPipe
    many_pipes = 1000


def test_memory_lives_as_long_as_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if both ends are aborted meanwhile, and nobody else keeps it."""
    copying, gate, copy = threading.Event(), threading.Event(), vectored.copy

    def slow_copy(*iovecs: object) -> None:
        copying.set()
        assert gate.wait(LIMIT_S)
        copy(*iovecs)

    pair = open_pair(InprocPipe)
    layout = separate_layers(1, 2, 1, CHUNK_BYTES)
    ends = attach(pair, noisy_memory(layout, 1), noisy_memory(layout, 2))
    memories = [weakref.ref(ends.mine), weakref.ref(ends.theirs)]
    del ends
    monkeypatch.setattr(vectored, "copy", slow_copy)
    transfer = pair.here.read_blocks([[0, 1]], [[0, 1]])
    assert copying.wait(LIMIT_S)
    pair.here.abort()
    pair.there.abort()
    assert all(memory() is not None for memory in memories)
    gate.set()
    with pytest.raises(BrokenError):
        transfer.wait(LIMIT_S)
    pair.close()
