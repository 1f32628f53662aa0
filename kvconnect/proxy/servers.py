"""The servers of a leg, and what this proxy knows of each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

_log = logging.getLogger("kvconnect.proxy")

#: Before a URL whose name is looked up, and stands for a server at each of its addresses.
LOOKED_UP = "dns+"


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


class Pool:
    """The servers of a leg as of now: those that were named, and those that a name stands for at present."""

    def __init__(self, leg: str, urls: Sequence[str]) -> None:
        self.leg = leg
        self._urls: dict[str, tuple[str, ...]] = {url: () if url.startswith(LOOKED_UP) else (url,) for url in urls}
        self._servers: dict[str, Server] = {}
        self._renew()

    def __iter__(self) -> Iterator[Server]:
        return iter(tuple(self._servers.values()))

    @property
    def names(self) -> list[str]:
        """The URLs whose names are to be looked up."""
        return [url for url in self._urls if url.startswith(LOOKED_UP)]

    def replace(self, name: str, urls: Sequence[str]) -> None:
        """Have ``name`` stand for these from now on; a server that stays keeps what is known of it."""
        if tuple(urls) != self._urls[name]:
            _log.info("%s servers of %s: %s", self.leg, name, ", ".join(urls) or "none")
            self._urls[name] = tuple(urls)
            self._renew()

    def _renew(self) -> None:
        # By URL, so that a server is one however many names it has.
        urls = chain.from_iterable(self._urls.values())
        self._servers = {url: self._servers.get(url) or Server(self.leg, url) for url in urls}
