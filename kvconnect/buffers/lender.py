"""The owner's side of lending: a ledger behind a control server.

Lives in the producer's scheduler process. The scheduling thread and the server's
thread share the ledger under one lock that is never held across I/O.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from kvconnect.buffers import fields
from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.hello import Hello, check_fit, misfit
from kvconnect.buffers.ledger import Blocks, Entry, Ledger
from kvconnect.buffers.ticket import Ticket
from kvconnect.clock import SYSTEM, Clock
from kvconnect.control import ControlServer
from kvconnect.errors import ClosedError, HandshakeError

logger = logging.getLogger(__name__)

_MAX_GENERATION = 1 << 62
_MAX_WAITING = 1024

Body = dict[str, Any]


class Lender:
    """Offers entries to peers and keeps account of who has them."""

    def __init__(
        self,
        me: Hello,
        server: ControlServer,
        advertised: str,
        on_ended: Callable[[], None] | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        """Answer peers at ``server``, which they reach as ``advertised``.

        ``on_ended`` is called when takers may have ended entries or given them back.
        """
        self._on_ended = on_ended or _nothing
        self._me, self._at, self._clock = me, advertised, clock
        self._lock = threading.Lock()
        self._ledger = Ledger(me.lease_s)
        self._counts: collections.Counter[str] = collections.Counter()
        self._workers: list[dict[str, Any]] | None = None
        #: Hellos that came before our workers were known, each with the rank that asked.
        self._waiting: list[tuple[Future[Mapping[str, Any]], int | None]] = []
        self._refused: set[tuple[str, str]] = set()
        self._closed = False
        self._server = server
        for op, handler in {
            "hello": self._hello,
            "misfit": self._misfit,
            "match": self._match,
            "claim": self._claim,
            "renew": self._renew,
            "release": self._release,
            "abandon": self._abandon,
        }.items():
            server.handle(op, handler)

    # -- the scheduling thread ----------------------------------------------------

    def offer(
        self, key: LookupKey, blocks: Blocks, *, label: str | None, asked: bool, replace: bool = False
    ) -> dict[str, Any]:
        """Insert an entry and return its ticket."""
        with self._lock:
            if self._closed:
                raise ClosedError("the buffer was closed")
            entry = self._ledger.insert(key, blocks, self._clock.now(), label=label, asked=asked, replace=replace)
            self._counts["offered"] += 1
        return self._ticket(entry)

    def drain_released(self) -> list[Blocks]:
        """Return the blocks of entries that ended since the last call."""
        with self._lock:
            self._ledger.expire(self._clock.now())
            ended = self._ledger.drain()
            self._counts.update(_COUNTED[entry.ended] for entry in ended if entry.ended)
        return [entry.blocks for entry in ended]

    def reclaim(self, num_blocks: int, offered_s: float = float("inf")) -> int:
        """End unclaimed entries until they held ``num_blocks``. See `SchedulerEnd.reclaim`."""
        with self._lock:
            return self._ledger.reclaim(num_blocks, self._clock.now() - offered_s)

    def evict(self) -> bool:
        """End the oldest unclaimed entry; ``False`` if there is none."""
        with self._lock:
            return self._ledger.evict()

    @property
    def unasked_blocks(self) -> int:
        """Blocks that `reclaim` could end."""
        with self._lock:
            return self._ledger.unasked_blocks

    @property
    def blocks(self) -> int:
        """Blocks of all entries."""
        with self._lock:
            return self._ledger.blocks

    def expires_in(self) -> float:
        """Seconds in which nothing expires."""
        with self._lock:
            return self._ledger.next_expiry - self._clock.now()

    def replaceable(self, key: LookupKey) -> int:
        """Blocks that an `offer` with ``replace`` would end."""
        with self._lock:
            return sum(entry.num_blocks for entry in self._ledger.offered_under(key))

    @property
    def busy(self) -> bool:
        """Whether an entry is asked for or claimed."""
        with self._lock:
            return self._ledger.busy

    def clear(self) -> bool:
        """End all unclaimed entries; ``False`` if claimed ones remain."""
        with self._lock:
            return self._ledger.clear()

    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn this engine's workers, and answer the hellos that waited for them."""
        with self._lock:
            self._workers = [dict(worker) for worker in workers]
            waiting, self._waiting = self._waiting, []
        for future, rank in waiting:
            future.set_result(self._introduction(rank))

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        with self._lock:
            return {name: self._counts[name] for name in _NAMES}

    def close(self) -> None:
        """Stop answering; every entry ends."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        for future, _ in waiting:
            future.set_exception(ClosedError("the peer is shutting down"))
        self._server.close()

    # -- the server's thread --------------------------------------------------------

    def _hello(self, body: Body) -> Mapping[str, Any] | Future[Mapping[str, Any]]:
        caller = Hello.from_wire(body)
        if caller.rank is None and (difference := misfit(self._me, caller)):
            self._refuse(caller.engine, difference)
            check_fit(caller, self._me)  # the same in the caller's words
        if self._me.role == "consumer":
            raise HandshakeError(f"role differs: engine {self._me.engine} is a consumer and lends nothing")
        with self._lock:
            if self._workers is None:
                future: Future[Mapping[str, Any]] = Future()
                # Callers give up at their deadline; the oldest of very many surely have.
                self._waiting = [*self._waiting[-_MAX_WAITING:], (future, caller.rank)]
                return future
        return self._introduction(caller.rank)

    def _introduction(self, rank: int | None) -> dict[str, Any]:
        workers = [worker for worker in self._workers or [] if rank is None or worker.get("rank") == rank]
        return {**self._me.to_wire(), "workers": workers}

    def _misfit(self, body: Body) -> Mapping[str, Any]:
        """A taker has found, in our answer to its hello, that it cannot read our blocks."""
        self._refuse(fields.text(body, "engine"), f"in its own words, {fields.text(body, 'difference')!r:.500}")
        return {}

    def _refuse(self, engine: str, difference: str) -> None:
        with self._lock:
            self._counts["refused"] += 1
            refusal = (engine, difference)
            # Engine names are the peers' choice: the log must not grow with them.
            first = refusal not in self._refused and len(self._refused) < _MAX_WAITING
            if first:
                self._refused.add(refusal)
        if first:
            logger.warning("engine %.80s does not fit, its requests will be recomputed: %s", engine, difference)

    def _match(self, body: Body) -> Mapping[str, Any]:
        key, taker = fields.read_key(body), fields.text(body, "taker")
        label = fields.text(body, "label") if body.get("label") else None
        with self._lock:
            self._ledger.expire(self._clock.now())
            entry = self._ledger.find(key, label, taker)
        if entry is None:
            return {}
        return {"ticket": self._ticket(entry), "labelled": label is not None and entry.label == label}

    def _claim(self, body: Body) -> Mapping[str, Any]:
        """Promise a scheduler, or its worker that is about to read, that an entry stays as it is for a lease."""
        with self._lock:
            claimed = self._vouch(body) is not None
        return {"state": "ok", **self._lease()} if claimed else {"state": "gone"}

    def _renew(self, body: Body) -> Mapping[str, Any]:
        grants, done = fields.texts(body, "grants"), fields.texts(body, "done")
        with self._lock:
            now = self._clock.now()
            self._ledger.expire(now)
            gone = [grant for grant in grants if not self._ledger.renew(grant, now)]
            for grant in done:
                self._ledger.settle(grant)
        self._on_ended()
        return {"gone": gone, **self._lease()}

    def _lease(self) -> Mapping[str, Any]:
        """How long a claim lasts, and by which clock, so that a taker knows whether it can tell when that is over."""
        return {"lease_ms": int(self._me.lease_s * 1000), "clock": self._clock.identity, "now": self._clock.now()}

    def _release(self, body: Body) -> Mapping[str, Any]:
        part = fields.number(body, "part", self._me.num_parts)
        with self._lock:
            entry = self._vouch(body)
            answer = "stale" if entry is None else self._ledger.release(body["grant"], part, entry.generation)
            self._counts["stale"] += answer == "stale"
        self._on_ended()
        return {"answer": answer}

    def _vouch(self, body: Body) -> Entry | None:
        """Return the entry that ``body`` reads, now claimed by its grant; called under the lock.

        ``None`` if nobody vouches for what is read: the claim cannot be had, or other blocks
        are read than the entry's (a ticket that was tampered with). The worker's word may
        overtake its scheduler's claim: they are different processes.
        """
        grant, taker, blocks = fields.text(body, "grant"), fields.text(body, "taker"), fields.text(body, "blocks")
        generation = fields.number(body, "generation", _MAX_GENERATION)
        now = self._clock.now()
        self._ledger.expire(now)
        entry = self._ledger.get(fields.text(body, "entry"))
        if entry is None or (entry.generation, entry.digest) != (generation, blocks):
            return None
        fresh = grant not in entry.shares
        if not self._ledger.claim(entry, grant, taker, self._me.num_parts, now):
            return None
        self._counts["taken"] += fresh
        return entry

    def _abandon(self, body: Body) -> Mapping[str, Any]:
        with self._lock:
            for grant in fields.texts(body, "grants"):
                self._ledger.abandon(grant, self._clock.now())
        self._on_ended()
        return {}

    def _ticket(self, entry: Entry) -> dict[str, Any]:
        return Ticket(
            self._at, self._me.engine, self._me.incarnation, entry.id, entry.generation, entry.key, entry.blocks
        ).to_wire()


def _nothing() -> None:
    """Nobody wants to hear."""


_COUNTED = {
    "taken": "released",
    "settled": "failed",
    "expired": "expired",
    "reclaimed": "reclaimed",
    "replaced": "replaced",
    "evicted": "reclaimed",
    "cleared": "cleared",
}
_NAMES = ("offered", "taken", "stale", "refused", *dict.fromkeys(_COUNTED.values()))
