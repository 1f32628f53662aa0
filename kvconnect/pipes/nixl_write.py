"""A write of blocks, seen from the end that asked for it: the other end reads them."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any, Protocol

from kvconnect.errors import DeadlineError, KVConnectError, LoadError
from kvconnect.pipes.base import Message, Transfer
from kvconnect.pipes.chunks import LISTEN_S
from kvconnect.pipes.nixl_staging import failed


class Writer(Protocol):
    """What a write needs of its end of the pipe."""

    timeout_s: float

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def forget_write(self, write: Write) -> None:
        """``write`` is over."""


class Write:
    """A write under way at the end that asked for it; the other end reads."""

    def __init__(self, end: Writer, number: int, nbytes: int) -> None:
        self.number = number
        self.transfer = Transfer(nbytes, self.cancel)
        self._end = end
        self._stamp = time.monotonic()
        self._given_up: KVConnectError | None = None
        self._asking = False

    def told(self, answer: Future[dict[str, Any]]) -> None:
        """The other end has answered the request."""
        error = answer.exception()
        if error is not None:
            self.over(failed(error))

    def over(self, error: KVConnectError | None) -> None:
        """The other end reads no more – or, if it fell silent, may do so: only ours could be hurt by a write."""
        self._end.forget_write(self)
        self.transfer.finish(self._given_up if error is not None and self._given_up is not None else error)

    def cancel(self) -> None:
        """Ask the other end to stop; over when it has."""
        self._give_up(LoadError("the transfer was cancelled"))

    def check_time(self, now: float) -> None:
        """Ask whether the other end still reads; give up if it does not say, at once if it is gone."""
        rested_s = now - self._stamp
        if rested_s > self._end.timeout_s:
            if self._given_up is None:
                self._give_up(DeadlineError(f"nothing moved for {self._end.timeout_s} s"))
            else:
                self.over(self._given_up)
        elif rested_s > min(LISTEN_S, self._end.timeout_s / 2) and not self._asking and self._given_up is None:
            self._asking = True
            self._end.tell("nixl.running", {"transfer": self.number}).add_done_callback(self._runs)

    def _runs(self, answer: Future[dict[str, Any]]) -> None:
        self._asking = False
        error = answer.exception()
        if error is not None and self._given_up is None:
            self._give_up(failed(error))
        elif error is None and answer.result().get("running"):
            self._stamp = time.monotonic()

    def _give_up(self, error: KVConnectError) -> None:
        if self._given_up is None:
            self._given_up, self._stamp = error, time.monotonic()
        self._end.tell("nixl.stop", {"transfer": self.number}).add_done_callback(self._stopped)

    def _stopped(self, answer: Future[dict[str, Any]]) -> None:
        if answer.exception() is not None or not answer.result().get("running"):
            self.over(self._given_up)
