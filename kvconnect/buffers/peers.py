"""The engines one end has met: hello once, remember who fits and who does not.

Everything here runs on the control client's thread, except `Peers.met`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvconnect.buffers.base import Miss
from kvconnect.buffers.hello import Hello, check_fit
from kvconnect.buffers.recent import Recent
from kvconnect.control import ControlClient
from kvconnect.errors import ClosedError, HandshakeError, KVConnectError, named

logger = logging.getLogger(__name__)

#: A peer that failed is not asked again for this long, so that it costs one time-out and not one per request.
RETRY_S = 3.0
_MAX_PEERS = 4096


@dataclass(eq=False)
class Peer:
    """One endpoint: met (``hello``), or failed (``failure``), or neither yet."""

    endpoint: str
    hello: Hello | None = None
    failure: Miss | None = None
    retry_at: float = 0.0
    #: The incarnation that was last looked for there.
    sought: str | None = None
    waiting: list[Callable[[Peer], None]] = field(default_factory=list)

    def is_met(self, incarnation: str | None) -> bool:
        """Whether this very incarnation (any, if ``None``) has been met."""
        return self.hello is not None and incarnation in (None, self.hello.incarnation)

    def has_failed(self, incarnation: str | None, now: float) -> bool:
        """Whether it is too early to try again; not if there is word of another incarnation: it was restarted."""
        return self.failure is not None and now < self.retry_at and incarnation in (None, self.sought)


class Peers:
    """Acquaintances by endpoint."""

    def __init__(
        self, me: Hello, client: ControlClient, timeout_s: float, check: Callable[[Hello], Hello] | None = None
    ) -> None:
        """Introduce ourselves as ``me``; ``check`` raises at further misfits, and returns what is to be remembered."""
        self._me = me
        self._client = client
        self._timeout_s = timeout_s
        self._check = check
        self._peers: dict[str, Peer] = {}
        self._logged: Recent[tuple[str, str]] = Recent()

    def met(self, endpoint: str, incarnation: str | None = None) -> Hello | None:
        """Return the hello of a peer that was met and not lost since. Any thread."""
        peer = self._peers.get(endpoint)
        hello = peer.hello if peer is not None else None
        return hello if hello is not None and incarnation in (None, hello.incarnation) else None

    def failure(self, endpoint: str) -> Miss | None:
        """Return why the last attempt to meet this endpoint failed, if it did."""
        peer = self._peers.get(endpoint)
        return peer.failure if peer is not None else None

    def meet(self, endpoint: str, then: Callable[[Peer], None], incarnation: str | None = None) -> None:
        """Call ``then`` once the endpoint has been met or has failed; at once if that is known."""
        # The last asked for come last; endpoints are whatever tickets say.
        peer = self._peers.pop(endpoint, None) or Peer(endpoint)
        self._peers[endpoint] = peer
        if len(self._peers) > _MAX_PEERS:
            self._forget_oldest()
        if peer.is_met(incarnation) or peer.has_failed(incarnation, self._client.clock.now()):
            then(peer)
            return
        peer.sought = incarnation or peer.sought
        peer.waiting.append(then)
        if len(peer.waiting) == 1:
            self._client.call(endpoint, "hello", self._me.to_wire(), self._timeout_s).add_done_callback(
                lambda answer: self._heard(peer, answer)
            )

    def _forget_oldest(self) -> None:
        oldest = next((other for other in self._peers.values() if not other.waiting), None)
        if oldest is not None:
            del self._peers[oldest.endpoint]

    def recheck(self) -> None:
        """Apply ``check`` to those met before there was anything to check against."""
        for peer in list(self._peers.values()):
            if peer.hello is not None and peer.hello.workers:
                self._judge(peer, peer.hello)

    def lost(self, endpoint: str, error: KVConnectError) -> None:
        """Forget a peer whose connection broke; the next `meet` starts afresh, a little later."""
        peer = self._peers.get(endpoint)
        if peer is not None and not peer.waiting:
            self._fail(peer, "unreachable", error)

    def _heard(self, peer: Peer, answer: Future[dict[str, Any]]) -> None:
        try:
            hello = Hello.from_wire(answer.result())
        except HandshakeError as error:
            self._fail(peer, "mismatch", error)
        except KVConnectError as error:
            self._fail(peer, "unreachable", error)
        else:
            self._judge(peer, hello)
        finally:
            waiting, peer.waiting = peer.waiting, []
            for then in waiting:
                _tell(then, peer)

    def _judge(self, peer: Peer, hello: Hello) -> None:
        """Remember a peer by its hello, as one that fits or as one that does not."""
        try:
            if self._me.rank is None:
                check_fit(self._me, hello)
            if self._check is not None:
                hello = self._check(hello)
        except KVConnectError as error:
            self._refuse(peer, error)
        except Exception as error:  # noqa: BLE001 - what peers send may break anything (a third party's pipe, say); those who wait must hear of it
            self._refuse(peer, HandshakeError(f"its hello is of no use: {type(error).__name__}: {error}"))
        else:
            peer.hello, peer.failure = hello, None
            self._logged.forget(lambda entry: entry[0] == peer.endpoint)

    def _refuse(self, peer: Peer, error: KVConnectError) -> None:
        """What it has told does not fit; its own log is to say so, too."""
        self._fail(peer, "mismatch", error)
        told = {"engine": self._me.engine, "difference": str(error)[:1000]}
        self._client.call(peer.endpoint, "misfit", told, self._timeout_s)  # whatever it answers

    def _fail(self, peer: Peer, cause: str, error: KVConnectError) -> None:
        peer.hello, peer.failure = None, Miss(cause, str(error))
        peer.retry_at = self._client.clock.now() + RETRY_S
        ours = isinstance(error, ClosedError)  # we are shutting down: no news of the peer
        if not ours and self._logged.add((peer.endpoint, cause)):
            logger.warning(
                "peer %s: %s; requests for its KV will be recomputed: %s", peer.endpoint, cause, named(error)
            )


def _tell(then: Callable[[Peer], None], peer: Peer) -> None:
    try:
        then(peer)
    except Exception:  # whoever waits next must hear of it nevertheless
        logger.exception("a call after meeting %s failed", peer.endpoint)


def worker_of(hello: Hello, rank: int) -> Mapping[str, Any]:
    """Return the description of worker ``rank``; raise `HandshakeError` if the peer has none."""
    for worker in hello.workers:
        if worker.get("rank") == rank:
            return worker
    raise HandshakeError(f"engine {hello.engine} describes no worker of rank {rank}")
