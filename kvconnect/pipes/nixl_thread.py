"""The thread that NIXL is polled on, and copies within a device beside it.

NIXL tells of a completion or a notification to whoever asks and in no other way:
there is no callback, file descriptor or event to sleep on. So somebody has to
poll. Its own progress thread does so without a pause and keeps a core busy in
every process that has an agent, idle or not. Here one thread of ours does it: it
sleeps on a condition while nothing is under way, looks at once again for a while
after something happened, and then takes short timed waits, up to `_PAUSE_S`.

Whatever belongs to a transfer happens on this thread, one step after the other:
steps need no locks, and what one of them learns the next one uses without a change
of threads, which takes as long as a GPU's link takes for 15 MB.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, NamedTuple, TypeVar

from kvconnect import timers
from kvconnect.errors import DeadlineError, KVConnectError, as_ours

log = logging.getLogger(__name__)

T = TypeVar("T")

#: For so long after the last news an eager thread looks again without a pause.
_SPIN_S: Final = 150e-6
#: The first pause while something is under way, for an eager thread and for others, and what it grows to.
_EAGER_PAUSE_S, _FIRST_PAUSE_S, _PAUSE_S = 20e-6, 75e-6, 150e-6
#: What takes longer is waited for more patiently: its peer hangs.
_HOT_S: Final = 10.0
#: For those, and while peers may read but are not known to.
_COOL_PAUSE_S: Final = 5e-3
#: How long making an agent, or a call on its thread, may take.
_CALL_S: Final = 60.0

Then = Callable[[KVConnectError | None], None]


class _Followed(NamedTuple):
    """What is under way: how to see whether it is over, whom to tell, and when it began."""

    is_over: Callable[[], bool]
    then: Then
    begun: float


class PollingThread(ABC):
    """A thread that runs jobs and looks after what is under way; asleep while there is neither."""

    def __init__(self, name: str) -> None:
        """Start it as ``name``; everything that it uses must be there already."""
        self._wake = threading.Condition(threading.Lock())
        self._jobs: deque[Callable[[], None]] = deque()
        self._long_jobs: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._watches: dict[object, float] = {}
        self._followed: list[_Followed] = []
        #: Whether to be quick is worth a core for a moment: where GPUs' links wait, not where
        #: processors themselves copy.
        self.eager = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def progress(self) -> bool:
        """Do what peers wait for; return whether there was news. On the thread, while `watch` lasts."""

    # -- from any thread ----------------------------------------------------------------

    def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the agent's thread and return its result; raise what it raised as ours."""
        if threading.current_thread() is self._thread:
            return work()
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except Exception as error:  # noqa: BLE001 - NIXL raises its own; handed to whoever waits
                outcome.set_exception(ours(error))

        self.soon(run)
        try:
            return outcome.result(_CALL_S)
        except TimeoutError:
            raise DeadlineError(f"NIXL did not answer within {_CALL_S} s") from None

    def soon(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the agent's thread, behind what waits there."""
        with self._wake:
            self._jobs.append(work)
            self._wake.notify()

    def soon_long(self, work: Callable[[], None]) -> None:
        """Run ``work``, which may copy as much as a portion, once nothing else waits but such work."""
        with self._wake:
            self._long_jobs.append(work)
            self._wake.notify()

    def after(self, delay_s: float, work: Callable[[], None]) -> None:
        """Run ``work`` on the agent's thread in ``delay_s``."""
        with self._wake:
            heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._numbers), work))
            self._wake.notify()

    def watch(self, who: object, hot_s: float) -> None:
        """Progress the agent until `unwatch`: often for ``hot_s``, now and then afterwards."""
        with self._wake:
            self._watches[who] = time.monotonic() + hot_s
            self._wake.notify()

    def unwatch(self, who: object) -> None:
        """Take `watch` back; unknown ones are ignored."""
        with self._wake:
            self._watches.pop(who, None)

    # -- the thread -------------------------------------------------------------------------

    def follow(self, is_over: Callable[[], bool], then: Then) -> None:
        """Call ``is_over`` until it returns true or raises, then ``then``, with the error. On the thread."""
        self._followed.append(_Followed(is_over, then, time.monotonic()))

    def _run(self) -> None:
        timers.keep_time()
        stirred, pause = 0.0, 0.0
        while not self._stopped:
            news = self._work()
            news |= self._look()
            if self._watches:
                news |= self.progress()
            if news:
                stirred, pause = time.monotonic(), _EAGER_PAUSE_S if self.eager else _FIRST_PAUSE_S
            elif not self.eager or time.monotonic() - stirred > _SPIN_S or not (self._followed or self._watches):
                self._rest(pause)
                pause = min(pause * 1.1, _PAUSE_S)

    def _work(self) -> bool:
        """Do what waits: every step, then one that may be long; return whether there was any."""
        news = False
        while (step := self._next()) is not None:
            news = True
            self._do(step)
        if self._long_jobs:
            news = True
            self._do(self._long_jobs.popleft())
        return news

    def _next(self) -> Callable[[], None] | None:
        if not (self._jobs or self._later):
            return None
        with self._wake:
            if self._later and self._later[0][0] <= time.monotonic():
                return heapq.heappop(self._later)[2]
            return self._jobs.popleft() if self._jobs else None

    @staticmethod
    def _do(step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # a bug in one pipe must not end the thread of all
            log.exception("a step failed and was dropped")

    def _look(self) -> bool:
        news = False
        for one in list(self._followed):
            error: KVConnectError | None = None
            try:
                if not one.is_over():
                    continue
            except Exception as failed:  # noqa: BLE001 - NIXL's own and CUDA's; handed to whoever follows
                error = ours(failed)
            news = True
            self._followed.remove(one)
            try:
                one.then(error)
            except Exception:  # one pipe's mistake must not end the thread of all
                log.exception("what follows a transfer failed")
        return news

    def _rest(self, pause_s: float) -> None:
        with self._wake:
            if not (self._jobs or self._long_jobs or self._stopped):
                self._wake.wait(self._until(pause_s))

    def _until(self, pause_s: float) -> float | None:
        """Return how long to sleep; ``None`` until somebody wants something."""
        now = time.monotonic()
        pauses = [due - now for due, _, _ in self._later[:1]]
        youngest = max((one.begun for one in self._followed), default=0.0)
        if youngest + _HOT_S > now or any(hot > now for hot in self._watches.values()):
            pauses.append(pause_s)
        elif self._watches or youngest:
            pauses.append(_COOL_PAUSE_S)
        return max(0.0, min(pauses)) if pauses else None

    def stop(self) -> None:
        """End the thread (the process is about to end)."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(1.0)


def ours(error: BaseException) -> KVConnectError:
    """Return what NIXL raised as one of ours."""
    gone = type(error).__name__ == "nixlRemoteDisconnectError"
    return as_ours(error, "the peer has disconnected: " if gone else "NIXL failed: ")
