"""The taker's side of lending: find entries at their owners and keep them from expiring.

Lives in the consumer's scheduler process. The scheduling thread leaves a request
with `Taker.look` and polls `Taker.found`; the search itself is a state machine
on the control client's one thread, so that only the answers need a lock.
"""

from __future__ import annotations

import collections
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from kvconnect.buffers import fields, layouts
from kvconnect.buffers.base import Claim, Miss, Want
from kvconnect.buffers.choice import choose_pipe
from kvconnect.buffers.directory import Producers
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.ledger import digest_of
from kvconnect.buffers.peers import Peer, Peers, worker_of
from kvconnect.buffers.promise import Promise
from kvconnect.buffers.renewal import Renewal
from kvconnect.buffers.ticket import Ticket
from kvconnect.clock import Clock
from kvconnect.config import Config
from kvconnect.control import ControlClient
from kvconnect.errors import BrokenError, DeadlineError, HandshakeError, KVConnectError, named

logger = logging.getLogger(__name__)

#: How long an entry with the right content waits for a peer that may have the right label, too.
_GRACE_S = 0.1


@dataclass(eq=False)
class Look:
    """One request's search. ``answer``, ``committed`` and ``over`` are under the taker's lock."""

    request_id: str
    want: Want
    grant: str
    taker: str
    ticket: Ticket | None = None
    answer: Claim | Miss | None = None
    committed: bool = False
    over: bool = False
    #: Where the grant is, once it has been asked for.
    at: str | None = None
    cause: Miss | None = None
    claiming: bool = False
    waiting: set[str] = field(default_factory=set)
    offers: list[Ticket] = field(default_factory=list)


class Taker:
    """Looks for KV by ticket, label and content, and holds what it found."""

    def __init__(
        self,
        options: Config,
        me: Hello,
        client: ControlClient,
        producers: Producers,
        on_answer: Callable[[str], None] | None = None,
    ) -> None:
        """Search on ``client``'s thread, in the name of ``me``; ``on_answer`` hears of answers."""
        self._options, self._name = options, me.incarnation
        self._client, self._producers, self._on_answer = client, producers, on_answer
        self._peers = Peers(me, client, options.connect_timeout_s, lambda hello: _check_workers(self._workers, hello))
        self._renewal = Renewal(client, self._peers, options.lease_s, self._gone)
        self._workers: Sequence[Mapping[str, Any]] = ()
        self._lock = threading.Lock()
        self._looks: dict[str, Look] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._bad_tickets_logged = False

    # -- the scheduling thread ----------------------------------------------------

    def look(self, request_id: str, want: Want, taker: str | None = None) -> None:
        """Start to look; a ticket of a peer that was met is answered here and now.

        Looks of one ``taker`` (this engine, unless named) may share an entry.
        """
        look = Look(request_id, want, secrets.token_hex(8), taker or self._name)
        look.ticket = self._read_ticket(want)
        with self._lock:
            if request_id in self._looks:
                return
            self._looks[request_id] = look
        ticket = look.ticket
        if ticket and ticket.key == want.key and self._peers.met(ticket.at, ticket.incarnation):
            self._claim_ticket(look, _claim_of(look, ticket, self._client.clock))
        elif ticket or (self._options.content_lookup and self._producers.any()):
            if not self._client.soon(lambda: self._search(look)):
                self._answer(look, Miss("closed"))
        else:
            self._answer(look, look.cause or Miss("no_producer"))

    def found(self, request_id: str) -> Claim | Miss | None:
        """Return the answer, or ``None`` while there is none."""
        with self._lock:
            look = self._looks.get(request_id)
            if look is None:
                return Miss("absent", "nobody looked for this request")
            return look.answer

    def commit(self, request_id: str) -> Claim | Miss:
        """Return the answer, which from here on is final."""
        with self._lock:
            look = self._looks.get(request_id)
            if look is None or look.answer is None:
                return Miss("absent", "there is no answer for this request")
            look.committed = True
            return look.answer

    def settle(self, request_id: str) -> None:
        """Stop renewing; the owner hears with the next renewal that nothing is read any more."""
        look = self._forget(request_id)
        if look is not None:
            self._client.soon(lambda: self._renewal.end(look.at, look.grant))

    def abandon(self, request_id: str) -> None:
        """Give back what was or will be claimed."""
        look = self._forget(request_id)
        if look is not None:
            self._client.soon(lambda: self._give_back(look))

    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn our own workers, so that a peer with other memory shapes is refused at hello."""
        self._workers = tuple(workers)
        self._client.soon(self._peers.recheck)  # those met before this

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Give everything back, as far as peers can be reached."""
        with self._lock:
            looks, self._looks = list(self._looks.values()), {}
        for look in looks:
            look.over = True
            self._client.soon(lambda look=look: self._give_back(look))  # type: ignore[misc]
        self._client.flush()

    # -- answers, any thread ----------------------------------------------------------

    def _read_ticket(self, want: Want) -> Ticket | None:
        if want.ticket is None:
            return None
        try:
            return Ticket.from_wire(want.ticket)
        except HandshakeError as error:
            with self._lock:
                self._counts["bad_tickets"] += 1
                first, self._bad_tickets_logged = not self._bad_tickets_logged, True
            if first:
                logger.warning("a ticket cannot be read, its request will be looked up by content: %s", named(error))
            return None

    def _answer(self, look: Look, answer: Claim | Miss, *, instead: bool = False) -> bool:
        """Set the answer; ``instead`` takes back a claim that nobody acts on yet."""
        with self._lock:
            if look.over or look.committed or (look.answer is not None and not instead):
                return False
            if isinstance(look.answer, Miss):
                return False
            look.answer = answer
            if isinstance(answer, Miss):
                self._counts[f"miss_{answer.cause}"] += 1
            elif not instead:
                self._counts["claimed"] += 1
        if self._on_answer is not None:
            self._on_answer(look.request_id)
        return True

    def _forget(self, request_id: str) -> Look | None:
        with self._lock:
            look = self._looks.pop(request_id, None)
            if look is not None:
                look.over = True
            return look

    # -- the client's thread: by ticket ---------------------------------------------

    def _search(self, look: Look) -> None:
        ticket = look.ticket
        if ticket is not None and ticket.key == look.want.key:
            limit_s = self._options.connect_timeout_s + self._options.lookup_timeout_s
            self._client.later(limit_s, lambda: self._time_is_up(look))
            self._peers.meet(ticket.at, lambda peer: self._by_ticket(look, ticket, peer), ticket.incarnation)
        else:
            self._by_content(look)

    def _by_ticket(self, look: Look, ticket: Ticket, peer: Peer) -> None:
        if look.over:
            return
        if peer.is_met(ticket.incarnation):
            self._claim_ticket(look, _claim_of(look, ticket, self._client.clock))
            return
        look.cause = peer.failure or Miss("gone", f"engine {ticket.engine} was restarted")
        self._by_content(look)

    def _claim_ticket(self, look: Look, claim: Claim, *, again: bool = True) -> None:
        """Answer with a ticket's own content, and have the owner confirm it meanwhile. Any thread."""
        if again and not self._answer(look, claim):
            return
        look.at = claim.data["at"]
        self._ask_claim(claim).add_done_callback(lambda answer: self._ticket_claimed(look, claim, answer, again=again))

    def _ticket_claimed(self, look: Look, claim: Claim, answer: Future[dict[str, Any]], *, again: bool) -> None:
        at: str = claim.data["at"]
        if again and not look.over and isinstance(answer.exception(), BrokenError):
            # The connection may have been dead for long, and workers may read already. Over a new
            # one, once; if the claim was granted after all, this renews it.
            self._claim_ticket(look, claim, again=False)
            return
        miss = self._refusal(at, answer)
        # Too late for a miss if the engine acts on the claim by now: then the owner's answer
        # to the workers' release decides.
        if miss is not None and self._answer(look, miss, instead=True):
            if _is_late(answer):
                self._give_back(look)
            look.at = None
        elif not look.over and (miss is None or _is_late(answer)):
            self._renewal.add(at, look.grant, claim.promise)

    # -- the client's thread: by label and content ------------------------------------

    def _by_content(self, look: Look) -> None:
        endpoints = set(self._producers.endpoints()) if self._options.content_lookup else set()
        if look.ticket is not None and look.cause is None:
            endpoints.add(look.ticket.at)
        unknown = Miss("unreachable" if endpoints else "no_producer")
        for endpoint in [endpoint for endpoint in endpoints if self._peers.failure(endpoint)]:
            # Nobody waits for a peer that failed; it is tried again on the side.
            endpoints.discard(endpoint)
            _blame(look, endpoint, self._peers.failure(endpoint))
            self._peers.meet(endpoint, lambda _: None)
        if not endpoints:
            self._answer(look, look.cause or unknown)
            return
        look.waiting = endpoints
        self._client.later(self._options.lookup_timeout_s, lambda: self._time_is_up(look))
        for endpoint in list(endpoints):
            self._peers.meet(endpoint, lambda peer: self._ask(look, peer))

    def _ask(self, look: Look, peer: Peer) -> None:
        _blame(look, peer.endpoint, peer.failure)
        if peer.failure is not None or look.answer is not None or look.over:
            self._heard(look, peer.endpoint, None)
            return
        body = {**fields.write_key(look.want.key), "label": look.want.label or "", "taker": look.taker}
        self._client.call(peer.endpoint, "match", body, self._options.lookup_timeout_s).add_done_callback(
            lambda answer: self._heard(look, peer.endpoint, answer)
        )

    def _heard(self, look: Look, endpoint: str, answer: Future[dict[str, Any]] | None) -> None:
        look.waiting.discard(endpoint)
        labelled = False
        try:
            body = answer.result() if answer is not None else {}
            if "ticket" in body:
                offer = Ticket.from_wire(fields.mapping(body, "ticket"))
                if offer.key != look.want.key:
                    raise HandshakeError(f"{endpoint} offers KV of another content")
                labelled = body.get("labelled") is True
                look.offers.insert(0 if labelled else len(look.offers), offer)
        except BrokenError as error:
            self._peers.lost(endpoint, error)
        except KVConnectError as error:
            logger.debug("looking for %s at %s: %s", look.request_id, endpoint, error)
        if labelled or not look.waiting:
            self._try_best(look)
        elif look.offers:
            self._client.later(_GRACE_S, lambda: self._try_best(look))

    def _try_best(self, look: Look) -> None:
        if look.claiming or look.answer is not None or look.over:
            return
        if look.offers:
            offer = look.offers.pop(0)
            look.claiming, look.at = True, offer.at
            claim = _claim_of(look, offer, self._client.clock)
            self._ask_claim(claim).add_done_callback(lambda answer: self._offer_claimed(look, claim, answer))
        elif not look.waiting:
            self._answer(look, look.cause or Miss("absent"))

    def _offer_claimed(self, look: Look, claim: Claim, answer: Future[dict[str, Any]]) -> None:
        at: str = claim.data["at"]
        look.claiming = False
        if self._refusal(at, answer) is not None:
            if _is_late(answer):
                self._give_back(look)
            look.at = None
            self._try_best(look)
        elif self._answer(look, claim):
            self._renewal.add(at, look.grant, claim.promise)
        else:
            self._give_back(look)  # the request was abandoned or out of time meanwhile

    def _time_is_up(self, look: Look) -> None:
        if not look.over and look.answer is None:
            late = ", ".join(sorted(look.waiting))
            self._answer(look, look.cause or Miss("timeout", f"no answer from {late}" if late else ""))

    # -- the client's thread: claims ---------------------------------------------------

    def _ask_claim(self, claim: Claim) -> Future[dict[str, Any]]:
        at, body = claim.data["at"], {"grant": claim.grant, **claim.data}
        return claim.promise.ask(lambda: self._client.call(at, "claim", body, self._options.lookup_timeout_s))

    def _refusal(self, at: str, answer: Future[dict[str, Any]]) -> Miss | None:
        """Return why a claim was not granted, if it was not."""
        try:
            state = answer.result().get("state")
        except BrokenError as error:
            self._peers.lost(at, error)
            return Miss("unreachable", str(error))
        except KVConnectError as error:
            return Miss("unreachable", str(error))
        return None if state == "ok" else Miss("gone", "the owner's lease has ended")

    def _gone(self, grants: Sequence[str]) -> None:
        """Owners say that these grants have ended: those nobody acts on yet become misses."""
        ended = set(grants)
        with self._lock:
            looks = [look for look in self._looks.values() if look.grant in ended]
        for look in looks:
            self._answer(look, Miss("gone", "the claim has ended"), instead=True)

    def _give_back(self, look: Look) -> None:
        if look.at is None:
            return
        self._renewal.drop(look.at, look.grant)
        # A peer that cannot be told will end the claim by itself.
        self._client.call(look.at, "abandon", {"grants": [look.grant]}, self._options.release_timeout_s)


def _check_workers(workers: Sequence[Mapping[str, Any]], hello: Hello) -> Hello:
    """Check what our workers would find out with the first load, before any load is promised; return what to remember.

    Workers' descriptions are the largest part of a hello, and of no use here once they are known to fit.
    """
    for ours in workers:
        theirs = worker_of(hello, fields.number(ours, "rank", 1 << 12))
        layouts.check_shapes(ours, theirs)
        choose_pipe(ours, theirs)
    return replace(hello, workers=()) if workers else hello


def _is_late(answer: Future[dict[str, Any]]) -> bool:
    """Whether a claim was not answered in time, so that the owner may have granted it."""
    return isinstance(answer.exception(), DeadlineError)


def _claim_of(look: Look, ticket: Ticket, clock: Clock) -> Claim:
    data = {
        "at": ticket.at,
        "engine": ticket.engine,
        "incarnation": ticket.incarnation,
        "entry": ticket.entry,
        "generation": ticket.generation,
        "taker": look.taker,
        # With every question, the owner checks that these are its entry's.
        "blocks": digest_of(ticket.blocks),
    }
    return Claim(look.grant, ticket.key, ticket.blocks, data, Promise(clock=clock))


def _blame(look: Look, endpoint: str, failure: Miss | None) -> None:
    """Keep what is wrong with the ticket's own peer: it says more than that nobody has the content."""
    if failure is not None and look.ticket is not None and look.ticket.at == endpoint:
        look.cause = failure
