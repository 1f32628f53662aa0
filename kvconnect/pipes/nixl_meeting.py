"""How the two ends of a NIXL pipe learn where each other's paged memory is."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvconnect.errors import BrokenError, HandshakeError, KVConnectError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Message
from kvconnect.pipes.nixl_agent import Peer
from kvconnect.pipes.nixl_place import Place, card, read_card
from kvconnect.pipes.nixl_staging import StagedMemory, failed


@dataclass(frozen=True)
class Target:
    """The other end's paged memory: its agent, its kind, and where each region begins, ``uint64[regions]``."""

    peer: Peer
    place: Place
    bases: npt.NDArray[np.uint64]


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

    def __init__(self, end: Attached, local: PagedMemory, remote: PagedLayout) -> None:
        self._end, self._local, self._remote = end, local, remote
        self._lock = threading.Lock()
        self._ended = False
        self.target: Target | None = None

    def _card(self) -> dict[str, Any]:
        shared = self._end.shared
        return {**card(shared.agent.name, shared.place, shared.registration), "bases": self._local.bases.tolist()}

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
            name, metadata, where = read_card(body)
            bases = np.asarray(body.get("bases"), dtype=np.uint64)
            if bases.shape != (len(self._remote.region_bytes),):
                raise HandshakeError("the other end did not say where each of its regions is")
        except (KVConnectError, TypeError, ValueError, OverflowError) as error:
            self._end.fail(failed(error))
            return
        self._end.shared.agent.soon(lambda: self._meet(name, metadata, where, bases))

    def _meet(self, name: str, metadata: bytes, where: Place, bases: npt.NDArray[np.uint64]) -> None:
        if self.target is not None:
            return
        try:
            peer = self._end.shared.agent.meet(name, metadata)
        except Exception as error:  # noqa: BLE001 - NIXL's own
            self._end.fail(failed(error))
            return
        with self._lock:
            ended = self._ended
            if not ended:
                self.target = Target(peer, where, bases)
        if ended:
            peer.leave()
        else:
            self._end.met()

    def check(self) -> str:
        """Return the name of the other end's agent; raise `BrokenError` if it is unknown."""
        if self.target is None:
            raise BrokenError("the other end has not said where its memory is")
        return self.target.peer.name

    def end(self) -> None:
        """The other end's memory is read no more."""
        with self._lock:
            self._ended, target = True, self.target
        if target is not None:
            target.peer.leave()
