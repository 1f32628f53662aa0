"""The thread that steps all lines of one device: one a process and device, however many peers.

NCCL and events have to be asked how far they are; nothing signals it. So while
anything is under way the thread looks again after a pause on its condition, short
while something moved lately and longer else; while nothing is it waits for a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvconnect.cuda import driver
from kvconnect.errors import BrokenError, KVConnectError
from kvconnect.pipes.nccl_lines import Pace
from kvconnect.pipes.turns import Turns

log = logging.getLogger(__name__)

#: Pauses between two looks, in seconds: while something moved lately, which is what the last
#: chunks of a transfer wait for, and the longest else. A chunk takes about 75 µs of NVLink.
SHORTEST_S, LONGEST_S = 30e-6, 1e-3
#: How long "lately" is: what a window of chunks takes on a network, say.
LATELY_S = 10e-3
_GROWTH = 1.5
#: ``PR_SET_TIMERSLACK``: a thread's time-outs are 50 µs late by default.
_SET_TIMER_SLACK = 29


class Stepped(Protocol):
    """What the loop steps."""

    def step(self, now: float) -> Pace:
        """Do what can be done."""
        ...

    def fail(self, error: KVConnectError) -> None:
        """End."""
        ...


class Loop:
    """Steps whatever has been posted to, until it is idle."""

    def __init__(self, name: str, begin: Callable[[], object] = lambda: None) -> None:
        """Have a thread called ``name``, which calls ``begin`` first."""
        self._begin = begin
        self._changed = threading.Condition()
        self._posted: list[tuple[Stepped, Callable[[], object]]] = []
        self._active: dict[int, Stepped] = {}
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def is_current(self) -> bool:
        """Whether the caller is the loop's own thread, which must not wait."""
        return threading.current_thread() is self._thread

    def post(self, line: Stepped, call: Callable[[], object]) -> None:
        """Make ``call`` on the thread, then step ``line`` until it is idle. Any thread."""
        with self._changed:
            self._posted.append((line, call))
            self._changed.notify()

    def _run(self) -> None:
        _sleep_precisely()
        try:
            self._begin()
        except Exception:  # what lines do then fails, and they say so
            log.exception("the thread is not prepared")
        pause, stirred = 0.0, time.monotonic()
        while True:
            calls = self._take(pause if self._active else None)
            for line, call in calls:
                self._active[id(line)] = line
                self._guard(line, call)
            moved = bool(calls)
            del calls  # no line lives on because the thread waits
            for line in list(self._active.values()):
                moved |= self._step(line)
                del line
            now = time.monotonic()
            if moved:
                pause, stirred = 0.0, now
            else:
                pause = SHORTEST_S if now - stirred < LATELY_S else min(LONGEST_S, max(SHORTEST_S, pause * _GROWTH))

    def _take(self, pause: float | None) -> list[tuple[Stepped, Callable[[], object]]]:
        with self._changed:
            if not self._posted and pause != 0.0:
                self._changed.wait(pause)
            posted, self._posted = self._posted, []
            return posted

    def _step(self, line: Stepped) -> bool:
        pace = Pace.MOVED

        def step() -> None:
            nonlocal pace
            pace = line.step(time.monotonic())

        self._guard(line, step)
        if pace is Pace.IDLE:
            del self._active[id(line)]
        return pace is Pace.MOVED

    @staticmethod
    def _guard(line: Stepped, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a line raises ends it, and no other
            if isinstance(error, KVConnectError):
                failed: KVConnectError = error
            else:
                failed = BrokenError(f"{type(error).__name__}: {error}")
                failed.__cause__ = error
            try:
                line.fail(failed)
            except Exception:  # the loop serves others, too
                log.exception("a line could not be ended")


def _sleep_precisely() -> None:
    with contextlib.suppress(OSError, AttributeError):  # later looks are slower, no more
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0)


def bind(device: int) -> None:
    """Make ``device`` this thread's for good: a guard that sets another one back would make a context there."""
    with driver.errors("use the device"):
        driver.cupy().cuda.runtime.setDevice(device)


@driver.per_process
def loop(device: int) -> Loop:
    """Return this process's loop for ``device``."""
    return Loop(f"kvconnect-nccl{device}", lambda: bind(device))


@driver.per_process
def meetings(device: int) -> Turns:
    """Return the threads that make communicators and end them, which takes up to half a second.

    They are the device's; what they do begins with `bind`.
    """
    return Turns(f"kvconnect-nccl{device}-meets", 2)
