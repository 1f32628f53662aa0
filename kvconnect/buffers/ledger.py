"""Who may have which entry, as pure bookkeeping: no lock, no I/O, and the clock is an argument.

An entry is *offered*, then *claimed* by one taker, then it *ends*. Within one
taker several grants may share the entry (the children of one ``n > 1`` request);
it ends when every part of every grant was released. Whatever way an entry ends,
it appears exactly once in `Ledger.drain`, and from then on every release of it
is answered ``"stale"``: that answer is what keeps a slow reader from using
blocks that were meanwhile reused.
"""

from __future__ import annotations

import collections
import hashlib
import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from kvconnect.buffers.base import LookupKey

Blocks = tuple[tuple[int, ...], ...]
Answer = Literal["ok", "stale"]
Cause = Literal["taken", "expired", "reclaimed", "replaced", "evicted", "settled", "cleared"]


def digest_of(blocks: Blocks) -> str:
    """Return a short digest of block ids: a reader proves with it what it has read."""
    hasher = hashlib.blake2b(digest_size=8)
    for ids in blocks:
        hasher.update(struct.pack(f"<q{len(ids)}q", len(ids), *ids))
    return hasher.hexdigest()


@dataclass(slots=True)
class Share:
    """One grant's share in an entry: which of its parts are still being read, and until when."""

    missing: set[int]
    expires: float


@dataclass(slots=True, eq=False)
class Entry:
    """KV under a key, and who has it. ``taker`` is ``None`` while the entry is offered."""

    id: str
    key: LookupKey
    label: str | None
    blocks: Blocks
    generation: int
    asked: bool
    expires: float
    taker: str | None = None
    shares: dict[str, Share] = field(default_factory=dict)
    #: Whether some grant has released all its parts, so that nobody else may have the entry.
    read: bool = False
    ended: Cause | None = None
    _digest: str = ""

    @property
    def digest(self) -> str:
        """Of its blocks (`digest_of`)."""
        self._digest = self._digest or digest_of(self.blocks)
        return self._digest

    @property
    def num_blocks(self) -> int:
        """Blocks held, over all groups."""
        return sum(map(len, self.blocks))


class Ledger:
    """All entries of one owner. Times are seconds of any one clock."""

    def __init__(self, lease_s: float) -> None:
        """Give entries, and claims that are not renewed, ``lease_s`` seconds."""
        self.lease_s = lease_s
        self.unasked_blocks = 0
        #: Blocks of all entries; one that is in two of them counts twice.
        self.blocks = 0
        self._entries: collections.OrderedDict[str, Entry] = collections.OrderedDict()
        self._by_key: dict[LookupKey, dict[str, Entry]] = {}
        self._grants: dict[str, Entry] = {}
        self._ended: list[Entry] = []
        self._generation = 0
        self._asked = 0
        #: Nothing expires before this time.
        self.next_expiry = float("inf")

    def __len__(self) -> int:
        """Count live entries."""
        return len(self._entries)

    @property
    def busy(self) -> bool:
        """Whether an entry is out that was asked for, or claimed."""
        return self._asked > 0 or bool(self._grants)

    @property
    def claimed(self) -> bool:
        """Whether any entry is claimed."""
        return bool(self._grants)

    # -- the owner --------------------------------------------------------------

    def insert(
        self,
        key: LookupKey,
        blocks: Blocks,
        now: float,
        *,
        label: str | None = None,
        asked: bool = False,
        replace: bool = False,
    ) -> Entry:
        """Offer an entry; with ``replace``, end what is offered under the same key."""
        if replace:
            for other in self.offered_under(key):
                self._end(other, "replaced")
        self._generation += 1
        entry = Entry(secrets.token_hex(8), key, label, blocks, self._generation, asked, now + self.lease_s)
        self._entries[entry.id] = entry
        self._by_key.setdefault(key, {})[entry.id] = entry
        self._asked += asked
        self.blocks += entry.num_blocks
        self._count_unasked(entry, +1)
        self.next_expiry = min(self.next_expiry, entry.expires)
        return entry

    def expire(self, now: float) -> None:
        """Drop grants that were not renewed; end entries whose time is up."""
        if now < self.next_expiry:
            return
        for entry in list(self._entries.values()):
            if entry.taker is None:
                if entry.expires <= now:
                    self._end(entry, "expired")
                continue
            late = [grant for grant, share in entry.shares.items() if share.missing and share.expires <= now]
            if late:
                self._drop(entry, late, "expired")
        self.next_expiry = min(map(_expiry, self._entries.values()), default=float("inf"))

    def reclaim(self, num_blocks: int, since: float = float("-inf")) -> int:
        """End offered entries, oldest first, until they held ``num_blocks``; return how many they held.

        First those nobody asked for, then those that have been offered since ``since`` or longer.
        """
        old = since + self.lease_s
        ending = [*self._offered(lambda e: not e.asked), *self._offered(lambda e: e.asked and e.expires <= old)]
        freed = 0
        for entry in ending:
            if freed >= num_blocks:
                break
            freed += entry.num_blocks
            self._end(entry, "reclaimed")
        return freed

    def evict(self) -> bool:
        """End the oldest offered entry, asked for or not; ``False`` if there is none."""
        oldest = next(self._offered(), None)
        if oldest is not None:
            self._end(oldest, "evicted")
        return oldest is not None

    def clear(self) -> bool:
        """End all offered entries; ``False`` if claimed ones remain."""
        for entry in self._offered():
            self._end(entry, "cleared")
        return not self._entries

    def drain(self) -> list[Entry]:
        """Return the entries that ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        return ended

    def offered_under(self, key: LookupKey) -> list[Entry]:
        """Return what an insert with ``replace`` would end."""
        return [entry for entry in self._by_key.get(key, {}).values() if entry.taker is None]

    # -- takers -----------------------------------------------------------------

    def get(self, entry_id: str) -> Entry | None:
        """Return the live entry of this id."""
        return self._entries.get(entry_id)

    def find(self, key: LookupKey, label: str | None, taker: str) -> Entry | None:
        """Return the entry under ``key`` that ``taker`` may claim.

        The same label counts more than none, offered more than claimed (by the
        same taker, that is), older more than newer.
        """
        best: Entry | None = None
        best_rank = (-1, -1)
        for entry in self._by_key.get(key, {}).values():
            rank = (int(label is not None and entry.label == label), int(entry.taker is None))
            if self._open_to(entry, taker) and rank > best_rank:
                best, best_rank = entry, rank
        return best

    def claim(self, entry: Entry, grant: str, taker: str, parts: int, now: float, lease_s: float | None = None) -> bool:
        """Give ``taker`` the entry, of which it will release ``parts`` parts under ``grant``.

        Claiming again under a known grant renews it. ``False``: the entry is not
        to be had (any more).
        """
        known = self._grants.get(grant)
        if known is not None or entry.ended or not self._open_to(entry, taker):
            return known is entry and not entry.ended and self._extend(known, grant, now)
        if entry.taker is None:
            self._count_unasked(entry, -1)
            entry.taker = taker
        expires = now + (self.lease_s if lease_s is None else lease_s)
        entry.shares[grant] = Share(set(range(parts)), expires)
        self._grants[grant] = entry
        self.next_expiry = min(self.next_expiry, expires)
        return True

    def renew(self, grant: str, now: float) -> bool:
        """Give a grant another lease; ``False`` if it is gone."""
        entry = self._grants.get(grant)
        return entry is not None and self._extend(entry, grant, now)

    def release(self, grant: str, part: int, generation: int) -> Answer:
        """Take note that ``part`` has been read, and say whether its blocks were vouched for till now."""
        entry = self._grants.get(grant)
        if entry is None or entry.generation != generation:
            return "stale"
        share = entry.shares[grant]
        share.missing.discard(part)
        if not share.missing:
            entry.read = True
            if not any(other.missing for other in entry.shares.values()):
                self._end(entry, "taken")
        return "ok"

    def abandon(self, grant: str, now: float) -> None:
        """Give a grant back: unless others share or have read the entry, it is offered again."""
        entry = self._grants.get(grant)
        if entry is None or not entry.shares[grant].missing:
            return
        if entry.read or len(entry.shares) > 1:
            self._drop(entry, [grant], "taken")
            return
        del entry.shares[grant], self._grants[grant]
        entry.taker, entry.expires = None, now + self.lease_s
        self._count_unasked(entry, +1)
        self.next_expiry = min(self.next_expiry, entry.expires)

    def settle(self, grant: str) -> None:
        """The taker is done with a grant, whatever it released: it needs nothing any more."""
        entry = self._grants.get(grant)
        if entry is not None and entry.shares[grant].missing:
            self._drop(entry, [grant], "settled")

    # -- inside -----------------------------------------------------------------

    def _open_to(self, entry: Entry, taker: str) -> bool:
        return entry.taker is None or entry.taker == taker

    def _offered(self, accept: Callable[[Entry], bool] = lambda _: True) -> Iterator[Entry]:
        return (entry for entry in list(self._entries.values()) if entry.taker is None and accept(entry))

    def _extend(self, entry: Entry, grant: str, now: float) -> bool:
        entry.shares[grant].expires = max(entry.shares[grant].expires, now + self.lease_s)
        return True

    def _drop(self, entry: Entry, grants: list[str], cause: Cause) -> None:
        """Take grants out; the entry ends with the last one that is still reading."""
        for grant in grants:
            del entry.shares[grant], self._grants[grant]
        if not any(share.missing for share in entry.shares.values()):
            self._end(entry, "taken" if entry.read else cause)

    def _end(self, entry: Entry, cause: Cause) -> None:
        del self._entries[entry.id]
        same = self._by_key[entry.key]
        del same[entry.id]
        if not same:
            del self._by_key[entry.key]
        for grant in entry.shares:
            del self._grants[grant]
        if entry.taker is None:
            self._count_unasked(entry, -1)
        self._asked -= entry.asked
        self.blocks -= entry.num_blocks
        entry.ended = cause
        self._ended.append(entry)

    def _count_unasked(self, entry: Entry, sign: int) -> None:
        if not entry.asked:
            self.unasked_blocks += sign * entry.num_blocks


def _expiry(entry: Entry) -> float:
    if entry.taker is None:
        return entry.expires
    return min(share.expires for share in entry.shares.values() if share.missing)
