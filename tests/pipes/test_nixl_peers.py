"""What NIXL knows of other agents.

NIXL refuses a second registration of an address only where registrations have keys, which
between CPUs of one host they do not: something stands in for it here.
"""

import pytest

from kvconnect.errors import BrokenError
from kvconnect.pipes.nixl_peers import Peers


class _NotAllowedError(Exception):
    pass


class _Nixl:
    """Cards are ``name:address:key``; of an agent that is known no address takes another key."""

    def __init__(self):
        self.known = {}

    def add_remote_agent(self, card):
        name, address, key = card.decode().split(":")
        if self.known.setdefault(name, {}).setdefault(address, key) != key:
            raise _NotAllowedError("NIXL_ERR_NOT_ALLOWED")
        return name.encode()

    def remove_remote_agent(self, name):
        del self.known[name]


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
    for card in (b"there:1:a", b"there:2:b", b"there:1:a"):
        peers.meet("there", card)
    with pytest.raises(_NotAllowedError):
        peers.meet("there", b"there:1:c")
    for card in (b"there:1:a", b"there:2:b"):
        peers.leave("there", card)
        assert peers.is_met("there")
    peers.leave("there", b"there:1:a")
    assert (nixl.known, forgotten) == ({}, ["there"])
    assert not peers.is_met("there")


def test_what_is_being_read_is_not_forgotten(peers, nixl, forgotten):
    peers.meet("there", b"there:1:a")
    peers.reading("there")
    peers.leave("there", b"there:1:a")
    assert (nixl.known, forgotten) == ({"there": {"1": "a"}}, [])
    peers.read("there")
    assert (nixl.known, forgotten) == ({}, ["there"])


def test_metadata_of_another_agent_than_the_peer_says_are_refused(peers, nixl):
    with pytest.raises(BrokenError, match="somebody"):
        peers.meet("somebody", b"there:1:a")
    assert nixl.known == {}
    assert not peers.is_met("somebody")


def test_an_agent_is_its_own_peer_without_introduction(peers, nixl):
    peers.meet("here", b"here:1:a")
    assert peers.is_met("here")
    peers.leave("here", b"here:1:a")
    assert nixl.known == {}
