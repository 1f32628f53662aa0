"""The servers of a leg, and what this proxy knows of each."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_log = logging.getLogger("kvconnect.proxy")


@dataclass(eq=False)
class Server:
    """One server. Of several proxies, each knows only of its own requests."""

    leg: str
    url: str
    #: Requests of this proxy's that it holds.
    in_flight: int = 0
    #: When it was chosen last (``time.monotonic``).
    chosen_s: float = 0.0
    #: Checks in a row that it failed.
    failures: int = 0
    #: Gets requests; one that does not gets some only if no other does.
    in_rotation: bool = True

    def leave_out(self, why: str) -> None:
        """Give it no requests until `take_back`."""
        if self.in_rotation:
            _log.warning("%s server %s is left out until its /health is good: %s", self.leg, self.url, why)
        self.in_rotation = False

    def take_back(self) -> None:
        """Give it requests again."""
        if not self.in_rotation:
            _log.info("%s server %s is back", self.leg, self.url)
        self.in_rotation, self.failures = True, 0
