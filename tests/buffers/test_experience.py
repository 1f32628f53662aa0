"""What is remembered of pipes."""

import math
from types import SimpleNamespace

import pytest

from kvconnect.buffers import experience
from kvconnect.buffers.choice import Candidate
from kvconnect.buffers.experience import Experience
from kvconnect.pipes.base import Reach, Traits
from kvconnect.pipes.inproc import InprocPipe


def candidate(name, reach=Reach.NETWORK):
    return Candidate(name, type("Stub", (InprocPipe,), {"traits": Traits(reach=reach)}))


CANDIDATES = [candidate("shm", Reach.HOST), candidate("nixl"), candidate("tcp")]


def order(known, at="10.0.0.1:1", incarnation="i"):
    return [found.name for found in known.rank(at, incarnation, CANDIDATES)]


def test_of_equally_near_pipes_the_fastest_comes_first_for_every_engine_of_the_host():
    known = Experience()
    assert order(known) == ["shm", "nixl", "tcp"]
    known.measure("10.0.0.1:1", {"nixl": 1e9, "tcp": 2e9, "shm": 1e8})
    assert order(known, "10.0.0.1:2") == ["shm", "tcp", "nixl"]
    assert order(known, "10.0.0.2:1") == ["shm", "nixl", "tcp"]


def test_a_pipe_that_failed_is_the_last_for_that_incarnation_and_for_a_while():
    now = [100.0]
    known = Experience(SimpleNamespace(now=lambda: now[0]))
    known.fail("10.0.0.1:1", "i", "shm", "cut")
    assert order(known) == ["nixl", "tcp", "shm"]
    assert known.failure("10.0.0.1:1", "i", "shm") == "cut"
    assert order(known, incarnation="another") == ["shm", "nixl", "tcp"]
    now[0] += experience._PASSED_OVER_S + 1
    assert order(known) == ["shm", "nixl", "tcp"]
    now[0] += experience._PASSED_OVER_S
    known.fail("10.0.0.2:1", "i", "shm", "cut")
    assert len(known._failures) == 1, "failures that are over take memory"


def test_a_pipe_that_fails_again_and_again_is_passed_over_for_longer_and_longer():
    now = [100.0]
    known = Experience(SimpleNamespace(now=lambda: now[0]))
    lasted = []
    for _ in range(8):
        known.fail("10.0.0.1:1", "i", "shm", "cut")
        known.fail("10.0.0.1:1", "i", "shm", "cut")  # two loads tell of the same failure
        lasted.append(known.holds_until("10.0.0.1:1", "i") - now[0])
        now[0] += lasted[-1]
        assert known.failure("10.0.0.1:1", "i", "shm") is None
    assert lasted == [60.0, 120.0, 240.0, 480.0, 960.0, 1800.0, 1800.0, 1800.0]


def test_a_measurement_is_not_believed_for_ever_but_better_than_none():
    now = [100.0]
    known = Experience(SimpleNamespace(now=lambda: now[0]))
    known.measure("a:1", {"tcp": 3e9, "nixl": 1e9})
    assert known.holds_until("a:2", "i") == 100.0 + experience._BELIEVED_S
    now[0] += experience._BELIEVED_S
    assert known.rates("a:1") == {}
    assert order(known, "a:1") == ["shm", "tcp", "nixl"]
    assert known.holds_until("a:1", "i") == math.inf


def test_the_hosts_measured_first_are_forgotten_first(monkeypatch):
    monkeypatch.setattr(experience, "_MAX_PEERS", 2)
    known = Experience()
    for host in ("a", "b", "a", "c"):
        known.measure(f"{host}:1", {"tcp": 1e9})
    assert [bool(known.rates(f"{host}:1")) for host in "abc"] == [True, False, True]


@pytest.mark.parametrize("rates", [{"tcp": 3e9}, {"tcp": 3e9, "nixl": 1e9}])
def test_a_later_measurement_replaces_an_earlier_one_pipe_by_pipe(rates):
    known = Experience()
    known.measure("a:1", {"tcp": 1e9, "nixl": 1e9})
    known.measure("a:2", rates)
    assert known.rates("a:3") == {"tcp": 3e9, "nixl": 1e9}
