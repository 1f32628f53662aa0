"""What NIXL knows of other agents.

NIXL refuses a second registration of an address only where registrations have keys, which
between CPUs of one host they do not: something stands in for it here.
"""

import pytest

from kvconnect.errors import BrokenError
from kvconnect.pipes.nixl_peers import Peers
from kvconnect.pipes.nixl_place import Card, Place


class _Nixl:
    """Metadata are ``name:address:key``. An agent asked to take two keys of an address is of no use any more."""

    def __init__(self):
        self.known = {}

    def add_remote_agent(self, metadata):
        name, address, key = metadata.decode().split(":")
        if self.known.setdefault(name, {}).setdefault(address, key) != key:
            self.known[name] = dict.fromkeys(self.known[name], "spoiled")
            raise RuntimeError("NIXL_ERR_NOT_ALLOWED")
        return name.encode()

    def remove_remote_agent(self, name):
        del self.known[name]


def card(number, metadata, valid, agent="there"):
    return Card(agent, metadata, Place("DRAM", 0), number, frozenset(valid))


@pytest.fixture
def nixl():
    return _Nixl()


@pytest.fixture
def forgotten():
    return []


@pytest.fixture
def peers(nixl, forgotten):
    return Peers("here", nixl, forgotten.append)


def test_a_peer_is_known_until_the_last_pipe_that_knows_any_of_its_memory_is_closed(peers, nixl, forgotten):
    for number, metadata in ((0, b"there:1:a"), (1, b"there:2:b"), (0, b"there:1:a")):
        peers.meet(card(number, metadata, {0, 1}))
    for number in (0, 1):
        peers.leave("there", number)
        assert peers.is_met("there")
    peers.leave("there", 0)
    assert (nixl.known, forgotten) == ({}, ["there"])
    assert not peers.is_met("there")


def test_memory_registered_anew_at_an_address_is_learned_while_an_older_pipe_still_knows_the_old_one(
    peers, nixl, forgotten
):
    peers.meet(card(0, b"there:1:a", {0, 1}))
    peers.meet(card(1, b"there:2:b", {0, 1}))
    peers.meet(card(2, b"there:1:c", {1, 2}))
    assert nixl.known == {"there": {"1": "c", "2": "b"}}
    assert forgotten == ["there"], "what was prepared for the memory that is gone would be used again"
    for number in (0, 1):
        peers.leave("there", number)
    assert peers.is_met("there")
    peers.leave("there", 2)
    assert nixl.known == {}


def test_a_card_that_was_written_earlier_and_comes_later_takes_nothing_back(peers, nixl, forgotten):
    peers.meet(card(1, b"there:2:b", {0, 1}))
    peers.meet(card(0, b"there:1:a", {0}))
    assert nixl.known == {"there": {"1": "a", "2": "b"}}
    assert forgotten == []


def test_what_is_being_read_is_not_forgotten(peers, nixl, forgotten):
    peers.meet(card(0, b"there:1:a", {0}))
    peers.reading("there")
    with pytest.raises(BrokenError, match="being read"):
        peers.meet(card(1, b"there:1:c", {1}))
    peers.leave("there", 0)
    assert (nixl.known, forgotten) == ({"there": {"1": "a"}}, [])
    peers.read("there")
    assert (nixl.known, forgotten) == ({}, ["there"])


def test_metadata_of_another_agent_than_the_peer_says_are_refused(peers, nixl):
    with pytest.raises(BrokenError, match="somebody"):
        peers.meet(card(0, b"there:1:a", {0}, "somebody"))
    assert nixl.known == {}
    assert not peers.is_met("somebody")


def test_an_agent_is_its_own_peer_without_introduction(peers, nixl):
    peers.meet(card(0, b"here:1:a", {0}, "here"))
    assert peers.is_met("here")
    peers.leave("here", 0)
    assert nixl.known == {}
