"""Each law catches a buffer that breaks its clause – and a buffer of three methods satisfies what it can."""

import threading

import pytest
import torch

from kvconnect.buffers.base import BufferTraits, LookupBuffer, LookupKey
from kvconnect.buffers.memory import MemoryBuffer
from kvconnect.errors import ClosedError, KVConnectError
from kvconnect.testing import buffer_laws
from kvconnect.testing.buffer_laws import ABSENT, LAWS, ROOM_BYTES, Ends
from kvconnect.testing.buffer_tests import BufferTests


class HandsItToItsTakerAgain(MemoryBuffer):
    """The thread that took an entry of one tensor takes it for ever."""

    def __init__(self, *args):
        super().__init__(*args)
        self.taken = threading.local()

    def drop_select(self, key):
        found = super().drop_select(key)
        if found is not None and len(found) == 1:
            self.taken.key, self.taken.kv = key, found
        return self.taken.kv if getattr(self.taken, "key", None) == key else found


class LooksAndThenTakes(MemoryBuffer):
    def drop_select(self, key):
        with self._changed:
            entry = self._find(key, "me")
            found = None if entry is None else self._held[entry.id]
        threading.Event().wait(0.005)
        super().drop_select(key)
        return found


class TakesAllForOne(MemoryBuffer):
    def claim(self, key, taker):
        return super().claim(key, "everyone")


class RaisesForUnknownKeys(MemoryBuffer):
    def __init__(self, *args):
        super().__init__(*args)
        self.known = set()

    def insert(self, key, kv):
        super().insert(key, kv)
        self.known.add(key)

    def drop_select(self, key):
        found = super().drop_select(key)
        if key not in self.known:
            raise KVConnectError("never heard of it")
        return found


class IgnoresLength(MemoryBuffer):
    def insert(self, key, kv):
        super().insert(LookupKey(key.namespace, key.digest, 0), kv)

    def _find(self, key, taker):
        return super()._find(LookupKey(key.namespace, key.digest, 0), taker)


class KeepsTheCallersTensors(MemoryBuffer):
    def insert(self, key, kv):
        with self._changed:
            super().insert(key, kv)
            self._held[self._ledger.find(key, None, "").id] = list(kv)


class LendsItsOwnTensors(MemoryBuffer):
    def _read(self, entry):
        return self._held.get(entry.id) or super()._read(entry)


class KeepsReplacedEntries(MemoryBuffer):
    def insert(self, key, kv):
        insert = self._ledger.insert
        self._ledger.insert = lambda *args, **kw: insert(*args, **{**kw, "replace": False})
        super().insert(key, kv)
        self._ledger.insert = insert


class EvictsWhereItShouldRaise(MemoryBuffer):
    def _make_room(self, key, size):
        if self._policy == "raise":
            self._policy = "evict"
        super()._make_room(key, size)


class EvictsTheNewest(MemoryBuffer):
    def _make_room(self, key, size):
        while self._policy == "evict" and self._used + size > self._capacity >= size:
            *_, newest = self._ledger._offered()
            self._ledger._end(newest, "evicted")
            self._collect()
        super()._make_room(key, size)


class DoesNotSayThatThereIsRoom(MemoryBuffer):
    """Who waits for room finds it when something expires, and not when something is taken."""

    def _collect(self):
        notify, self._changed.notify_all = self._changed.notify_all, lambda: None
        super()._collect()
        self._changed.notify_all = notify


class WaitsTooLong(MemoryBuffer):
    def __init__(self, capacity, policy, ttl_s, wait_s):
        super().__init__(capacity, policy, ttl_s, wait_s + 3.0)


class EvictsWhatIsTooLarge(MemoryBuffer):
    def _make_room(self, key, size):
        if size > self._capacity:
            self._ledger.clear()
        super()._make_room(key, size)


class LetsExpiredOnesBeTaken(MemoryBuffer):
    """They go when their room is needed."""

    def _find(self, key, taker):
        self._check_open()
        return self._ledger.find(key, None, taker)


class ForgetsGrants(MemoryBuffer):
    def claim(self, key, taker):
        grant = super().claim(key, taker)
        if grant is not None:
            entry = self._ledger.get(grant._entry.id)
            entry.shares[grant._grant].expires = self._clock() + self._ledger.lease_s
            self._ledger.next_expiry = 0.0
        return grant

    def _read(self, entry):
        with self._changed:
            self._collect()
        return super()._read(entry)


class KeepsTheRoomOfTheExpired(MemoryBuffer):
    """Hides what is too old, and frees it never."""

    def __init__(self, capacity, policy, ttl_s, wait_s):
        super().__init__(capacity, policy, 1e9, min(wait_s, 1.5))
        self.until, self.age = {}, ttl_s

    def insert(self, key, kv):
        super().insert(key, kv)
        self.until[key] = self._clock() + self.age

    def _find(self, key, taker):
        return None if self._clock() > self.until.get(key, 0.0) else super()._find(key, taker)


class LetsNobodyJoin(MemoryBuffer):
    def claim(self, key, taker):
        return super().claim(key, object())


class HalvesWhatIsGone(MemoryBuffer):
    """Grants go on with what is left after the end."""

    def close(self):
        self._kept = {number: held[:1] for number, held in self._held.items()}
        super().close()

    def _read(self, entry):
        return self._kept[entry.id] if self._closed else super()._read(entry)


class ReleasesWhatIsGone(MemoryBuffer):
    def _release(self, entry, grant):
        if not self._closed:
            super()._release(entry, grant)


class DoesNotSayThatItIsBounded(MemoryBuffer):
    traits = BufferTraits(expires=True, joins=True)


class DoesNotSayThatEntriesExpire(MemoryBuffer):
    traits = BufferTraits(bounded=True, joins=True)


class DoesNotSayThatTakersJoin(MemoryBuffer):
    traits = BufferTraits(bounded=True, expires=True)


class Rounds(MemoryBuffer):
    def insert(self, key, kv):
        super().insert(key, [t.float().to(t.dtype) if t.dtype is torch.float64 else t for t in kv])


class DropsStrides(MemoryBuffer):
    def insert(self, key, kv):
        super().insert(key, [t.reshape(-1) for t in kv])


class ClosesSilently(MemoryBuffer):
    def close(self):
        self._closed = True


class MatchesAfterItsClose(MemoryBuffer):
    def match(self, keys):
        return 0 if self._closed else super().match(keys)


class LosesWhatIsAbandoned(MemoryBuffer):
    def _abandon(self, grant):
        with self._changed:
            self._ledger.settle(grant)
            self._collect()


class ReplacesPieceByPiece(MemoryBuffer):
    def insert(self, key, kv):
        with self._changed:
            held = [self._held[entry.id] for entry in self._ledger.offered_under(key)]
        if not held or len(held[0]) != len(kv):
            super().insert(key, kv)
            return
        for at, piece in enumerate(kv):
            held[0][at] = piece.clone()
            threading.Event().wait(0.001)


class MatchesByTaking(MemoryBuffer):
    def match(self, keys):
        return sum(self.drop_select(key) is not None for key in keys[:2])


class GivesBackAfterTheRelease(MemoryBuffer):
    def claim(self, key, taker):
        grant = super().claim(key, taker)
        if grant is not None:
            kept = grant.tensors()
            grant.abandon = lambda: self.insert(key, kept)
        return grant


BROKEN = [
    (HandsItToItsTakerAgain, "an_entry_is_taken_once"),
    (LooksAndThenTakes, "racing_takers_share_nothing"),
    (RaisesForUnknownKeys, "a_miss_is_a_value"),
    (IgnoresLength, "a_miss_is_a_value"),
    (KeepsTheCallersTensors, "tensors_are_the_callers_again_after_an_insert"),
    (LendsItsOwnTensors, "what_a_grant_reads_is_the_takers_own"),
    (KeepsReplacedEntries, "inserting_a_key_again_replaces_the_entry"),
    (EvictsWhereItShouldRaise, "a_full_buffer_raises_if_told_to"),
    (EvictsTheNewest, "a_full_buffer_evicts_the_oldest_if_told_to"),
    (DoesNotSayThatThereIsRoom, "a_full_buffer_waits_for_takers_if_told_to"),
    (EvictsWhatIsTooLarge, "what_never_fits_is_refused_at_once"),
    (LetsExpiredOnesBeTaken, "entries_expire"),
    (ForgetsGrants, "a_live_grant_keeps_its_entry"),
    (Rounds, "shapes_dtypes_and_values_survive"),
    (DropsStrides, "shapes_dtypes_and_values_survive"),
    (ClosesSilently, "close_wakes_who_waits_for_room"),
    (MatchesAfterItsClose, "after_close_everything_says_so"),
    (LosesWhatIsAbandoned, "an_abandoned_entry_is_offered_again_whole"),
    (HalvesWhatIsGone, "an_entry_that_is_gone_is_reported_never_halved"),
    (ReleasesWhatIsGone, "an_entry_that_is_gone_is_reported_never_halved"),
    (KeepsTheRoomOfTheExpired, "what_has_expired_makes_room"),
    (LetsNobodyJoin, "a_taker_may_claim_its_entry_again"),
    (DoesNotSayThatItIsBounded, "what_is_not_bounded_holds_everything"),
    (DoesNotSayThatEntriesExpire, "what_does_not_expire_stays"),
    (DoesNotSayThatTakersJoin, "what_cannot_be_joined_is_claimed_once"),
    (TakesAllForOne, "a_claimed_entry_is_nobody_elses"),
    (WaitsTooLong, "waiting_for_room_has_an_end"),
    (ReplacesPieceByPiece, "a_taker_sees_one_entry_or_the_other_whole"),
    (MatchesByTaking, "matching_takes_nothing"),
    (GivesBackAfterTheRelease, "a_grant_ends_once"),
]


@pytest.mark.parametrize(("broken", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_the_law_catches(broken, name, monkeypatch):
    hurry(monkeypatch)
    # What a buffer breaks by a race shows sooner or later, not every time.
    assert any(catches(getattr(buffer_laws, name), broken) for _ in range(5))


def hurry(monkeypatch):
    """Have laws wait for less long."""
    monkeypatch.setattr(buffer_laws, "LIMIT_S", 1.0)


def catches(law, broken):
    """Try a law once: it fails by its own assertion, by the buffer's error or by a wait that ran out."""
    opened = []

    def open_(*, policy="wait", ttl_s=600.0, wait_s=4.0):
        opened.append(broken(ROOM_BYTES, policy, ttl_s, wait_s))
        return Ends(opened[-1], opened[-1])

    try:
        law(open_)
    except (AssertionError, KVConnectError, TimeoutError):
        return True
    finally:
        for buffer in opened:
            MemoryBuffer.close(buffer)
    return False


class ThreeMethods(LookupBuffer):
    """The least that a third party may write."""

    def __init__(self):
        self.rows, self.closed = {}, False

    def insert(self, key, kv):
        self._check()
        self.rows[key] = [t.clone() for t in kv]

    def drop_select(self, key):
        self._check()
        return self.rows.pop(key, None)

    def close(self):
        self.closed = True

    def _check(self):
        if self.closed:
            raise ClosedError("closed")


class TestThreeMethods(BufferTests):
    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = ThreeMethods()
        return Ends(buffer, buffer)


def test_every_law_is_caught_breaking_by_some_buffer():
    assert {law.__name__ for law in (*LAWS, *ABSENT.values())} == {name for _, name in BROKEN}
