"""Whether the process at a pipe's other end is still there, for pipes that move bytes without its help."""

from __future__ import annotations

import io
import os
import select
from collections.abc import Mapping
from typing import Any

from kvconnect.errors import BrokenError
from kvconnect.pipes import host


class PeerProcess:
    """The peer's process, watched by a pidfd where it can be seen from here; else taken to be alive."""

    def __init__(self, card: Mapping[str, Any]) -> None:
        """Find the process that ``card`` describes."""
        self._watched: io.FileIO | None = None
        pid = card.get("pid")
        if isinstance(pid, int) and card.get("pidns") == host.identity()["pidns"]:
            try:
                self._watched = io.FileIO(os.pidfd_open(pid))
            except OSError as error:
                raise BrokenError(f"the peer's process {pid} is gone") from error

    @staticmethod
    def card() -> dict[str, Any]:
        """Describe this process to a peer."""
        identity = host.identity()
        return {"pid": identity["pid"], "pidns": identity["pidns"]}

    def check(self) -> None:
        """Raise `BrokenError` if the process has ended."""
        if self._watched is None:
            return
        poll = select.poll()
        poll.register(self._watched, select.POLLIN)
        if poll.poll(0):
            raise BrokenError("the peer's process has ended")
