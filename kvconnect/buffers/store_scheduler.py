"""A store buffer's end in a scheduler process: `Offers` if the engine produces, `Looks` if it consumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvconnect.buffers import fields
from kvconnect.buffers.access import Access
from kvconnect.buffers.base import Claim, EndSettings, LookupKey, Miss, SchedulerEnd, Want
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.ledger import Blocks
from kvconnect.buffers.store import Store, StoreOptions
from kvconnect.buffers.store_looks import Looks
from kvconnect.buffers.store_offers import Offers
from kvconnect.buffers.store_room import Occupancy
from kvconnect.errors import KVConnectError

logger = logging.getLogger(__name__)

#: Threads that wait for the store: what hangs on one entry leaves one for the others.
_THREADS: Final = 2
_CLOSE_S: Final = 2.0
#: How often the store is tidied up, at most.
_TIDY_S: Final = 10.0


class StoreScheduler(SchedulerEnd):
    """Joins both halves; all that may wait is done on threads of its own."""

    tells_news = True

    def __init__(self, name: str, settings: EndSettings, store: Store, options: StoreOptions) -> None:
        """Start; waits for nobody.

        Raises:
            ConfigError: a key cannot be read.

        """
        config = settings.options
        self._name, self._engine, self._store = name, settings.engine_id, store
        # What is taken is gone: prompts that begin alike cannot share it.
        self.segment_tokens = options.segment_tokens if options.mode == "share" else 0
        self._occupancy = Occupancy(store, options)
        self._client = Access(config, settings.clock).client("kvconnect-store-client")
        self._crew = Crew("kvconnect-store", _THREADS)
        self._offers = (
            Offers(store, options, self._occupancy, self._client, self._crew, config.transfer_timeout_s)
            if settings.produces
            else None
        )
        self._looks = Looks(store, options, config, self._crew, self._client) if settings.consumes else None
        self._every_s = min(_TIDY_S, config.lease_s / 3)
        self._tidy_later()

    # -- consumer -------------------------------------------------------------------

    def look(self, request_id: str, want: Want) -> None:
        """Start looking. See `SchedulerEnd.look`."""
        if self._looks is not None:
            self._looks.look(request_id, want)

    def found(self, request_id: str) -> Claim | Miss | None:
        """Return the answer. See `SchedulerEnd.found`."""
        return self._looks.found(request_id) if self._looks is not None else Miss("not_consumer")

    def commit(self, request_id: str) -> Claim | Miss:
        """Return the final answer. See `SchedulerEnd.commit`."""
        return self._looks.commit(request_id) if self._looks is not None else Miss("not_consumer")

    def settle(self, request_id: str) -> None:
        """Forget a claim that the workers are done with: the last of an entry drops it."""
        if self._looks is not None:
            self._looks.end(request_id, used=True)

    def abandon(self, request_id: str) -> None:
        """Give a claim back."""
        if self._looks is not None:
            self._looks.end(request_id, used=False)

    # -- producer -------------------------------------------------------------------

    def offer(
        self,
        key: LookupKey,
        blocks: Blocks,
        *,
        label: str | None,
        asked: bool,
        before: Sequence[tuple[LookupKey, Blocks]] = (),
        notes: Mapping[LookupKey, Any] | None = None,
    ) -> dict[str, Any]:
        """Have a prompt stored. See `SchedulerEnd.offer`.

        Content finds it without the ticket, which says no more than that it is worth waiting for a little.
        """
        if self._offers is None:
            raise KVConnectError("this engine is a consumer only: it has nothing to offer")
        coming, start, notes = True, 0, notes or {}
        for until, segment in (*before, (key, blocks)):
            coming = self._offers.offer(until, segment, asked=asked, start=start, note=notes.get(until)) and coming
            start = until.length
        return {"buffer": self._name, "engine": self._engine, "coming": coming, **fields.write_key(key)}

    def news(self) -> list[tuple[Any, bool]]:
        """Return what is known of noted entries. See `SchedulerEnd.news`."""
        return self._occupancy.sightings.drain()

    def drain_released(self) -> list[Blocks]:
        """Return the blocks of prompts that are stored, or will not be."""
        return self._offers.drain_released() if self._offers is not None else []

    def reclaim(self, num_blocks: int, offered_s: float = float("inf")) -> int:
        """Give up prompts on their way. Their blocks are drained as soon as no worker reads them."""
        return self._offers.reclaim(num_blocks, offered_s) if self._offers is not None else 0

    def unasked_blocks(self) -> int:
        """Blocks that `reclaim` could end."""
        return self._offers.blocks(unasked=True) if self._offers is not None else 0

    def lent_blocks(self) -> int:
        """Blocks of all prompts on their way."""
        return self._offers.blocks() if self._offers is not None else 0

    def awaits_takers(self) -> bool:
        """Whether the engine should keep stepping, so that blocks return to it, and `news`."""
        return self._offers is not None and (self._offers.blocks() > 0 or self._occupancy.sightings.due)

    # -- both -------------------------------------------------------------------------

    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn this engine's workers."""
        for half in (self._offers, self._looks):
            if half is not None:
                half.introduce(workers)

    def stats(self) -> dict[str, int]:
        """Counters of both halves."""
        return {k: n for half in (self._offers, self._looks) if half is not None for k, n in half.stats().items()}

    def clear(self) -> bool:
        """Give up what is on its way, and drop what this engine has stored."""
        return self._offers.clear() if self._offers is not None else True

    def close(self) -> None:
        """Give back, stop threads. What is stored stays."""
        for half in (self._offers, self._looks):
            if half is not None:
                half.close()
        self._crew.close(_CLOSE_S)
        self._client.close()
        self._store.close()

    # -- the store's threads --------------------------------------------------------------

    def _tidy(self) -> None:
        """Keep what we hold, let others have what was left behind, drop what is too old; again and again."""
        try:
            if self._looks is not None:
                self._looks.renew()
            self._store.mend()
            self._occupancy.refresh()
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything; it is tried again
            logger.debug("the store could not be tidied up: %s", error)
        self._tidy_later()

    def _tidy_later(self) -> None:
        # Never twice at a time: a store that hangs holds one thread with this, not all.
        self._client.later(self._every_s, self._tidy_now)

    def _tidy_now(self) -> None:
        self._crew.submit(self._tidy)
