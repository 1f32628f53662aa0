"""Keeping claims alive: one message per owner every third of a lease, whatever the number of grants.

Runs on the control client's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvconnect.buffers import fields
from kvconnect.buffers.peers import Peers
from kvconnect.buffers.promise import Promise
from kvconnect.control import ControlClient
from kvconnect.errors import BrokenError, KVConnectError

#: However short a lease a peer claims to give, it is not renewed more often than this.
_LEAST_S = 0.25


@dataclass
class _Round:
    """What the next message to one owner will say."""

    grants: dict[str, Promise] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    scheduled: bool = False


class Renewal:
    """Grants held, by the owner's endpoint."""

    def __init__(
        self, client: ControlClient, peers: Peers, lease_s: float, on_gone: Callable[[Sequence[str]], None]
    ) -> None:
        """Renew leases of the owner's length, or ``lease_s`` where that is unknown or longer."""
        self._client, self._peers, self._lease_s, self._on_gone = client, peers, lease_s, on_gone
        self._rounds: dict[str, _Round] = {}

    def add(self, endpoint: str, grant: str, promise: Promise) -> None:
        """Renew ``grant`` from now on, and with it ``promise``."""
        self._rounds.setdefault(endpoint, _Round()).grants[grant] = promise
        self._schedule(endpoint)

    def end(self, endpoint: str | None, grant: str) -> None:
        """Stop renewing, and tell the owner with the next message that nothing is read any more."""
        if endpoint is None:
            return
        round_ = self._rounds.setdefault(endpoint, _Round())
        round_.grants.pop(grant, None)
        round_.done.append(grant)
        self._schedule(endpoint)

    def drop(self, endpoint: str, grant: str) -> None:
        """Stop renewing; the owner is told otherwise."""
        if endpoint in self._rounds:
            self._rounds[endpoint].grants.pop(grant, None)

    def _schedule(self, endpoint: str) -> None:
        round_ = self._rounds[endpoint]
        if not round_.scheduled:
            round_.scheduled = True
            self._client.later(self._interval(endpoint), lambda: self._send(endpoint))

    def _interval(self, endpoint: str) -> float:
        hello = self._peers.met(endpoint)
        return max(_LEAST_S, min(self._lease_s, hello.lease_s if hello else self._lease_s) / 3)

    def _send(self, endpoint: str) -> None:
        round_ = self._rounds[endpoint]
        round_.scheduled = False
        if not round_.grants and not round_.done:
            del self._rounds[endpoint]
            return
        done, round_.done = round_.done, []
        asked, promises = self._client.clock.now(), dict(round_.grants)
        body = {"grants": sorted(promises), "done": done}
        # An answer that takes longer than until the next round is of no use.
        call = self._client.call(endpoint, "renew", body, self._interval(endpoint))
        call.add_done_callback(lambda answer: self._answered(endpoint, answer, promises, asked))
        if round_.grants:
            self._schedule(endpoint)
        else:
            del self._rounds[endpoint]

    def _answered(
        self, endpoint: str, answer: Future[dict[str, Any]], promises: Mapping[str, Promise], asked: float
    ) -> None:
        try:
            gone = fields.texts(answer.result(), "gone")
        except BrokenError as error:
            self._peers.lost(endpoint, error)
            return
        except KVConnectError:
            return  # the next round tries again; at worst the owner's lease ends
        for grant in promises.keys() - gone:
            promises[grant].prolong(answer.result(), asked)
        if gone:
            for grant in gone:
                self.drop(endpoint, grant)
            self._on_gone(gone)
