"""Where device work runs: a fixed few streams of one device, each with a thread that waits for it.

vLLM computes on streams of its own and in its own threads; copies may neither wait in
these nor order themselves behind them. Whoever starts a copy enqueues it there and then,
which takes microseconds; a thread per stream waits on events, so that *over* means that
the device is done. What blocks (mapping, measuring, freeing) is left to a thread of its own.

An event tells of itself by an interrupt, which takes 190 µs on the virtual machines that
this was measured on (and 500 at the 90th percentile): longer than a copy of 50 MB. So a lane
sleeps until about when the copy should be over, looks a few times, and only then blocks.
A sleep lasts 50 µs longer than it was asked to unless the thread says that this matters.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvconnect import timers
from kvconnect.cuda import driver
from kvconnect.errors import KVConnectError, as_ours

logger = logging.getLogger(__name__)

#: Copies that may be under way beside each other; one more waits for the one before it on its stream.
LANES = 4

#: Between two looks at an event, and for how long it is looked at once it is overdue.
_LOOK_S, _PATIENCE_S = 20e-6, 2e-3
#: A wait shorter than this is not slept through at all: going to sleep and waking take as long.
_SHORT_S = 40e-6
#: Share of the expected time that is slept through: what is expected was measured on short copies.
_SURE = 0.75

Over = Callable[[KVConnectError | None], None]
Call = Callable[[Any], object]


class _Started(NamedTuple):
    """Work on a stream: the event behind it, what it uses, whom to tell, when it began, how long it should take."""

    event: Any
    kept: object
    error: KVConnectError | None
    over: Over
    began: float
    expected_s: float


class Lanes:
    """The streams of one device and their threads. Thread-safe."""

    def __init__(self, device: int, count: int = LANES) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._lanes = [_Lane(device, f"kvconnect-cuda{device}-lane{number}") for number in range(count)]
        self._chores: queue.SimpleQueue[tuple[Call, Over]] = queue.SimpleQueue()
        threading.Thread(target=self._do_chores, name=f"kvconnect-cuda{device}-chores", daemon=True).start()

    def start(self, enqueue: Call, over: Over, expected_s: float = 0.0) -> None:
        """Call ``enqueue(stream)`` at once, and ``over`` when the device has done what it enqueued.

        ``stream`` is a CuPy stream with little to do; what ``enqueue`` returns is kept alive
        until then. ``over`` is called exactly once, on a thread of the lanes, with the error if
        either failed; it must not block. ``expected_s`` is how long that should take: the better
        the guess, the sooner its end is heard.
        """
        with self._lock:
            lane = min(self._lanes, key=lambda lane: lane.started)
            lane.started += 1
        lane.start(enqueue, over, expected_s)

    def chore(self, call: Call, over: Over) -> None:
        """Have ``call(stream)`` made by a thread that may block, after the chores before it; then ``over``."""
        self._chores.put((call, over))

    def _do_chores(self) -> None:
        stream: Any = None
        while True:
            call, over = self._chores.get()
            error: KVConnectError | None = None
            try:
                with driver.errors("prepare a copy"), driver.use(self.device):
                    stream = stream or driver.cupy().cuda.Stream(non_blocking=True)
                    call(stream)
            except Exception as failed:  # noqa: BLE001 - whatever it raises, its waiters must hear of it
                error = as_ours(failed)
            _tell(over, error)


class _Lane:
    """One stream and the thread that waits for it."""

    def __init__(self, device: int, name: str) -> None:
        self._device = device
        #: Works that are not over; read without a lock, as a hint.
        self.started = 0
        self._lock = threading.Lock()
        self._stream: Any = None
        self._works: queue.SimpleQueue[_Started] = queue.SimpleQueue()
        threading.Thread(target=self._wait, name=name, daemon=True).start()

    def start(self, enqueue: Call, over: Over, expected_s: float) -> None:
        kept: object = None
        error: KVConnectError | None = None
        event: Any = None
        # In one order on the stream and in the queue.
        with self._lock:
            try:
                with driver.errors("start a copy"), driver.use(self._device):
                    cuda = driver.cupy().cuda
                    if self._stream is None:
                        # Above vLLM's own priority: a few multiprocessors shortly, rather than soon.
                        self._stream = cuda.Stream(non_blocking=True, priority=-1)
                    try:
                        kept = enqueue(self._stream)
                    finally:
                        # Also after an error: what was enqueued before it still uses its memory.
                        event = cuda.Event(block=True, disable_timing=True)
                        event.record(self._stream)
            except Exception as failed:  # noqa: BLE001 - whatever it raises, its waiters must hear of it
                error = as_ours(failed)
            self._works.put(_Started(event, kept, error, over, time.monotonic(), expected_s))

    def _wait(self) -> None:
        timers.keep_time()
        while True:
            work = self._works.get()
            error = work.error
            try:
                if work.event is not None:
                    with driver.errors("copy"), driver.use(self._device):
                        await_event(work.event, work.began, work.expected_s)
            except KVConnectError as failed:
                error = error or failed
            self.started -= 1
            _tell(work.over, error)
            del work  # and with it what was kept


def await_event(event: Any, began: float, expected_s: float) -> None:
    """Return once ``event`` is over. It has nothing to wait on but its interrupt: see the module."""
    due, early = began + expected_s, began + _SURE * expected_s - time.monotonic()
    if early > _SHORT_S:
        time.sleep(early)
    while not event.done and (now := time.monotonic()) < due + _PATIENCE_S:
        time.sleep(0 if abs(now - due) < _SHORT_S else _LOOK_S)
    event.synchronize()  # also raises what the work failed with


@driver.per_process
def lanes(device: int) -> Lanes:
    """Return this process's lanes of ``device``."""
    return Lanes(device)


def _tell(over: Over, error: KVConnectError | None) -> None:
    try:
        over(error)
    except Exception:  # the thread serves others, too
        logger.exception("a callback of a copy failed")
