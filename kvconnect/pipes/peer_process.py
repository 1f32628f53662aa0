"""Whether the process at a pipe's other end is still there, for pipes that move bytes without its help."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Mapping
from typing import Any

from kvconnect.errors import BrokenError
from kvconnect.pipes import host


class PeerProcess:
    """The peer's process, watched by a pidfd where it can be seen from here; else taken to be alive."""

    def __init__(self, card: Mapping[str, Any]) -> None:
        """Find the process that ``card`` describes."""
        self._lock = threading.Lock()
        self._watched: int | None = None
        pid = card.get("pid")
        if isinstance(pid, int) and card.get("pidns") == host.identity()["pidns"]:
            try:
                self._watched = os.pidfd_open(pid)
            except (OSError, OverflowError) as error:
                raise BrokenError(f"the peer's process {pid} is gone") from error

    @staticmethod
    def card() -> dict[str, Any]:
        """Describe this process to a peer."""
        identity = host.identity()
        return {"pid": identity["pid"], "pidns": identity["pidns"]}

    def check(self) -> None:
        """Raise `BrokenError` if the process has ended."""
        with self._lock:
            if self._watched is None:
                return
            poll = select.poll()
            poll.register(self._watched, select.POLLIN)
            if poll.poll(0):
                raise BrokenError("the peer's process has ended")

    def close(self) -> None:
        """Watch no longer."""
        with self._lock:
            watched, self._watched = self._watched, None
        if watched is not None:
            os.close(watched)
