"""The remote agents that this process's NIXL agent knows, and what of their memory. For the agent's thread only."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvconnect.errors import BrokenError
from kvconnect.pipes.nixl_place import Card


@dataclass
class _Known:
    """What NIXL knows of one peer."""

    #: Its registrations, by number.
    metadata: dict[int, bytes] = field(default_factory=dict)
    #: How many pipes use each.
    users: Counter[int] = field(default_factory=Counter)


class Peers:
    """Which peers are known, by which pipes, and who is being read from: until both end, NIXL must not forget a peer.

    An allocator gives an address out again, and NIXL takes no second registration of an
    address, and is of no use for that peer any more once it was asked to. So a peer of which some
    registration that is known here is not valid any more is forgotten as a whole before
    more of it is learned.

    Args:
        own: name of this process's agent, which is its own peer where both ends are in one process.
        nixl: that agent.
        forget: called with a peer's name before NIXL forgets it.

    """

    def __init__(self, own: str, nixl: Any, forget: Callable[[str], None]) -> None:
        self._own, self._nixl, self._forget = own, nixl, forget
        self._peers: defaultdict[str, _Known] = defaultdict(_Known)
        self._flying: Counter[str] = Counter()

    def meet(self, card: Card) -> None:
        """Learn how to reach (more of) a peer's memory; pair it with `leave`.

        Raises:
            BrokenError: the metadata is not that of an agent of this name, or what it replaces is being read.
            Exception: NIXL refuses it.

        """
        known = self._peers[card.agent]
        try:
            if any(map(card.denies, known.metadata)):
                self._forget_denied(card, known)
            if card.number not in known.metadata:
                self._learn(card.agent, card.metadata)
                known.metadata[card.number] = card.metadata
            known.users[card.number] += 1
        finally:
            self._forget_if_unused(card.agent)

    def _forget_denied(self, card: Card, known: _Known) -> None:
        if self._flying[card.agent]:
            raise BrokenError("the peer has other memory by now, and its old one is still being read")
        self._remove(card.agent)
        known.metadata = {number: data for number, data in known.metadata.items() if not card.denies(number)}
        for data in known.metadata.values():
            self._learn(card.agent, data)

    def _learn(self, name: str, metadata: bytes) -> None:
        # Both ends in one process share this agent, and reach its memory without introduction.
        if name == self._own:
            return
        found = self._nixl.add_remote_agent(metadata)
        if isinstance(found, bytes):
            found = found.decode()
        if found != name:
            self._nixl.remove_remote_agent(found)
            raise BrokenError(f"the peer said that its agent is {name!r}, its metadata say {found!r}")

    def leave(self, name: str, number: int) -> None:
        """One pipe less uses that registration of the peer."""
        self._peers[name].users[number] -= 1
        self._forget_if_unused(name)

    def is_met(self, name: str) -> bool:
        """Return whether any pipe knows the peer."""
        return name in self._peers and self._peers[name].users.total() > 0

    def reading(self, name: str) -> None:
        """A read begins."""
        self._flying[name] += 1

    def read(self, name: str) -> None:
        """A read is over."""
        self._flying[name] -= 1
        self._forget_if_unused(name)

    def _forget_if_unused(self, name: str) -> None:
        if self.is_met(name) or self._flying[name] > 0:
            return
        known = self._peers.pop(name, None)
        del self._flying[name]
        if known is not None and known.metadata:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._forget(name)
        if name != self._own:
            with contextlib.suppress(Exception):  # NIXL itself may have forgotten it
                self._nixl.remove_remote_agent(name)
