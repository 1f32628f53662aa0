"""A wire without a device: what one end sends, the other takes, in order and of the same size."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING

from kvconnect import blocks
from kvconnect.errors import BrokenError
from kvconnect.pipes.nccl_loop import Loop
from kvconnect.pipes.turns import Turns

if TYPE_CHECKING:
    import torch

_names = itertools.count()
_lock = threading.Lock()
_lines: dict[bytes, FakeLine] = {}
loop: list[Loop] = []


class FakeLine:
    """What two wires share."""

    def __init__(self):
        self.joined = 0
        #: How often either end has looked: they meet by that.
        self.looks = [0, 0]
        self.flying: deque[torch.Tensor] = deque()
        self.dead = False
        #: Nothing arrives while it is set.
        self.held = False
        self.sent = threading.Event()


class FakeWire:
    def __init__(self, memory, line, slot_bytes, receives):
        self.memory, self.line, self.slot_bytes, self.receives = memory, line, slot_bytes, receives
        self.sizes = []
        self.aborted = False

    def settled(self):
        if self.line.dead:
            raise BrokenError("the communicator failed")
        self.line.looks[self.receives] += 1
        return self.line.joined == 2 and min(self.line.looks) > 2

    def launch(self, move):
        assert move.nbytes <= self.slot_bytes
        self.sizes.append(move.nbytes)
        if not self.receives:
            data = self._gather(move)
            assert data.nbytes == move.nbytes
            self.line.flying.append(data)
            self.line.sent.set()
            return lambda: True
        done = []

        def arrived():
            if not done and self.line.flying and not self.line.held:
                data = self.line.flying.popleft()
                assert data.nbytes == move.nbytes, "the two ends are out of step"
                if move.ids is not None:
                    ids = [[] for _ in range(move.group)] + [list(move.ids)]
                    blocks.scatter_stream(data, self.memory, ids)
                done.append(True)
            return bool(done)

        return arrived

    def abort(self):
        self.aborted = True
        self.line.dead = True

    def at_rest(self):
        return self.aborted

    def _gather(self, move):
        return blocks.gather_stream(self.memory, [[] for _ in range(move.group)] + [list(move.ids)])


class FakeWires:
    def __init__(self, memory):
        if not loop:
            loop.append(Loop("kvconnect-nccl-test"))
        self.memory, self.loop, self.meetings = memory, loop[0], _meetings
        self.made = []

    def name(self):
        name = b"line %d" % next(_names)
        _lines[name] = FakeLine()
        return name

    def make(self, name, slot_bytes, *, receives):
        with _lock:
            line = _lines[name]
            line.joined += 1
        wire = FakeWire(self.memory, line, slot_bytes, receives)
        self.made.append(wire)
        return wire


_meetings = Turns("kvconnect-nccl-test-meets", 2)
