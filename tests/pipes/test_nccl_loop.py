"""How often the loop looks: often while things move, seldom while they do not, never while nothing is under way."""

from __future__ import annotations

import threading

from kvconnect.pipes.nccl_lines import Pace
from kvconnect.pipes.nccl_loop import LATELY_S, LONGEST_S, SHORTEST_S, Loop
from kvconnect.testing.peers import LIMIT_S


class Line:
    """Has nothing to do until it is told that it is over."""

    def __init__(self):
        self.looks, self.over, self.idle = 0, False, threading.Event()
        self.failed = []

    def step(self, now):
        self.looks += 1
        if self.over:
            self.idle.set()
            return Pace.IDLE
        return Pace.WAITING

    def fail(self, error):
        self.failed.append(error)


def test_what_waits_for_long_is_looked_at_seldom_and_what_is_over_not_at_all():
    loop, line, long_s = Loop("kvconnect-test-loop"), Line(), 0.5
    loop.post(line, lambda: None)
    threading.Event().wait(long_s)
    most = LATELY_S / SHORTEST_S + long_s / LONGEST_S
    assert 10 < line.looks < 1.5 * most
    line.over = True
    assert line.idle.wait(LIMIT_S)
    looks = line.looks
    threading.Event().wait(0.1)
    assert line.looks == looks
    assert not line.failed
