"""When a store hangs: the first requests wait for it in vain, those after them do not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from kvconnect.buffers.crew import Crew
from kvconnect.control import ControlClient
from kvconnect.errors import named

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 8.0


class Silence:
    """Lasts from when a question to the store ran out of time until any question is answered.

    While it lasts nobody else needs to wait: the store is asked of its own accord, after
    pauses that grow, on a thread that may hang with it.
    """

    def __init__(self, ask: Callable[[], object], crew: Crew, client: ControlClient) -> None:
        """Have ``ask`` put a question without consequences to the store, on ``crew``; ``client`` has the timers."""
        self._ask_store, self._crew, self._client = ask, crew, client
        self._lock = threading.Lock()
        self._lasts = False
        #: Whether a question of our own is due or at the store.
        self._asks = False
        self._pause_s = _FIRST_PAUSE_S

    @property
    def lasts(self) -> bool:
        """Whether the store is known to hang."""
        return self._lasts

    def begin(self) -> None:
        """Note that a question at the store ran out of time."""
        with self._lock:
            if self._lasts:
                return
            self._lasts, self._pause_s = True, _FIRST_PAUSE_S
            asks, self._asks = self._asks, True
        logger.warning("the store does not answer: prompts are computed until it does")
        if not asks:
            self._ask_later()

    def end(self) -> None:
        """Note that the store has answered."""
        with self._lock:
            ended, self._lasts = self._lasts, False
        if ended:
            logger.warning("the store answers again")

    def _ask_later(self) -> None:
        self._client.later(self._pause_s, self._queue)

    def _queue(self) -> None:
        self._crew.submit(self._ask)

    def _ask(self) -> None:
        try:
            if self._lasts:
                self._ask_store()
                self.end()
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything: it is not well yet
            logger.debug("the store still does not answer: %s", named(error))
        with self._lock:
            self._asks = again = self._lasts
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if again:
            self._ask_later()
