"""The thread that steps all lines of one device: one a process and device, however many peers.

NCCL and events have to be asked how far they are; nothing signals it. So while
anything is under way the thread looks again after a pause on its condition, short
while something moved lately and longer else; while nothing is it waits for a call.

Waking a thread takes longer than to start a chunk. So whoever brings work has it started
there and then, if the thread is not at it; what comes of it is for the thread to hear.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from kvconnect.cuda import driver
from kvconnect.errors import BrokenError, KVConnectError, as_ours
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


class Pace(enum.IntEnum):
    """What a step of a line came to: the more, the sooner the next one should be."""

    #: Nothing is under way.
    IDLE = 0
    #: Something is that nobody waits for here.
    PATIENT = 1
    #: Something is, and nothing of it was over.
    WAITING = 2
    MOVED = 3


class Stepped(Protocol):
    """What the loop steps. Its methods are called by one thread at a time."""

    def start(self) -> None:
        """Start what can be started now; nothing ends by it."""
        ...

    def step(self, now: float) -> Pace:
        """Do what can be done."""
        ...

    def fail(self, error: KVConnectError) -> None:
        """End."""
        ...


class Loop:
    """Steps whatever has been posted to, until it is idle."""

    def __init__(self, name: str, place: Place | None = None) -> None:
        """Have a thread called ``name``, and work in ``place``."""
        self._place = place or Place()
        #: Held by whoever is at the lines.
        self._turn = threading.Lock()
        self._posted: deque[tuple[Stepped, Callable[[], object]]] = deque()
        self._active: dict[int, Stepped] = {}
        self._changed = threading.Condition()
        self._stirred = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def is_current(self) -> bool:
        """Whether the caller is the loop's own thread, which must not wait."""
        return threading.current_thread() is self._thread

    def post(self, line: Stepped, call: Callable[[], object]) -> None:
        """Have the loop's thread make ``call``, then step ``line`` until it is idle. Any thread."""
        self._posted.append((line, call))
        self._wake()

    def bring(self, line: Stepped, call: Callable[[], object]) -> None:
        """Do as `post` does; or, if nobody is at it, make ``call`` and start what it brought at once.

        ``call`` must end nothing: whoever waits for an end hears of it on the loop's thread.
        """
        if self._posted or not self._turn.acquire(blocking=False):
            self.post(line, call)
            return
        # It wakes up meanwhile, waits for its turn and goes on.
        self._wake()
        try:
            with self._place.visited():
                self._begin(line, call)
        except KVConnectError:
            self._posted.append((line, call))
        finally:
            self._turn.release()

    def _wake(self) -> None:
        with self._changed:
            self._stirred = True
            self._changed.notify()

    def _run(self) -> None:
        _sleep_precisely()
        try:
            self._place.inhabit()
        except Exception:  # what lines do then fails, and they say so
            log.exception("the thread is not prepared")
        pause, moved = 0.0, time.monotonic()
        while True:
            if self._rest(pause if self._active else None):
                moved = time.monotonic()
            with self._turn:
                pace = Pace.MOVED if self._take() else Pace.IDLE
                for line in list(self._active.values()):
                    pace = max(pace, self._step(line))
                    del line  # no line lives on because the thread waits
            now = time.monotonic()
            if pace is Pace.MOVED:
                pause, moved = 0.0, now
            elif pace is Pace.WAITING and now - moved < LATELY_S:
                pause = SHORTEST_S
            else:
                pause = LONGEST_S if pace is Pace.PATIENT else min(LONGEST_S, max(SHORTEST_S, pause * _GROWTH))

    def _rest(self, pause: float | None) -> bool:
        """Wait for at most ``pause`` seconds, with ``None`` for ever; return whether somebody came."""
        with self._changed:
            if not self._stirred and pause != 0.0:
                self._changed.wait(pause)
            stirred, self._stirred = self._stirred, False
            return stirred

    def _take(self) -> bool:
        moved = bool(self._posted)
        while self._posted:
            self._begin(*self._posted.popleft())
        return moved

    def _begin(self, line: Stepped, call: Callable[[], object]) -> None:
        self._active[id(line)] = line
        self._guard(line, call)
        self._guard(line, line.start)

    def _step(self, line: Stepped) -> Pace:
        pace = Pace.MOVED

        def step() -> None:
            nonlocal pace
            pace = line.step(time.monotonic())

        self._guard(line, step)
        if pace is Pace.IDLE:
            del self._active[id(line)]
        return pace

    @staticmethod
    def _guard(line: Stepped, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a line raises ends it, and no other
            try:
                line.fail(as_ours(error))
            except Exception:  # the loop serves others, too
                log.exception("a line could not be ended")


def _sleep_precisely() -> None:
    with contextlib.suppress(OSError, AttributeError):  # later looks are slower, no more
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0)


class Place:
    """Where the work of a loop is done: anywhere."""

    def inhabit(self) -> None:
        """Make this thread, the loop's own, fit for the work for good."""

    @contextlib.contextmanager
    def visited(self) -> Iterator[None]:
        """Make this thread, somebody else's, fit for the work for a while; raise `KVConnectError` if it cannot be."""
        yield


class OnDevice(Place):
    """On one GPU."""

    def __init__(self, device: int) -> None:
        self._device, self._context = device, 0

    def inhabit(self) -> None:
        """See `Place.inhabit`."""
        bind(self._device)
        with driver.errors("use the device"):
            self._context = driver.cupy().cuda.driver.ctxGetCurrent()

    @contextlib.contextmanager
    def visited(self) -> Iterator[None]:
        """See `Place.visited`. A thread that had no device keeps this one: setting none back is what CUDA cannot do."""
        if not self._context:
            raise BrokenError("the device is not prepared yet")
        cuda = driver.cupy().cuda
        with driver.errors("use the device"):
            before = cuda.driver.ctxGetCurrent()
            if before in {0, self._context}:
                if not before:
                    cuda.runtime.setDevice(self._device)
                yield
                return
            own = cuda.runtime.getDevice()
            cuda.runtime.setDevice(self._device)
            try:
                yield
            finally:
                cuda.runtime.setDevice(own)


def bind(device: int) -> None:
    """Make ``device`` this thread's for good: a guard that sets another one back would make a context there."""
    with driver.errors("use the device"):
        driver.cupy().cuda.runtime.setDevice(device)


@driver.per_process
def loop(device: int) -> Loop:
    """Return this process's loop for ``device``."""
    return Loop(f"kvconnect-nccl{device}", OnDevice(device))


@driver.per_process
def meetings(device: int) -> Turns:
    """Return the threads that make communicators and end them, which takes up to half a second.

    They are the device's; what they do begins with `bind`.
    """
    return Turns(f"kvconnect-nccl{device}-meets", 2)
