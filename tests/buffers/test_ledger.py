"""The ledger under random use, and its rules one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.ledger import Ledger, digest_of

LEASE = 10.0
KEYS = [LookupKey("n", bytes([i]) * 16, 5) for i in range(3)]


def fresh():
    return Ledger(LEASE)


def offered(ledger, now=0.0, key=KEYS[0], blocks=((1, 2),), **kw):
    return ledger.insert(key, blocks, now, **kw)


def blocks_of(entries):
    return [entry.blocks for entry in entries]


def test_an_entry_goes_to_one_taker():
    ledger = fresh()
    entry = offered(ledger)
    assert ledger.claim(entry, "g1", "a", 1, 0.0)
    assert not ledger.claim(entry, "g2", "b", 1, 0.0)
    assert ledger.find(KEYS[0], None, "b") is None


def test_the_same_taker_may_join_and_the_entry_ends_with_the_last_release():
    ledger = fresh()
    entry = offered(ledger)
    assert ledger.claim(entry, "g1", "a", 2, 0.0)
    assert ledger.claim(entry, "g2", "a", 1, 0.0)
    assert ledger.release("g1", 0, entry.generation) == "ok"
    assert ledger.release("g1", 1, entry.generation) == "ok"
    assert ledger.drain() == []
    assert ledger.release("g2", 0, entry.generation) == "ok"
    assert blocks_of(ledger.drain()) == [((1, 2),)]


def test_claiming_again_under_a_known_grant_changes_nothing():
    ledger = fresh()
    entry = offered(ledger)
    assert ledger.claim(entry, "g", "a", 2, 0.0)
    ledger.release("g", 0, entry.generation)
    assert ledger.claim(entry, "g", "a", 2, 0.0)
    assert ledger.release("g", 1, entry.generation) == "ok"
    assert len(ledger.drain()) == 1


def test_an_abandoned_entry_is_offered_again_with_a_lease_of_its_own():
    ledger = fresh()
    entry = offered(ledger)
    ledger.claim(entry, "g", "a", 1, 0.0)
    ledger.abandon("g", 9.0)
    ledger.expire(18.0)
    assert ledger.claim(entry, "h", "b", 1, 18.0)
    assert ledger.release("g", 0, entry.generation) == "stale"


def test_an_entry_that_was_read_is_not_offered_again():
    ledger = fresh()
    entry = offered(ledger)
    ledger.claim(entry, "g1", "a", 1, 0.0)
    ledger.claim(entry, "g2", "a", 1, 0.0)
    ledger.release("g1", 0, entry.generation)
    ledger.abandon("g2", 0.0)
    assert [e.ended for e in ledger.drain()] == ["taken"]


def test_renewing_keeps_a_claim_and_silence_ends_it():
    ledger = fresh()
    entry = offered(ledger)
    ledger.claim(entry, "g", "a", 1, 0.0)
    assert ledger.renew("g", 9.0)
    ledger.expire(18.0)
    assert ledger.drain() == []
    ledger.expire(19.0)
    assert [e.ended for e in ledger.drain()] == ["expired"]
    assert not ledger.renew("g", 19.0)
    assert ledger.release("g", 0, entry.generation) == "stale"


def test_a_release_of_another_generation_is_stale():
    ledger = fresh()
    entry = offered(ledger)
    ledger.claim(entry, "g", "a", 1, 0.0)
    assert ledger.release("g", 0, entry.generation + 1) == "stale"


def test_what_nobody_asked_for_gives_way_oldest_first():
    ledger = fresh()
    asked = offered(ledger, blocks=((1, 2, 3),), asked=True)
    old = offered(ledger, 1.0, blocks=((4, 5),))
    claimed = offered(ledger, 2.0, blocks=((6, 7),), key=KEYS[1])
    new = offered(ledger, 3.0, blocks=((8, 9),))
    ledger.claim(claimed, "g", "a", 1, 3.0)
    assert ledger.unasked_blocks == 4
    ledger.reclaim(1)
    assert ledger.drain() == [old]
    ledger.reclaim(100)
    assert ledger.drain() == [new]
    assert ledger.unasked_blocks == 0
    assert ledger.get(asked.id) is asked
    assert ledger.busy


def test_a_label_counts_more_than_age_and_a_free_entry_more_than_a_claimed_one():
    ledger = fresh()
    first = offered(ledger)
    labelled = offered(ledger, label="x")
    assert ledger.find(KEYS[0], "x", "a") is labelled
    assert ledger.find(KEYS[0], None, "a") is first
    ledger.claim(first, "g", "a", 1, 0.0)
    assert ledger.find(KEYS[0], None, "a") is labelled
    assert ledger.find(KEYS[1], "x", "a") is None, "a label alone is no match"


def test_a_settled_grant_ends_its_entry():
    ledger = fresh()
    entry = offered(ledger)
    ledger.claim(entry, "g", "a", 2, 0.0)
    ledger.release("g", 0, entry.generation)
    ledger.settle("g")
    assert [e.ended for e in ledger.drain()] == ["settled"]
    assert not ledger.busy


def test_replacing_ends_offered_entries_only():
    ledger = fresh()
    claimed, free = offered(ledger), offered(ledger)
    ledger.claim(claimed, "g", "a", 1, 0.0)
    newest = offered(ledger, replace=True)
    assert ledger.drain() == [free]
    assert ledger.find(KEYS[0], None, "b") is newest


def test_the_digest_tells_groups_apart():
    assert digest_of(((1, 2), (3,))) != digest_of(((1,), (2, 3)))
    assert digest_of(((1, 2),)) == digest_of(((1, 2),))


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
class LedgerUse(RuleBasedStateMachine):
    """Takers and an owner do anything in any order; what must hold, holds."""

    entries = Bundle("entries")
    grants = Bundle("grants")

    def __init__(self):
        super().__init__()
        self.ledger = fresh()
        self.now = 0.0
        self.next_block = 1
        self.out = {}  # entry id → blocks, until drained
        self.ended = set()
        self.takers = {}  # entry id → taker that holds it

    @rule(
        target=entries, key=st.sampled_from(KEYS), count=st.integers(1, 4), asked=st.booleans(), replace=st.booleans()
    )
    def insert(self, key, count, asked, replace):
        blocks = (tuple(range(self.next_block, self.next_block + count)),)
        self.next_block += count
        entry = self.ledger.insert(key, blocks, self.now, asked=asked, replace=replace)
        self.out[entry.id] = blocks
        self.drain()
        return entry

    @rule(
        target=grants, entry=entries, taker=st.sampled_from("ab"), parts=st.integers(1, 3), number=st.integers(0, 9999)
    )
    def claim(self, entry, taker, parts, number):
        self.expire()
        grant = f"{taker}{number}"
        if not self.ledger.claim(entry, grant, taker, parts, self.now):
            return multiple()
        assert entry.id not in self.ended, "an entry was handed out after its end"
        assert self.takers.setdefault(entry.id, taker) == taker, "an entry was handed out twice"
        return (entry, grant, parts)

    @rule(grant=grants, part=st.integers(0, 2))
    def release(self, grant, part):
        self.expire()
        entry, name, parts = grant
        before = entry.id in self.ended
        answer = self.ledger.release(name, part % parts, entry.generation)
        if answer == "ok":
            assert not before, "ok for an entry that had ended"
        self.drain()

    @rule(grant=grants)
    def renew(self, grant):
        self.expire()
        entry, name, _ = grant
        if self.ledger.renew(name, self.now):
            assert entry.id not in self.ended

    @rule(grant=consumes(grants))
    def abandon(self, grant):
        self.expire()
        entry, name, _ = grant
        self.ledger.abandon(name, self.now)
        if entry.taker is None:
            self.takers.pop(entry.id, None)
        self.drain()

    @rule(grant=consumes(grants))
    def settle(self, grant):
        self.ledger.settle(grant[1])
        self.drain()

    @rule(seconds=st.floats(0.1, 2 * LEASE))
    def wait(self, seconds):
        self.now += seconds

    @rule(count=st.integers(0, 6))
    def reclaim(self, count):
        before, held = self.ledger.unasked_blocks, self.ledger.blocks
        assert self.ledger.reclaim(count) == held - self.ledger.blocks
        assert self.ledger.unasked_blocks <= max(0, before - min(count, before))
        self.drain()

    @rule()
    def clear(self):
        empty = self.ledger.clear()
        assert empty == (not self.ledger.claimed)
        self.drain()

    def expire(self):
        self.ledger.expire(self.now)
        self.drain()

    def drain(self):
        for entry in self.ledger.drain():
            assert self.out.pop(entry.id, None) == entry.blocks, "blocks came back twice, or others"
            self.ended.add(entry.id)

    @invariant()
    def nothing_is_lost(self):
        assert len(self.out) == len(self.ledger), "an entry ended and its blocks did not come back"

    @invariant()
    def unasked_blocks_are_counted(self):
        live = [self.ledger.get(name) for name in self.out]
        expected = sum(entry.num_blocks for entry in live if entry.taker is None and not entry.asked)
        assert self.ledger.unasked_blocks == expected

    def teardown(self):
        self.now += 3 * LEASE
        self.expire()
        assert len(self.ledger) == 0, "an entry outlived its lease"
        assert not self.ledger.busy
        assert not self.out, "blocks never came back"


TestLedgerUse = LedgerUse.TestCase
TestLedgerUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
