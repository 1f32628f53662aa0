"""The remote agents that this process's NIXL agent knows, and what of their memory. For the agent's thread only."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from kvconnect.errors import BrokenError


class Peers:
    """Who was met by how many pipes, and who is being read from: until both end, NIXL must not forget a peer.

    Args:
        own: name of this process's agent, which is its own peer where both ends are in one process.
        nixl: that agent.
        forget: called with a peer's name before NIXL forgets it.

    """

    def __init__(self, own: str, nixl: Any, forget: Callable[[str], None]) -> None:
        self._own, self._nixl, self._forget = own, nixl, forget
        #: How many pipes know a peer by which metadata.
        self._met: defaultdict[str, Counter[bytes]] = defaultdict(Counter)
        self._flying: Counter[str] = Counter()

    def meet(self, name: str, metadata: bytes) -> None:
        """Learn how to reach (more of) a peer's memory; pair it with `leave`.

        Raises:
            BrokenError: the metadata is not that of an agent of this name.
            Exception: NIXL refuses it. So it does if it knows other memory at the same address, of a
                pipe that has not closed here yet; what it knows of the peer cannot be mended then,
                only forgotten with the last pipe.

        """
        # Both ends in one process share this agent, and reach its memory without introduction.
        if name != self._own:
            self._learn(name, metadata)
        self._met[name][metadata] += 1

    def _learn(self, name: str, metadata: bytes) -> None:
        found = self._nixl.add_remote_agent(metadata)
        if isinstance(found, bytes):
            found = found.decode()
        if found != name:
            self._nixl.remove_remote_agent(found)
            raise BrokenError(f"the peer said that its agent is {name!r}, its metadata say {found!r}")

    def leave(self, name: str, metadata: bytes) -> None:
        """One pipe less knows the peer by ``metadata``."""
        known = self._met[name]
        known[metadata] -= 1
        if known[metadata] <= 0:
            del known[metadata]
        self._forget_if_unused(name)

    def is_met(self, name: str) -> bool:
        """Return whether any pipe knows the peer."""
        return bool(self._met.get(name))

    def reading(self, name: str) -> None:
        """A read begins."""
        self._flying[name] += 1

    def read(self, name: str) -> None:
        """A read is over."""
        self._flying[name] -= 1
        self._forget_if_unused(name)

    def _forget_if_unused(self, name: str) -> None:
        if self._met[name] or self._flying[name] > 0:
            return
        del self._met[name], self._flying[name]
        if name != self._own:
            self._forget(name)
            with contextlib.suppress(Exception):  # NIXL itself may have forgotten it
                self._nixl.remove_remote_agent(name)
