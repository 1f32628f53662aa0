"""One thread that waits for sockets, timers and posted calls, all at once.

The control channel's server and client each run on one. ZeroMQ sockets belong to
the thread; everything else reaches it through `Loop.soon` and `Loop.later`.

ZeroMQ's own poller looks at every socket whenever one has something, so that a message would cost
the more the more peers are connected. Here the kernel says which descriptors are ready. ZeroMQ's
are no plain ones, though: one that is ready may mean nothing, and what is there to be read may
have been announced while the socket was used otherwise. Hence `Loop.send`, and that every socket
that was touched is asked itself before the next wait.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
from collections.abc import Callable, Sequence

import zmq

from kvconnect.clock import SYSTEM, Clock

logger = logging.getLogger(__name__)

_JOIN_S = 5.0
_POLLIN = int(zmq.POLLIN)  # an enumeration's member takes longer than the question
_MAX_SOCKETS = 1 << 16


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
    """A named daemon thread around an epoll. Thread-safe, except where noted."""

    def __init__(self, name: str, clock: Clock = SYSTEM) -> None:
        self.clock = clock
        self.context = zmq.Context()
        # The default of 1023 is used up by a few hundred peers.
        self.context.set(zmq.MAX_SOCKETS, min(_MAX_SOCKETS, self.context.get(zmq.SOCKET_LIMIT)))
        self._epoll = select.epoll()
        self._handlers: dict[zmq.Socket[bytes], Callable[[], object]] = {}
        self._by_descriptor: dict[int, zmq.Socket[bytes]] = {}
        #: Sockets that were touched since they were last asked; in order, each once.
        self._touched: dict[zmq.Socket[bytes], None] = {}
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
        timer = Timer(self.clock.now() + delay_s, call)
        if self.on_thread:
            self._push(timer)
        else:
            self.soon(lambda: self._push(timer))
        return timer

    def watch(self, sock: zmq.Socket[bytes], handler: Callable[[], object]) -> None:
        """Call ``handler`` while ``sock`` can be read. Only on the thread (or before `start`).

        It returns true if it has read until there was nothing more, which saves asking.
        """
        self._handlers[sock], descriptor = handler, int(sock.getsockopt(zmq.FD))
        self._by_descriptor[descriptor] = sock
        self._epoll.register(descriptor, select.EPOLLIN)
        self._touched[sock] = None

    def unwatch(self, sock: zmq.Socket[bytes]) -> None:
        """Stop watching and close ``sock``. Only on the thread."""
        if self._handlers.pop(sock, None) is not None:
            descriptor = int(sock.getsockopt(zmq.FD))
            del self._by_descriptor[descriptor]
            self._epoll.unregister(descriptor)
            self._touched.pop(sock, None)
        sock.close(linger=0)

    def send(self, sock: zmq.Socket[bytes], frames: Sequence[bytes]) -> None:
        """Send a message over a watched socket, or raise `zmq.ZMQError` at once. Only on the thread.

        The only way to send, but for a socket's own handler: see this module's beginning.
        """
        self._touched[sock] = None
        sock.send_multipart(frames, zmq.NOBLOCK)

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def close(self, linger_ms: int = 0) -> None:
        """End the thread and close its sockets; what was sent has ``linger_ms`` to leave."""
        if os.getpid() != self._pid:
            self._open = False  # a forked child has no such thread, and the eventfd is its parent's
            return
        with self._gate:
            was_open, self._open = self._open, False
            if was_open:
                self._linger_ms = linger_ms
                os.eventfd_write(self._wake, 1)
        if self._thread.ident is None:
            self._finish()
        elif not self.on_thread:
            self._thread.join(_JOIN_S)

    _linger_ms = 0

    # -- on the thread ----------------------------------------------------------

    def _run(self) -> None:
        while self._open:
            for descriptor, _ in self._epoll.poll(self._wait_s()):
                if descriptor == self._wake:
                    self._clear_wake()
                elif descriptor in self._by_descriptor:
                    self._touched[self._by_descriptor[descriptor]] = None
            self._ask_touched()
            self._run_posted()
            self._run_timers()
            self._ask_touched()  # those that something was sent over: sooner than with another look at the kernel
        self._run_posted()  # what was posted before the end may still send
        self._finish()

    def _wait_s(self) -> float | None:
        if self._posted or self._touched:
            return 0.0
        if not self._timers:
            return None
        return self.clock.poll_ms(self._timers[0][0]) / 1000

    def _ask_touched(self) -> None:
        """Call the handlers of those that have something."""
        touched, self._touched = self._touched, {}
        for sock in touched:
            handler = self._handlers.get(sock)  # gone, if a handler before it has closed it
            if handler is None or not int(sock.getsockopt(zmq.EVENTS)) & _POLLIN:
                continue
            if self._guarded(handler):
                self._touched.pop(sock, None)  # whatever it has sent, it has looked after that
            elif sock in self._handlers:
                self._touched[sock] = None

    def _clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # several wake-ups may have been merged into one
            os.eventfd_read(self._wake)

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            self._guarded(self._posted.popleft())

    def _push(self, timer: Timer) -> None:
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))

    def _run_timers(self) -> None:
        now = self.clock.now()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                self._guarded(timer.call)

    def _guarded(self, call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception:  # one bad callback must not end the thread that serves every peer
            logger.exception("a callback on %s failed", self._thread.name)
            return None

    def _finish(self) -> None:
        for sock in self._handlers:
            sock.close(linger=self._linger_ms)
        self._handlers.clear()
        self.context.term()
        self._epoll.close()
        with self._gate:
            os.close(self._wake)
