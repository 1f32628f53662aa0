"""A fixed few daemon threads for what may block: opening pipes, above all."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import TypeVar

from kvconnect.errors import ClosedError

T = TypeVar("T")

logger = logging.getLogger(__name__)

Call = Callable[[], None]


class Crew:
    """Runs calls in order of arrival, those of one lane one after another.

    A lane is whatever a call may have to wait for, a peer or its pipe: it holds one
    thread at most, however many of its calls hang, and the others serve the rest.
    """

    def __init__(self, name: str, threads: int) -> None:
        """Have up to ``threads`` threads called ``name-0``, ``name-1``, …; they start as they are needed."""
        self._name, self._size = name, threads
        self._changed = threading.Condition()
        self._due: deque[tuple[Hashable, Call]] = deque()
        #: Calls that wait for another one of their lane, by lane.
        self._behind: dict[Hashable, deque[Call]] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, call: Call, lane: Hashable = None) -> bool:
        """Have ``call`` made; ``False`` if the crew was closed (it will not be made).

        Calls without a lane wait for no other.
        """
        with self._changed:
            if self._closed:
                return False
            if lane is not None and lane in self._behind:
                self._behind[lane].append(call)
                return True
            if lane is not None:
                self._behind[lane] = deque()
            self._due.append((lane, call))
            if len(self._due) > self._idle and len(self._threads) < self._size:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._changed.notify()
            return True

    def call(self, call: Callable[[], T], lane: Hashable = None) -> Future[T]:
        """Have ``call`` made; the future has its outcome, or `ClosedError` if the crew was closed."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001 - it is whoever waits for the outcome that must hear of it
                future.set_exception(error)
            else:
                future.set_result(result)

        if not self.submit(run, lane):
            future.set_exception(ClosedError("the buffer was closed"))
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Make what was submitted and end the threads, within ``timeout_s``.

        Calls that hang, and those that wait for them, are left behind.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            threads, self._threads = self._threads, []
            self._changed.notify_all()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (due := self._next()) is not None:
            lane, call = due
            try:
                call()
            except Exception:  # one bad call must not end a thread that others count on
                logger.exception("a call on %s failed", self._name)
            self._leave(lane)
            del due, call  # an idle thread must not keep a pipe or its memory alive

    def _next(self) -> tuple[Hashable, Call] | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._due or self._closed)
            self._idle -= 1
            return self._due.popleft() if self._due else None

    def _leave(self, lane: Hashable) -> None:
        """Let the next call of ``lane`` have its turn, behind those that are due already."""
        if lane is None:
            return
        with self._changed:
            behind = self._behind[lane]
            if behind:
                self._due.append((lane, behind.popleft()))
                # No notify: this thread itself comes back for it.
            else:
                del self._behind[lane]
