"""The producer's half of a store buffer's end in a scheduler process: prompts on their way to the store."""

from __future__ import annotations

import collections
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from kvconnect.buffers import fields
from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.ledger import Blocks
from kvconnect.buffers.store import Store, StoreOptions
from kvconnect.buffers.store_manifest import Manifest, Part, name_of, number
from kvconnect.buffers.store_room import Occupancy
from kvconnect.buffers.ticket import pack_ids
from kvconnect.control import ControlClient
from kvconnect.errors import BrokenError, ClosedError, DeadlineError, KVConnectError, named

logger = logging.getLogger(__name__)

#: The worker gives up first; if it is silent for this much longer, something is wrong with it.
_GRACE_S: Final = 5.0
#: A worker that cannot be reached is asked again, so often and after so long, then it is dead.
_TRIES, _PAUSE_S = 3, 0.5
#: Entries that `Offers.clear` remembers to drop.
_MAX_KNOWN: Final = 1 << 16

Answer = Future[dict[str, Any]]


@dataclass(eq=False)
class _Offer:
    """One prompt on its way. Its fields change under the lock of `Offers`."""

    key: LookupKey
    blocks: Blocks
    asked: bool
    made: float
    #: `Manifest.start`.
    start: int = 0
    #: What `Sightings` tell of it, if anything.
    note: Any = None
    draft: str = field(default_factory=lambda: secrets.token_hex(16))
    nbytes: int = 0
    parts: dict[int, Part] = field(default_factory=dict)
    #: Workers that may be reading the blocks.
    reading: set[int] = field(default_factory=set)
    #: Bytes that count as on their way, and whether anything of it may be at the store.
    charged: int = 0
    began: bool = False
    #: Why it comes to nothing.
    failed: str = ""
    over: bool = False

    @property
    def name(self) -> str:
        return name_of(self.key, self.start)

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.blocks))


class _Budget:
    """Bytes that are on their way to the store, of so many at most. Used under the lock of `Offers`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.nbytes = 0

    def take(self, offer: _Offer) -> bool:
        """Count an entry, if that is not too much."""
        if self.nbytes + offer.nbytes > self._limit:
            return False
        offer.charged = offer.nbytes
        self.nbytes += offer.charged
        return True

    def give(self, offer: _Offer) -> None:
        """It is on its way no more."""
        self.nbytes -= offer.charged
        offer.charged = 0


class Offers:
    """Has workers write finished prompts to a store, and knows whose blocks are still being read."""

    def __init__(
        self,
        store: Store,
        options: StoreOptions,
        occupancy: Occupancy,
        client: ControlClient,
        crew: Crew,
        limit_s: float,
    ) -> None:
        """Ask workers on ``client``, the store on ``crew``; a part must be written within ``limit_s``."""
        self._store, self._options, self._occupancy = store, options, occupancy
        self._client, self._crew, self._limit_s = client, crew, limit_s
        self._shares = options.mode == "share"
        self._lock = threading.Lock()
        self._workers: Sequence[Mapping[str, Any]] = ()
        self._open: dict[str, _Offer] = {}
        self._ended: list[Blocks] = []
        self._under_way, self._cleared = _Budget(options.writing_bytes), float("-inf")
        self._known: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()

    # -- the scheduling thread ----------------------------------------------------------

    def offer(self, key: LookupKey, blocks: Blocks, *, asked: bool, start: int = 0, note: Any = None) -> bool:
        """Start to store a prompt (from token ``start`` on), if there is room for it on the way; say so."""
        offer = _Offer(key, blocks, asked, time.monotonic(), start, note)
        with self._lock:
            self._open[offer.draft] = offer
            self._counts["offered"] += 1
            if self._workers:
                self._admit(offer)
            return not offer.failed

    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn our workers; what was offered before is stored now."""
        with self._lock:
            first, self._workers = not self._workers, tuple(workers)
            for offer in list(self._open.values()) if first else ():
                self._admit(offer)

    def drain_released(self) -> list[Blocks]:
        """Return the blocks that nobody reads any more."""
        with self._lock:
            ended, self._ended = self._ended, []
            return ended

    def reclaim(self, num_blocks: int, offered_s: float) -> int:
        """Give up prompts, oldest first, until they held ``num_blocks``. See `SchedulerEnd.reclaim`."""
        old = time.monotonic() - offered_s
        held = 0
        for offer in [*self._going(lambda o: not o.asked), *self._going(lambda o: o.asked and o.made <= old)]:
            if held >= num_blocks:
                break
            held += offer.num_blocks
            self._give_up(offer, "reclaimed")
        return held

    def blocks(self, *, unasked: bool = False) -> int:
        """Blocks of all prompts on their way; or of those that nobody asked for and nobody has given up."""
        with self._lock:
            counted = (o for o in self._open.values() if not unasked or not (o.asked or o.failed))
            return sum(offer.num_blocks for offer in counted)

    def clear(self) -> bool:
        """Give up what is on its way, and drop what this engine has stored; ``False`` if blocks are still read."""
        for offer in self._going():
            self._give_up(offer, "cleared")
        with self._lock:
            self._cleared = time.monotonic()
            self._occupancy.sightings.clear()
            known, self._known = list(self._known), collections.OrderedDict()
            still = bool(self._open)
        for name in known:
            self._drop(name)
        return not still

    def _drop(self, name: str) -> None:
        def drop() -> None:
            try:
                self._store.drop(name)
            except Exception as error:  # noqa: BLE001 - a third party's store may raise anything; age ends the entry
                logger.warning("an outdated entry could not be dropped: %s", named(error))

        self._crew.submit(drop, lane=name)

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Give up what is on its way."""
        for offer in self._going():
            self._give_up(offer, "closed")

    # -- any thread -----------------------------------------------------------------------

    def _going(self, accept: Callable[[_Offer], bool] = lambda _: True) -> list[_Offer]:
        with self._lock:
            return [offer for offer in self._open.values() if not offer.failed and accept(offer)]

    def _admit(self, offer: _Offer) -> None:
        """Under the lock: have a prompt stored, unless too much is on its way."""
        sizes = [worker["block_bytes"] for worker in self._workers]
        offer.nbytes = sum(
            size * sum(map(bool, ids)) for each in sizes for ids, size in zip(offer.blocks, each, strict=False)
        )
        # What is shared may be there already, and is on no way then: that is seen to first.
        if not self._shares and not self._under_way.take(offer):
            offer.failed = "busy"
            self._end(offer)
        elif not self._crew.submit(partial(self._prepare, offer)):
            offer.failed = "closed"
            self._under_way.give(offer)
            self._end(offer)

    def _end(self, offer: _Offer) -> None:
        """Under the lock: the blocks are the engine's again."""
        if offer.over:
            return
        offer.over = True
        del self._open[offer.draft]
        self._ended.append(offer.blocks)
        if offer.failed:
            self._counts[f"not_stored_{offer.failed}"] += 1

    def _give_up(self, offer: _Offer, why: str) -> None:
        """Come to nothing; the blocks are free as soon as no worker reads them."""
        with self._lock:
            if offer.failed or offer.over:
                return
            offer.failed = why
            reading = list(offer.reading)
            if not reading:
                self._leave(offer)
        for rank in reading:
            self._stop(offer, rank)

    def _leave(self, offer: _Offer) -> None:
        """Under the lock: no worker reads the blocks any more."""
        self._end(offer)
        job = self._discard if offer.failed else self._publish
        if offer.note is not None and not offer.failed:
            self._occupancy.sightings.expect()
        if not offer.began or not self._crew.submit(partial(job, offer)):
            self._under_way.give(offer)

    # -- the store's threads --------------------------------------------------------------

    def _prepare(self, offer: _Offer) -> None:
        """See whether the store wants it, then have the workers write it."""
        try:
            why = self._obstacle(offer)
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything
            logger.warning("the store cannot be asked: %s", named(error))
            why = "store_failed"
        with self._lock:
            if self._shares and not why and not offer.failed and not self._under_way.take(offer):
                why = "busy"
        if why:
            self._seen(offer, why)
            self._give_up(offer, why)
            return
        blocks = [pack_ids(ids) for ids in offer.blocks]
        body = {"blocks": blocks, "chunk_bytes": self._options.chunk_bytes}
        with self._lock:
            if offer.failed:
                return
            offer.began = True
            offer.reading = set(range(len(self._workers)))
            # Sent before anybody can ask them to stop: calls arrive in order.
            answers = [self._ask(offer, rank, "store.write", body) for rank in range(len(self._workers))]
        for rank, answer in enumerate(answers):
            answer.add_done_callback(partial(self._written, offer, rank))

    def _obstacle(self, offer: _Offer) -> str:
        if self._shares and self._store.find(offer.name) is not None:
            self._store.touch(offer.name)
            return "present"
        return "" if self._occupancy.admit(offer.nbytes, offer.name) else "no_room"

    def _publish(self, offer: _Offer) -> None:
        parts = tuple(offer.parts[rank] for rank in range(len(self._workers)))
        blocks, chunk_bytes = number(offer.blocks), self._options.chunk_bytes
        manifest = Manifest(offer.key, blocks, chunk_bytes, parts, time.time(), offer.start)
        try:
            packed, nbytes = manifest.pack(), manifest.nbytes
            stored = self._store.publish(offer.draft, offer.name, packed, nbytes=nbytes, replace=not self._shares)
            why = "" if stored else "present"
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything
            logger.warning("a prompt could not be stored: %s", named(error))
            why = "store_failed"
            # Only the answer may have been lost; then its chunks are an entry's, which must not lose them.
            if not isinstance(error, BrokenError):
                self._drop_draft(offer)
        self._seen(offer, why)
        if offer.note is not None:
            self._occupancy.sightings.expect(-1)
        with self._lock:
            self._under_way.give(offer)
            self._counts[f"not_stored_{why}" if why else "stored"] += 1
            outdated = offer.made < self._cleared  # its blocks were free already, so `clear` did not see it
            if why != "present" and not outdated:
                self._known[offer.name] = None
                self._known.move_to_end(offer.name)
                while len(self._known) > _MAX_KNOWN:
                    self._known.popitem(last=False)
        if outdated and why != "present":
            self._drop(offer.name)

    def _seen(self, offer: _Offer, why: str) -> None:
        """Take down what has been stored, or was there; ``why`` it was not stored."""
        with self._lock:  # `clear` comes before or after
            if offer.note is not None and why in {"", "present"} and offer.made >= self._cleared:
                self._occupancy.sightings.seen(offer.name, offer.note, offer.key.length - offer.start)

    def _discard(self, offer: _Offer) -> None:
        self._drop_draft(offer)
        with self._lock:
            self._under_way.give(offer)

    def _drop_draft(self, offer: _Offer) -> None:
        try:
            self._store.discard(offer.draft)
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything; `mend` tries again
            logger.debug("a draft could not be dropped: %s", error)

    # -- the client's thread ----------------------------------------------------------------

    def _ask(self, offer: _Offer, rank: int, op: str, body: Mapping[str, Any]) -> Answer:
        worker = self._workers[rank]
        full = {**body, "draft": offer.draft, "secret": worker["secret"]}
        return self._client.call(worker["endpoint"], op, full, self._limit_s + _GRACE_S)

    def _written(self, offer: _Offer, rank: int, answer: Answer) -> None:
        try:
            part = _part(answer.result())
        except KVConnectError as error:
            if not offer.failed:
                logger.warning("worker %d could not store a prompt: %s", rank, named(error))
            # The blocks are free when each of them has said that it has stopped, this one too.
            self._give_up(offer, "store_failed")
            return
        with self._lock:
            offer.parts[rank] = part
        self._has_stopped(offer, rank)

    def _stop(self, offer: _Offer, rank: int, tries: int = 1) -> None:
        self._ask(offer, rank, "store.stop", {}).add_done_callback(partial(self._stopped, offer, rank, tries))

    def _stopped(self, offer: _Offer, rank: int, tries: int, answer: Answer) -> None:
        error = answer.exception()
        if isinstance(error, DeadlineError):
            self._stop(offer, rank, tries)  # it lives, and may be reading
        elif isinstance(error, BrokenError) and tries < _TRIES:
            self._client.later(_PAUSE_S, lambda: self._stop(offer, rank, tries + 1))
        else:
            if error is not None and not isinstance(error, ClosedError):
                logger.warning("worker %d is gone: %s", rank, named(error))
            self._has_stopped(offer, rank)

    def _has_stopped(self, offer: _Offer, rank: int) -> None:
        with self._lock:
            if rank in offer.reading:
                offer.reading.discard(rank)
                if not offer.reading:
                    self._leave(offer)


def _part(body: Mapping[str, Any]) -> Part:
    sums = body.get("sums")
    if not isinstance(sums, bytes):
        raise BrokenError("a worker's answer has no sums")
    return Part(fields.number(body, "nbytes", 1 << 48), fields.text(body, "shape"), sums)
