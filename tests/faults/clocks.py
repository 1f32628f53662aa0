"""Clocks that stand still until a test moves them: one for each host, seen by all processes."""

from __future__ import annotations

import mmap
import threading

from kvconnect.clock import SYSTEM, Clock

#: Not 0, so that what was never set does not look like now.
_START = 1000.0


class Clocks:
    """As many clocks as there are hosts, in memory that forked processes share."""

    def __init__(self, count: int) -> None:
        self._times = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self.count = count
        for index in range(count):
            self._times[index] = _START

    def advance(self, seconds: float, only: int | None = None) -> None:
        """Let time pass at all hosts, or make the clock of one jump."""
        for index in range(self.count) if only is None else (only,):
            self._times[index] += seconds

    def of(self, index: int) -> Clock:
        """Return a host's clock."""
        return _Shared(self._times, index)


class RealTime(Clocks):
    """Everybody's real clock."""

    def __init__(self) -> None:
        self.count = 1

    def advance(self, seconds: float, only: int | None = None) -> None:
        threading.Event().wait(seconds)

    def of(self, index: int) -> Clock:
        return SYSTEM


class _Shared(Clock):
    """One of the clocks. Whoever waits for it looks every few milliseconds: it does not tell when it is moved."""

    def __init__(self, times: memoryview, index: int) -> None:
        self._times, self._index = times, index

    @property
    def identity(self) -> str:
        return f"of host {self._index}"

    def now(self) -> float:
        return float(self._times[self._index])

    def poll_ms(self, when: float) -> int:
        return 0 if when <= self.now() else 4
