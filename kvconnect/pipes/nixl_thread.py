"""The thread that NIXL is polled on.

NIXL tells of a completion to whoever asks (`check_xfer_state`) and in no other way:
there is no callback, file descriptor or event to sleep on. So somebody has to
poll. Its own progress thread does so without a pause and keeps a core busy in
every process that has an agent, idle or not. Here one thread of ours does it: it
sleeps on a condition while nothing is under way, looks a few times at once after
something began, and then takes short timed waits, up to `_PAUSE_S`.
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
from typing import Final, TypeVar

from kvconnect.errors import BrokenError, DeadlineError, KVConnectError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Rounds without news before the thread begins to pause.
_SPIN_ROUNDS: Final = 32
#: The pauses while transfers are under way grow from the first to the second.
_FIRST_PAUSE_S, _PAUSE_S = 20e-6, 100e-6
#: What takes longer is waited for more patiently: its peer hangs.
_HOT_S: Final = 10.0
#: For those, and while peers may read but are not known to.
_COOL_PAUSE_S: Final = 5e-3
#: How long making an agent, or a call on its thread, may take.
_CALL_S: Final = 60.0


class PollingThread(ABC):
    """A thread that runs jobs and looks after what is under way; asleep while there is neither."""

    def __init__(self, name: str) -> None:
        """Start it as ``name``; everything that it uses must be there already."""
        self._wake = threading.Condition(threading.Lock())
        self._jobs: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._watches: dict[object, float] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def under_way(self) -> float:
        """Return when the youngest of what there is to `look` at began; 0 if nothing is. On the thread."""

    @abstractmethod
    def look(self) -> bool:
        """Look at what is under way; return whether there was news. On the thread."""

    @abstractmethod
    def progress(self) -> None:
        """Do what peers wait for. On the thread, while `watch` lasts."""

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

    def _run(self) -> None:
        quiet = 0
        while not self._stopped:
            busy = self._do_next()
            busy |= self.look()
            if self._watches:
                self.progress()
            quiet = 0 if busy else quiet + 1
            self._rest(quiet)

    def _do_next(self) -> bool:
        with self._wake:
            if self._later and self._later[0][0] <= time.monotonic():
                work = heapq.heappop(self._later)[2]
            elif self._jobs:
                work = self._jobs.popleft()
            else:
                return False
        try:
            work()
        except Exception:  # a bug in one pipe must not end the thread of all
            log.exception("a step failed and was dropped")
        return True

    def _rest(self, quiet: int) -> None:
        if 0 < quiet <= _SPIN_ROUNDS and self.under_way():
            return
        with self._wake:
            if not self._jobs and not self._stopped and quiet:
                self._wake.wait(self._pause(quiet))

    def _pause(self, quiet: int) -> float | None:
        """Return how long to sleep; ``None`` until somebody wants something."""
        now = time.monotonic()
        pauses = [due - now for due, _, _ in self._later[:1]]
        youngest = self.under_way()
        if youngest + _HOT_S > now or any(hot > now for hot in self._watches.values()):
            pauses.append(min(_FIRST_PAUSE_S * 1.1 ** min(quiet, 100), _PAUSE_S))
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
    if isinstance(error, KVConnectError):
        return error
    name = type(error).__name__
    what = "the peer has disconnected" if name == "nixlRemoteDisconnectError" else "NIXL failed"
    broken = BrokenError(f"{what}: {name}: {error}")
    broken.__cause__ = error
    return broken
