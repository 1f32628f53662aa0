"""Pipes that fail as a test says, and two engines over them."""

import threading
from collections import Counter
from typing import ClassVar

from kvconnect.buffers.base import Want
from kvconnect.clock import SYSTEM
from kvconnect.errors import BrokenError
from kvconnect.pipes.base import Transfer
from kvconnect.pipes.inproc import InprocPipe
from tests.buffers.engines import Engine, group, key


def granted(lease_ms=9000):
    """Return what an owner of this host answers to a claim."""
    return {"state": "ok", "lease_ms": lease_ms, "clock": SYSTEM.identity, "now": SYSTEM.now()}


class FaultyPipe(InprocPipe):
    """An inproc pipe that fails as the test says."""

    opened: ClassVar[Counter] = Counter()
    breaks: int = 0
    clogs = False
    refuses = False
    stalls = 0  # reads that hang while they start
    opens_stall: ClassVar[dict] = {}  # openings that hang, by side
    attach_stalls = 0  # serving ends that hang while they are attached, until they are aborted
    stalled: ClassVar[threading.Event]  # a read is starting
    gate: ClassVar[threading.Event]  # lets it go on
    started: ClassVar[list] = []  # clogged transfers
    held: ClassVar[list] = []  # those of them that were cancelled

    def __init__(self, spec):
        if type(self).refuses and spec.side == "serves":
            raise ValueError("a third party's fault")
        if type(self).opens_stall.get(spec.side, 0):
            type(self).opens_stall[spec.side] -= 1
            type(self).stalled.set()
            type(self).gate.wait(20)
        super().__init__(spec)
        self.ended = threading.Event()
        type(self).opened[spec.side] += 1

    def attach(self, *args):
        if type(self).attach_stalls and self._side == 0:
            type(self).attach_stalls -= 1
            self.ended.wait(20)
        super().attach(*args)

    def abort(self):
        super().abort()
        self.ended.set()
        type(self).gate.set()

    def read_blocks(self, remote, local):
        cls = type(self)
        if cls.stalls:
            cls.stalls -= 1
            cls.stalled.set()
            cls.gate.wait(20)
            raise BrokenError("cut")
        if cls.breaks:
            cls.breaks -= 1
            self.abort()
            raise BrokenError("cut")
        if cls.clogs:
            transfer = Transfer(1, lambda: cls.held.append(transfer))
            cls.started.append(transfer)
            return transfer
        return super().read_blocks(remote, local)


def engines(**options):
    options = {"group": group(), **options}
    return Engine("P", produces=True, **options), Engine("D", consumes=True, **options)


def claimed(p, d, number=1, blocks=((1, 2, 3),)):
    return d.find(f"r{number}", Want(key(number), ticket=p.offer(number, blocks)))
