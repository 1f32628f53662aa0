"""What an engine knows of its entries in a store: told in time, once, and never wrongly of what came meanwhile."""

from kvconnect.buffers.store_sightings import Sightings


def test_each_change_is_told_once():
    seen = Sightings()
    for note in ("first", "again"):
        seen.seen("a", note, 10)
    assert seen.drain() == [("first", True)]
    for _ in range(2):
        seen.listed(seen.mark(), {"b"})
    assert seen.drain() == [("first", False)]
    seen.seen("a", "back", 10)
    seen.listed(seen.mark(), {"a"})
    assert seen.drain() == [("back", True)]


def test_what_came_while_a_list_was_made_need_not_be_in_it():
    seen = Sightings()
    seen.seen("old", "old", 10)
    mark = seen.mark()
    seen.seen("new", "new", 10)
    seen.seen("old", "not told", 10)  # it was gone, and was stored again
    seen.listed(mark, set())
    assert seen.drain() == [("old", True), ("new", True)]
    seen.listed(seen.mark(), {"new"})
    assert seen.drain() == [("old", False)]


def test_of_more_than_is_remembered_the_longest_unseen_is_told_of_as_gone():
    seen = Sightings(max_tokens=100)
    for name in "abc":
        seen.seen(name, name, 40)
        seen.seen("a", "not told", 40)
    assert seen.drain() == [("a", True), ("b", True), ("c", True), ("b", False)]
    seen.seen("huge", "huge", 1000)
    assert seen.drain() == [("huge", True), ("c", False), ("a", False)]
    seen.clear()
    assert seen.drain() == [("huge", False)]
    assert (seen._tokens, len(seen._there)) == (0, 0)


def test_an_idle_engine_steps_on_for_news_and_not_for_ever(monkeypatch):
    now = 100.0
    monkeypatch.setattr("kvconnect.buffers.store_sightings.time.monotonic", lambda: now)
    seen = Sightings()
    assert not seen.due
    seen.expect()
    assert seen.due
    seen.expect(-1)
    assert not seen.due
    seen.seen("a", "a", 1)
    assert seen.due
    seen.drain()
    assert not seen.due
    seen.expect()
    now += 60.0
    assert not seen.due, "the store hangs"
