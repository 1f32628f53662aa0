"""Room in a store: what is too old goes, then what has not been used for the longest time."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from kvconnect.buffers.store import Store, StoreOptions
from kvconnect.buffers.store_sightings import Sightings

#: When something has to be evicted, this share of the capacity goes at a time: finding out what takes a list of all.
_SLACK = 1 / 32


class Room(NamedTuple):
    """What is left of a store: bytes that are too many still, 0 or less if it fits, and the names that are offered."""

    over: int
    names: frozenset[str]


def make_room(
    store: Store,
    options: StoreOptions,
    nbytes: int,
    now: float,
    *,
    evict: bool = True,
    name: str = "",
    slack: int = 0,
) -> Room:
    """Drop entries that are too old and then, those unused for longest first, until ``nbytes`` more fit.

    Args:
        store: where.
        options: how much may be there, and for how long.
        nbytes: bytes of the entry to come; what will never fit evicts nothing.
        now: the time, of ``time.time``.
        evict: drop entries that are not too old, too.
        name: of the entry to come, which replaces what is offered under it.
        slack: bytes to free beyond those, at most, if something is evicted at all.

    """
    listed = store.entries()
    names = {entry.name for entry in listed if not entry.taken}
    kept = (entry for entry in listed if entry.taken or entry.name != name)
    entries = sorted(kept, key=lambda entry: max(entry.made, entry.used))
    over = sum(entry.nbytes for entry in entries) + nbytes - options.capacity_bytes
    evicts = evict and over > 0 and nbytes <= options.capacity_bytes
    for entry in entries:
        too_old = entry.made + options.max_age_s <= now
        evicts = evicts and (over > 0 or over - entry.nbytes >= -slack)
        if (too_old or evicts) and not entry.taken:
            store.drop(entry.name)  # or somebody else has: it is gone in any case
            names.discard(entry.name)
            over -= entry.nbytes
    return Room(over, frozenset(names))


class Occupancy:
    """How full a store is, as one engine knows: from a list made now and then, and what it has admitted since.

    What others write between two lists, and what was admitted but is not published when the next one is
    made, comes on top: the bound holds but for what is on its way.
    """

    def __init__(self, store: Store, options: StoreOptions) -> None:
        self._store, self._options = store, options
        #: What of this engine's is there: each list shows what is gone.
        self.sightings = Sightings()
        self._lock, self._listing = threading.Lock(), threading.Lock()
        #: Takers and others' evictions make it less. ``None``: never listed.
        self._nbytes: int | None = None

    def admit(self, nbytes: int, name: str) -> bool:
        """Have room for one more entry, evicting others if need be; say whether there is. Asks the store."""
        with self._lock:
            known = self._nbytes
            if known is not None and known + nbytes <= self._options.capacity_bytes:
                self._nbytes = known + nbytes
                return True
        return self._list(nbytes, name) <= 0

    def refresh(self) -> None:
        """Look what is there, drop what is too old or too much. Asks the store."""
        self._list(0)

    def _list(self, nbytes: int, name: str = "") -> int:
        capacity = self._options.capacity_bytes
        slack = int(capacity * _SLACK)
        with self._listing:  # two that evict at a time would each make room for both
            mark = self.sightings.mark()
            over, names = make_room(self._store, self._options, nbytes, time.time(), name=name, slack=slack)
            self.sightings.listed(mark, names)
            with self._lock:
                self._nbytes = capacity + over - (nbytes if over > 0 else 0)
        return over
