"""The option ``checksum``: damaged blocks are never loaded, whatever the pipe."""

import pytest
import torch

from kvconnect import registry, sums
from kvconnect.buffers.base import Want
from kvconnect.config import Backend
from kvconnect.errors import IntegrityError, KVConnectError, LoadError
from kvconnect.pipes import flows
from kvconnect.testing.faults import Corrupt, faulty
from tests.buffers.engines import engines, eventually, key, layout

PIPES = ["tcp", "shm", "nixl", "inproc"]
BLOCKS, OURS = ((1, 2, 3),), ((10, 11, 12),)


@pytest.fixture
def damage(monkeypatch):
    """What is done to the next loads; pipes damage nothing by themselves."""
    done, real = Corrupt(times=0), registry.pipe
    monkeypatch.setattr(registry, "pipe", lambda name: faulty(real(name), done))
    return done


def claimed(p, d, number=1):
    return d.find(f"r{number}", Want(key(number), ticket=p.offer(number, BLOCKS)))


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("offset", [0, 1700, -1], ids=["first", "middle", "last"])
def test_a_pipe_that_damages_blocks_is_caught_and_the_load_fails_and_is_counted(damage, pipe, offset):
    with engines(pipe=pipe, checksum=True, lease_s=3.0) as (p, d):
        d.read(claimed(p, d)).wait(8)
        damage.times, damage.offset = 1, offset
        with pytest.raises(IntegrityError, match="not those of the owner"):
            d.read(claimed(p, d, 2)).wait(8)
        assert d.workers[0].stats()["failed_integrity"] == 1
        d.read(claimed(p, d, 3)).wait(8)
        assert d.workers[0].stats()["loads"] == 2
        for theirs, ours in zip(BLOCKS[0], OURS[0], strict=True):
            assert torch.equal(d.block(ours), p.block(theirs))
        for number in (1, 2, 3):
            d.end.settle(f"r{number}")
        freed = []
        assert eventually(lambda: freed.extend(p.end.drain_released()) or len(freed) == 3)


def test_without_the_option_nobody_is_asked(damage, monkeypatch):
    monkeypatch.setattr(sums, "of_blocks", lambda *_: pytest.fail("somebody summed up"))
    with engines(pipe="shm") as (p, d):
        damage.times = 1
        d.read(claimed(p, d)).wait(8)


def test_peers_of_other_layouts_agree_on_what_was_moved():
    both = {"pipe": Backend("tcp", {"checksum": False}), "checksum": True}
    swapped = layout(96)  # more blocks, other strides between the layers' regions
    with engines(producer={}, consumer={"shape": swapped}, **both) as (p, d):
        d.read(claimed(p, d)).wait(8)


@pytest.mark.parametrize("kind", [sums.XXH3, sums.WORDS])
def test_each_kind_of_sum_is_compared(damage, monkeypatch, kind):
    monkeypatch.setattr(sums, "kind_for", lambda *_: kind)
    with engines(pipe="shm", checksum=True) as (p, d):
        d.read(claimed(p, d)).wait(8)
        damage.times = 1
        with pytest.raises(IntegrityError):
            d.read(claimed(p, d, 2)).wait(8)


@pytest.mark.parametrize("answer", [{}, {"kind": "xxh3"}, {"kind": "md5", "sum": "00" * 8}, {"kind": 1, "sum": "00"}])
def test_what_cannot_be_checked_is_not_used(answer):
    with engines(pipe="shm", checksum=True) as (p, d):
        p.workers[0]._server.handle("pipe.sum", lambda _: answer)
        with pytest.raises((LoadError, IntegrityError)):
            d.read(claimed(p, d)).wait(8)
        assert "loads" not in d.workers[0].stats()


def test_an_owner_that_does_not_know_of_sums_fails_loads_and_no_more():
    with engines(pipe="shm", checksum=True) as (p, d):
        del p.workers[0]._server._handlers["pipe.sum"]
        for number in (1, 2):
            with pytest.raises(LoadError):
                d.read(claimed(p, d, number)).wait(8)


def test_only_who_has_a_pipe_is_told_sums_and_only_of_blocks_that_there_are():
    with engines(pipe="shm", checksum=True) as (p, d):
        d.read(claimed(p, d)).wait(8)
        at, client = p.workers[0].describe()["endpoint"], d.workers[0]._client
        pipe = next(iter(p.workers[0]._pipes._served))

        def ask(**changes):
            body = {"pipe": pipe, "groups": flows.pack([[1]]), "device": "cpu", **changes}
            return client.call(at, "pipe.sum", body, 5.0).result(8)

        assert set(ask()) == {"kind", "sum"}
        for bad in (
            {"pipe": "another"},
            {"groups": flows.pack([[64]])},
            {"groups": flows.pack([[1] * 65])},
            {"groups": [[1]]},
            {"groups": flows.pack([[1], [1]])},
            {"device": 3},
        ):
            with pytest.raises(KVConnectError):
                ask(**bad)
        assert set(ask()) == {"kind", "sum"}
