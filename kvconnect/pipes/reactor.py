"""One thread that serves any number of file descriptors of this process.

Callbacks run on the reactor's thread, must not block, and do one bounded piece
of work each, so that every descriptor gets its turn. Other threads reach the
reactor through `Reactor.call_soon`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

logger = logging.getLogger("kvconnect.pipes.reactor")

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
#: With the others: only when something happens, not as long as it lasts.
EDGE: Final = select.EPOLLET

#: Called with the epoll events that are ready.
Ready = Callable[[int], None]
Job = Callable[[], None]


@dataclass(order=True)
class Timer:
    """A job due at a time of `time.monotonic`; `cancel` takes it back."""

    when: float
    order: int
    job: Job | None = field(compare=False)

    def cancel(self) -> None:
        """Forget the job."""
        self.job = None


class Reactor:
    """An epoll loop on one daemon thread. All methods are thread-safe."""

    def __init__(self, name: str) -> None:
        """Start the thread, called ``name``."""
        #: The process in which the thread runs.
        self.pid = os.getpid()
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, READ)
        self._ready: dict[int, Ready] = {}
        self._lock = threading.Lock()
        self._soon: deque[Job] = deque()
        self._notes: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._timers: list[Timer] = []
        self._orders = itertools.count()
        self._rung = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        """Call ``ready(events)`` whenever ``fd`` is readable or writable (`READ`, `WRITE`)."""
        self._ready[fd] = ready
        try:
            self._epoll.register(fd, events)
        except BaseException:
            del self._ready[fd]
            raise

    def change(self, fd: int, events: int) -> None:
        """Watch for other events."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching; must come before ``fd`` is closed. Unknown descriptors are ignored."""
        if self._ready.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # an owner that failed may have closed it, which ends the watch, too
                self._epoll.unregister(fd)

    def call_soon(self, job: Job) -> None:
        """Run ``job`` on the reactor's thread; jobs keep their order."""
        with self._lock:
            self._soon.append(job)
            ring, self._rung = not self._rung, True
        if ring:
            self._ring()

    def note(self, job: Job) -> None:
        """Run ``job`` on the reactor's thread; for finalizers, since it takes no lock.

        The collector runs them in the middle of anything, also while this very
        thread holds the reactor's lock.
        """
        self._notes.put(job)
        if not self._stopped:
            self._ring()

    def call_later(self, delay_s: float, job: Job) -> Timer:
        """Run ``job`` on the reactor's thread in ``delay_s`` seconds."""
        timer = Timer(time.monotonic() + delay_s, next(self._orders), job)
        with self._lock:
            heapq.heappush(self._timers, timer)
            ring = self._timers[0] is timer and not self._rung and not self.here()
            self._rung = self._rung or ring
        if ring:
            self._ring()
        return timer

    def here(self) -> bool:
        """Whether the caller is the reactor's thread."""
        return threading.current_thread() is self._thread

    def run(self, job: Job, timeout_s: float) -> bool:
        """Run ``job`` on the reactor's thread and wait for it; return whether it ran in time."""
        if self.here():
            job()
            return True
        done = threading.Event()

        def then() -> None:
            try:
                job()
            finally:
                done.set()

        self.call_soon(then)
        return done.wait(timeout_s)

    def close(self) -> None:
        """End the thread. Descriptors that are still watched stay open: they are their owners'."""
        self._stopped = True
        self._ring()
        if not self.here():
            self._thread.join()
        os.close(self._bell)
        self._epoll.close()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        while not self._stopped:
            for fd, events in self._epoll.poll(self._pause_s()):
                if fd == self._bell:
                    self._answer_bell()
                elif (ready := self._ready.get(fd)) is not None:
                    self._call(fd, ready, events)
            self._run_jobs()

    def _pause_s(self) -> float | None:
        with self._lock:
            if self._soon:
                return 0
            if not self._timers:
                return None
            return max(0.0, self._timers[0].when - time.monotonic())

    def _answer_bell(self) -> None:
        os.eventfd_read(self._bell)
        with self._lock:
            self._rung = False

    def _run_jobs(self) -> None:
        # Only what is due now: jobs that add jobs must not keep descriptors from their turn.
        with self._lock:
            jobs, self._soon = self._soon, deque()
            now = time.monotonic()
            while self._timers and self._timers[0].when <= now:
                job = heapq.heappop(self._timers).job
                if job is not None:
                    jobs.append(job)
        with contextlib.suppress(queue.Empty):
            for _ in range(self._notes.qsize()):
                jobs.append(self._notes.get_nowait())
        for job in jobs:
            try:
                job()
            except Exception:  # one owner's mistake must not end everybody's thread
                logger.exception("a job on the reactor failed")

    def _call(self, fd: int, ready: Ready, events: int) -> None:
        try:
            ready(events)
        except Exception:  # one owner's mistake must not end everybody's thread
            logger.exception("the owner of descriptor %d failed; it is no longer watched", fd)
            self.unwatch(fd)


_shared: dict[int, Reactor] = {}
_shared_lock = threading.Lock()


def shared() -> Reactor:
    """Return this process's reactor (a forked child gets its own)."""
    reactor = _shared.get(os.getpid())
    if reactor is not None:
        return reactor
    with _shared_lock:
        if os.getpid() not in _shared:
            _shared.clear()
            _shared[os.getpid()] = Reactor("kvconnect-reactor")
        return _shared[os.getpid()]


def _after_fork() -> None:
    global _shared_lock  # noqa: PLW0603 - a thread that does not exist in the child may hold it
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
