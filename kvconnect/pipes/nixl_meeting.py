"""How the two ends of a NIXL pipe learn where each other's paged memory is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvconnect.cuda.tiles import Paged
from kvconnect.errors import BrokenError, HandshakeError, KVConnectError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Message
from kvconnect.pipes.flows import count
from kvconnect.pipes.nixl_agent import TOKEN_BYTES, Peer
from kvconnect.pipes.nixl_place import Card, Place, read_card
from kvconnect.pipes.nixl_runs import Runs
from kvconnect.pipes.nixl_staging import StagedMemory, failed


@dataclass(frozen=True)
class Target:
    """The other end: its agent, the kind of its memory, its runs with ours, where its notes go, its slots' size."""

    peer: Peer
    place: Place
    runs: Runs
    token: bytes
    slot_bytes: int


class Attached(Protocol):
    """What a meeting needs of its end of the pipe."""

    shared: StagedMemory

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def check(self) -> None:
        """Raise if this end's block path is over."""

    def fail(self, error: KVConnectError) -> None:
        """The two do not fit."""

    def met(self) -> None:
        """`Meeting.target` is known now. On the agent's thread."""


class Meeting:
    """Each end introduces itself when it is attached, and answers in kind: so either may be the first."""

    def __init__(self, end: Attached, local: PagedMemory, remote: PagedLayout, token: bytes) -> None:
        self._end, self._local, self._remote, self._token = end, local, remote, token
        self._lock = threading.Lock()
        self._ended = False
        self._slots: Peer | None = None
        self.target: Target | None = None

    def _card(self) -> dict[str, Any]:
        shared = self._end.shared
        mine = {"bases": self._local.bases.tolist(), "token": self._token, "slot_bytes": shared.slots.slot_bytes}
        return {**shared.agent.card(shared.place, shared.registration), **mine}

    def introduce(self) -> None:
        """Say where this end's memory is, and ask where the other one's is."""
        answer = self._end.tell("nixl.card", self._card())
        answer.add_done_callback(self._answered)

    def _answered(self, answer: Future[dict[str, Any]]) -> None:
        # An end that is not attached yet introduces itself when it is.
        if answer.exception() is None:
            self._learn(answer.result())

    def on_card(self, body: dict[str, Any]) -> dict[str, Any]:
        """The other end introduces itself; so does this one."""
        self._end.check()
        self._learn(body)
        return self._card()

    def _learn(self, body: dict[str, Any]) -> None:
        try:
            theirs = read_card(body)
            bases = np.asarray(body.get("bases"), dtype=np.uint64)
            if bases.shape != (len(self._remote.region_bytes),):
                raise HandshakeError("the other end did not say where each of its regions is")
            token, slot_bytes = body.get("token"), count(body, "slot_bytes")
            if not isinstance(token, bytes) or len(token) != TOKEN_BYTES:
                raise HandshakeError(f"the other end's token is {token!r}")
        except (KVConnectError, TypeError, ValueError, OverflowError) as error:
            self._end.fail(failed(error))
            return
        remote = Paged(self._remote, bases.tolist())

        def found(peer: Peer) -> Target:
            return Target(peer, theirs.place, Runs(remote, Paged.of(self._local)), token, slot_bytes)

        self._end.shared.agent.soon(lambda: self._meet(theirs, found))

    def _meet(self, card: Card, found: Callable[[Peer], Target]) -> None:
        if self.target is not None:
            return
        try:
            peer = self._end.shared.agent.meet(card)
        except Exception as error:  # noqa: BLE001 - NIXL's own
            self._end.fail(failed(error))
            return
        target = found(peer)
        with self._lock:
            ended = self._ended
            if not ended:
                self.target = target
        if ended:
            peer.leave()
        else:
            self._end.met()

    def on_memory(self, body: dict[str, Any]) -> dict[str, Any]:
        """The other end has slots now. Their memory is known before anything that is told after the answer."""
        card = read_card(body)

        def learn() -> None:
            try:
                peer = self._end.shared.agent.meet(card)
            except Exception as error:  # noqa: BLE001 - NIXL's own
                self._end.fail(failed(error))
                return
            with self._lock:
                other = peer if self._ended else self._slots
                self._slots = None if self._ended else peer
            if other is not None:
                other.leave()

        self._end.shared.agent.soon(learn)
        return {}

    def check(self) -> Target:
        """Return the other end; raise `BrokenError` if it is unknown."""
        if self.target is None:
            raise BrokenError("the other end has not said where its memory is")
        return self.target

    def end(self) -> None:
        """The other end's memory is read no more."""
        with self._lock:
            self._ended, target, slots = True, self.target, self._slots
        if target is not None:
            target.peer.leave()
        if slots is not None:
            slots.leave()
