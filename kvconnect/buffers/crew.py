"""A fixed few daemon threads for what may block: opening pipes, above all."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Crew:
    """Runs calls in order of arrival. Threads start with the first call."""

    def __init__(self, name: str, threads: int) -> None:
        """Have up to ``threads`` threads called ``name-0``, ``name-1``, …."""
        self._name, self._size = name, threads
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, call: Callable[[], None]) -> bool:
        """Have ``call`` made; ``False`` if the crew was closed (it will not be made)."""
        with self._lock:
            if self._closed:
                return False
            self._calls.put(call)
            if len(self._threads) < self._size:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Make what was submitted and end the threads; a call that hangs is left behind."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
            for _ in threads:
                self._calls.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:  # one bad call must not end a thread that others count on
                logger.exception("a call on %s failed", self._name)
