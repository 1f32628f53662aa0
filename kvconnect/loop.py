"""One thread that waits for sockets, timers and posted calls, all at once.

The control channel's server and client each run on one. What arrives belongs to the
thread; everything else reaches it through `Loop.soon` and `Loop.later`.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_JOIN_S = 5.0

Handler = Callable[[int], None]


class Timer:
    """A call that will be made later unless cancelled."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Forget the call; harmless if it was made already."""
        self.call = None


class Loop:
    """A named daemon thread around epoll. Thread-safe, except where noted."""

    def __init__(self, name: str) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[socket.socket, Handler]] = {}
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._gate = threading.Lock()
        self._open = True
        self._pid = os.getpid()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. Before this the creator may `watch` its own sockets."""
        self._thread.start()

    def soon(self, call: Callable[[], None]) -> bool:
        """Make ``call`` on the thread; ``False`` if the loop has ended (it will not be made)."""
        with self._gate:
            if not self._open:
                return False
            self._posted.append(call)
            # Waking costs a system call; one pending wake-up serves all that is posted, and the
            # thread itself looks before it waits.
            if len(self._posted) == 1 and not self.on_thread:
                os.eventfd_write(self._wake, 1)
            return True

    def later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Make ``call`` on the thread in ``delay_s`` seconds, unless the loop ends before."""
        timer = Timer(time.monotonic() + delay_s, call)
        with self._gate:
            if self._open:
                heapq.heappush(self._timers, (timer.when, next(self._order), timer))
                # Whoever waits for an earlier one will look again in time.
                if self._timers[0][2] is timer and not self.on_thread:
                    os.eventfd_write(self._wake, 1)
        return timer

    def watch(self, sock: socket.socket, handler: Handler, events: int = select.EPOLLIN) -> None:
        """Call ``handler(events)`` while ``sock`` is ready for any. Only on the thread (or before `start`)."""
        self._handlers[sock.fileno()] = sock, handler
        self._epoll.register(sock, events)

    def await_events(self, sock: socket.socket, events: int) -> None:
        """Wait for other events of a socket that is watched (and stays so meanwhile)."""
        self._epoll.modify(sock, events)

    def unwatch(self, sock: socket.socket) -> None:
        """Stop watching and close ``sock``. Only on the thread."""
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)
        sock.close()

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.get_ident() == self._thread.ident

    def close(self) -> None:
        """End the thread and close its sockets."""
        if os.getpid() != self._pid:
            self._open = False  # a forked child has no such thread, and the eventfd is its parent's
            return
        with self._gate:
            was_open, self._open = self._open, False
            if was_open:
                os.eventfd_write(self._wake, 1)
        if self._thread.ident is None:
            if was_open:
                self._finish()
        elif not self.on_thread:
            self._thread.join(_JOIN_S)

    # -- on the thread ----------------------------------------------------------

    def _run(self) -> None:
        while self._open:
            for fd, events in self._epoll.poll(self._wait_s()):
                if fd == self._wake:
                    self._clear_wake()
                elif fd in self._handlers:
                    handler = self._handlers[fd][1]
                    self._guarded(lambda handler=handler, events=events: handler(events))  # type: ignore[misc]
            self._run_posted()
            self._run_timers()
        self._run_posted()  # what was posted before the end may still send
        self._finish()

    def _wait_s(self) -> float | None:
        with self._gate:
            if self._posted:
                return 0
            return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # several wake-ups may have been merged into one
            os.eventfd_read(self._wake)

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            self._guarded(self._posted.popleft())

    def _run_timers(self) -> None:
        while (timer := self._due()) is not None:
            if timer.call is not None:
                self._guarded(timer.call)

    def _due(self) -> Timer | None:
        with self._gate:
            if self._timers and self._timers[0][0] <= time.monotonic():
                return heapq.heappop(self._timers)[2]
        return None

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # one bad callback must not end the thread that serves every peer
            logger.exception("a callback on %s failed", self._thread.name)

    def _finish(self) -> None:
        for sock, _ in self._handlers.values():
            sock.close()
        self._handlers.clear()
        self._epoll.close()
        with self._gate:
            os.close(self._wake)
