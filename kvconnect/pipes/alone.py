"""One sender and one receiver at a time, as clause 4 of the pipe contract wants it."""

from __future__ import annotations

import threading

from kvconnect.errors import BusyError


class Alone:
    """``with alone:`` for one thread at a time; a second gets `BusyError` at once. Reused, so that a message is cheap.

    Args:
        what: what the thread does meanwhile, for the error.

    """

    def __init__(self, what: str) -> None:
        self._what = what
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise BusyError(f"another thread is in the middle of a {self._what} on this end")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.lock.release()
