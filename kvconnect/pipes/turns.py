"""Work on many transfers by turns: one bounded chunk each, over a fixed number of threads.

A transfer's work is cut into *steps* of about 1 MiB. Steps wait in one queue,
first in, first out, and go to its end after each turn. So a small transfer
waits for at most one chunk of each thread, however large the others are, and
the number of threads does not depend on the number of pipes or peers.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from kvconnect.errors import ClosedError

log = logging.getLogger(__name__)

#: Bytes that one step should move.
CHUNK_BYTES = 1 << 20

#: Threads of the process-wide instance.
SHARED_THREADS = 2

#: One bounded chunk of work; returns whether more remains.
Step = Callable[[], bool]


class Turns:
    """Steps that take turns over a fixed set of daemon threads."""

    def __init__(self, name: str, threads: int) -> None:
        """Prepare ``threads`` threads called ``name-0``, ``name-1``, …; they start with the first step."""
        self._names = [f"{name}-{i}" for i in range(threads)]
        self._threads: list[threading.Thread] = []
        self._queue: deque[Step] = deque()
        self._ready = threading.Condition()
        self._closed = False

    def add(self, step: Step) -> None:
        """Queue ``step``: called until it returns ``False``, by one thread at a time.

        A step moves about `CHUNK_BYTES` and does not wait for a peer. It reports
        its own failures (to its transfer, say): one that raises is logged and dropped.

        Raises:
            ClosedError: after `close`.

        """
        with self._ready:
            if self._closed:
                raise ClosedError("these turns were closed")
            self._queue.append(step)
            self._start()
            self._ready.notify()

    def start(self) -> None:
        """Start the threads now, not with the first step."""
        with self._ready:
            self._start()

    def close(self) -> None:
        """Finish the steps in progress, drop the others, end the threads. Idempotent."""
        with self._ready:
            self._closed = True
            self._queue.clear()
            threads, self._threads = self._threads, []
            self._ready.notify_all()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def _start(self) -> None:
        for name in self._names[len(self._threads) :]:
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while (step := self._next()) is not None:
            if self._take(step):
                with self._ready:
                    if not self._closed:
                        self._queue.append(step)
                        # No notify: this thread itself comes back for what it has queued.
            del step  # an idle thread must not keep the last transfer's memory alive

    def _next(self) -> Step | None:
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._closed)
            return None if self._closed else self._queue.popleft()

    @staticmethod
    def _take(step: Step) -> bool:
        try:
            return step()
        except Exception:
            # A bug in one step must not end the thread that serves everybody else.
            log.exception("a step failed and was dropped")
            return False


class _Shared:
    """The process-wide instance and the process it was made in."""

    lock = threading.Lock()
    turns: Turns | None = None
    pid = 0


def shared() -> Turns:
    """Return the process-wide turns, made anew after a fork (threads do not survive one)."""
    with _Shared.lock:
        if _Shared.turns is None or _Shared.pid != os.getpid():
            _Shared.turns, _Shared.pid = Turns("kvconnect-turns", SHARED_THREADS), os.getpid()
        return _Shared.turns


def _renew_lock() -> None:
    # Another thread of the parent may have held the lock at the moment of the fork.
    _Shared.lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
