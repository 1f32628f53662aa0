"""Pipes that nobody uses are closed at both ends, those that are used are not, and nobody notices."""

import threading

import pytest

from kvconnect.buffers.base import Want
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from tests.buffers.engines import engines, eventually, key, meet
from tests.buffers.faults import claimed

IDLE_S = 0.4


def load(p, d, number, blocks=(1, 2, 3)):
    claim = d.find(f"r{number}", Want(key(number), ticket=p.offer(number, (blocks,))))
    d.read(claim).wait(8)
    for theirs, ours in zip(blocks, range(10, 13), strict=True):
        assert d.block(ours).equal(p.block(theirs))


def served(p):
    return p.workers[0]._pipes.count


def held(d):
    """Return the pipe that the reading end has to its one peer."""
    return next((link.pipe for link in d.workers[0]._links._links.values()), None)


@pytest.mark.parametrize("pipe", ["inproc", "shm", "tcp", "nixl"])
def test_a_pipe_that_is_not_used_is_closed_at_both_ends_and_the_next_load_opens_another(pipe):
    with engines(pipe=pipe, pipe_idle_s=IDLE_S, connect_timeout_s=10.0, transfer_timeout_s=30.0) as (p, d):
        meet(p, d)
        eventually(lambda: not served(p) and held(d) is None)
        before = Holdings.now()
        for number in range(3):
            load(p, d, number)
            assert served(p) == 1
            eventually(lambda: not served(p) and held(d) is None)
        assert_nothing_left(before)


def test_a_pipe_that_is_used_or_whose_engine_wants_to_keep_it_stays():
    with engines(pipe_idle_s=IDLE_S) as (p, d), engines(pipe_idle_s=None) as (keeping, kept):
        load(p, d, 0)
        load(keeping, kept, 0)
        pipes = held(d), held(kept)
        for number in range(1, 31):
            threading.Event().wait(IDLE_S / 10)
            load(p, d, number)
        assert (held(d), held(kept)) == pipes


def test_a_pipe_with_a_long_load_under_way_stays_until_it_is_over(faulty):
    with engines(pipe_idle_s=IDLE_S) as (p, d):
        faulty.clogs = True
        under_way = d.read(claimed(p, d))
        eventually(lambda: faulty.started)
        threading.Event().wait(3 * IDLE_S)
        assert served(p) == 1
        assert not under_way.done
        faulty.clogs = False
        faulty.started[0].finish(None)
        under_way.wait(8)
        eventually(lambda: not served(p) and held(d) is None)


def test_loads_that_come_just_when_their_pipe_is_closed_go_over_another():
    with engines(pipe_idle_s=0.02) as (p, d):
        for number in range(150):
            load(p, d, number)
            threading.Event().wait(0.005 + number * 0.0002)
        assert d.workers[0].stats()["loads"] == 150
