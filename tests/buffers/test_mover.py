"""What the workers' ends do when pipes and peers fail."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import ClassVar

import pytest
import torch

from kvconnect import registry
from kvconnect.buffers import links, mover, serving
from kvconnect.buffers.base import Claim, Want
from kvconnect.buffers.choice import describe_pipes
from kvconnect.errors import (
    BrokenError,
    DeadlineError,
    HandshakeError,
    LoadError,
)
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Pipe, Reach, Traits
from kvconnect.pipes.inproc import InprocPipe
from tests.buffers.engines import Engine, eventually, group, key, layout
from tests.buffers.faults import claimed, engines


def test_readers_of_a_new_peer_share_one_opening(pair, faulty):
    p, d = pair
    claims = [claimed(p, d, number, ((number,),)) for number in range(1, 9)]
    transfers = [d.read(claim, local=((30 + i,),)) for i, claim in enumerate(claims)]
    for transfer in transfers:
        transfer.wait(8)
    assert faulty.opened == {"asks": 1, "serves": 1}
    for i in range(8):
        assert torch.equal(d.block(30 + i), p.block(1 + i))


def test_a_pipe_that_had_died_is_opened_anew_and_the_read_goes_on(pair, faulty):
    p, d = pair
    d.read(claimed(p, d, 1)).wait(8)
    faulty.breaks = 1
    d.read(claimed(p, d, 2), local=((20, 21, 22),)).wait(8)
    assert torch.equal(d.block(20), p.block(1))
    assert faulty.opened == {"asks": 2, "serves": 2}
    eventually(lambda: p.workers[0]._pipes.count == 1)


def test_a_pipe_that_keeps_breaking_fails_the_load_and_only_that(pair, faulty):
    p, d = pair
    faulty.breaks = 2
    with pytest.raises(LoadError, match="cut") as caught:
        d.read(claimed(p, d, 1)).wait(8)
    assert isinstance(caught.value.__cause__, BrokenError)
    assert d.workers[0].stats()["failed_broken"] == 1
    d.read(claimed(p, d, 2)).wait(8)


def test_a_clogged_transfer_ends_at_its_deadline_and_not_before_the_pipe_let_go(pair, faulty):
    p, d = pair
    faulty.clogs = True
    done = threading.Event()
    claim = claimed(p, d)
    transfer = d.workers[0].read(claim, claim.blocks, ((10, 11, 12),), lambda _: done.set())
    held = eventually(lambda: faulty.held)
    assert not transfer.done, "the engine got its blocks back while the pipe could still write to them"
    held[0].finish(LoadError("cancelled"))
    assert done.wait(8)
    with pytest.raises(DeadlineError, match=r"within 0.5 s"):
        transfer.poll()
    assert p.end.stats()["released"] == 0, "a failed load was released"


def test_a_cancelled_load_ends_once_the_pipe_let_go(pair, faulty):
    p, d = pair
    faulty.clogs = True
    transfer = d.read(claimed(p, d))
    eventually(lambda: faulty.started)
    transfer.cancel()
    held = eventually(lambda: faulty.held)
    assert not transfer.done
    held[0].finish(LoadError("cancelled"))
    eventually(lambda: transfer.done)
    with pytest.raises(LoadError):
        transfer.poll()


def test_a_read_that_hangs_while_it_starts_ends_with_its_pipe_and_those_behind_it_at_once(pair, faulty, monkeypatch):
    monkeypatch.setattr(mover, "_LET_GO_S", 1.0)
    p, d = pair
    first, second = claimed(p, d, 1), claimed(p, d, 2)
    faulty.stalls = 1
    hanging = d.read(first)
    assert faulty.stalled.wait(8)
    behind = d.read(second, local=((20, 21, 22),))
    with pytest.raises(DeadlineError):
        behind.wait(3)
    assert not hanging.done, "the engine got its blocks back while the pipe could still write to them"
    with pytest.raises(DeadlineError):
        hanging.wait(8)
    assert not d.block(20).any()
    d.read(claimed(p, d, 3)).wait(8)


@pytest.fixture
def many(faulty):
    """A consumer, and four producers that it has not met."""
    name = group()
    producers = [Engine(f"P{i}", produces=True, group=name) for i in range(4)]
    d = Engine("D", consumes=True, group=name)
    yield producers, d
    faulty.gate.set()
    d.close()
    for p in producers:
        p.close()


def test_pipes_on_which_a_read_hangs_while_it_starts_keep_no_other_pipe_waiting(many, faulty):
    producers, d = many
    for number, p in enumerate(producers[:3], 1):
        faulty.stalls = 1
        faulty.stalled.clear()
        d.read(claimed(p, d, number), local=((10 + number,),), remote=((1,),))
        assert faulty.stalled.wait(8)
        d.read(claimed(p, d, 10 + number), local=((20 + number,),), remote=((1,),))  # waits for its own pipe
    d.read(claimed(producers[3], d, 4), local=((40, 41, 42),)).wait(8)
    assert torch.equal(d.block(40), producers[3].block(1))
    assert not d.block(21).any()


def test_pipes_that_hang_while_they_are_opened_keep_no_other_from_being_opened(many, faulty):
    producers, d = many
    for number, p in enumerate(producers[:3], 1):
        faulty.opens_stall["asks"] = 1
        faulty.stalled.clear()
        d.read(claimed(p, d, number))
        assert faulty.stalled.wait(8)
    d.read(claimed(producers[3], d, 4)).wait(8)


def test_a_pipe_that_was_given_up_while_it_was_opened_keeps_the_next_one_of_its_peer_waiting_no_longer(
    faulty, monkeypatch
):
    monkeypatch.setattr(links, "RETRY_S", 0.0)
    p, d = engines(connect_timeout_s=1.5)
    faulty.attach_stalls = 1
    with pytest.raises(DeadlineError, match=r"did not answer 'pipe\.ready'"):
        d.read(claimed(p, d, 1)).wait(8)
    d.read(claimed(p, d, 2)).wait(8)
    eventually(lambda: p.workers[0]._pipes.count == 1)
    d.close()
    p.close()


def test_a_peer_whose_pipes_hang_while_they_are_opened_keeps_no_other_peer_waiting(faulty):
    name = group()
    p, d = Engine("P", produces=True, group=name), Engine("D", consumes=True, group=name)
    station, pipes = d.workers[0]._links._station, p.workers[0]._pipes
    body = {"name": "inproc", "message": {}, "hello": station.me.to_wire()}
    faulty.opens_stall["serves"] = 20
    for number in range(20):
        pipes._handle_open({**body, "pipe": f"n{number}", "worker": {**station.worker, "endpoint": "127.0.0.1:9"}})
    assert faulty.stalled.wait(8)
    faulty.opens_stall["serves"] = 0
    d.read(claimed(p, d)).wait(8)
    faulty.gate.set()
    d.close()
    p.close()


def test_a_pipe_that_was_dropped_while_it_was_opened_is_not_kept(pair, faulty):
    p, d = pair
    own = d.workers[0]._links
    join = own._join

    def slow(link, hello):
        pipe = join(link, hello)
        own._links.pop((link.at, link.incarnation))
        return pipe

    own._join = slow
    with pytest.raises(LoadError, match="while it was opened"):
        d.read(claimed(p, d, 1)).wait(8)
    assert faulty.gate.wait(8), "its pipe was not ended"
    eventually(lambda: p.workers[0]._pipes.count == 0)
    own._join = join
    d.read(claimed(p, d, 2)).wait(8)


def test_one_peer_may_open_only_so_many_pipes_and_a_malformed_request_leaves_none(pair, monkeypatch):
    monkeypatch.setattr(serving, "_MAX_PIPES_OF_ONE", 2)
    p, d = pair
    station, pipes = d.workers[0]._links._station, p.workers[0]._pipes
    good = {"name": "inproc", "message": {}, "hello": station.me.to_wire(), "worker": dict(station.worker)}
    for broken in ({"message": 5}, {"worker": {**station.worker, "endpoint": 5}}):
        with pytest.raises(HandshakeError):
            pipes._handle_open({**good, "pipe": "broken", **broken})
    assert pipes.count == 0
    for number in range(2):
        pipes._handle_open({**good, "pipe": f"n{number}"})
    with pytest.raises(HandshakeError, match="too many pipes"):
        pipes._handle_open({**good, "pipe": "n2"})
    elsewhere = {**good, "worker": {**station.worker, "endpoint": "127.0.0.1:9"}}
    pipes._handle_open({**elsewhere, "pipe": "n3"})


def test_whatever_a_third_partys_pipe_raises_is_a_load_error(pair, faulty, caplog):
    p, d = pair
    faulty.refuses = True
    with caplog.at_level(logging.WARNING), pytest.raises(LoadError, match="ValueError: a third party's fault"):
        d.read(claimed(p, d)).wait(8)


def test_a_failed_opening_is_not_repeated_for_every_request(pair, faulty):
    p, d = pair
    faulty.refuses = True
    first, second = claimed(p, d, 1), claimed(p, d, 2)
    for claim in (first, second):
        with pytest.raises(LoadError):
            d.read(claim).wait(8)
    assert faulty.opened["asks"] == 0


def test_closing_ends_loads_that_run(faulty):
    p, d = engines()
    faulty.clogs = True
    transfer = d.read(claimed(p, d))
    eventually(lambda: faulty.started)
    closing = threading.Thread(target=d.close)
    closing.start()
    eventually(lambda: faulty.held)[0].finish(LoadError("cancelled"))
    closing.join(15)
    assert transfer.done
    assert isinstance(transfer.error, LoadError)
    late = d.read(claimed_by_nobody())
    assert late.done
    p.close()


def claimed_by_nobody():
    return Claim("g", key(1), ((1,),), {"at": "127.0.0.1:1", "incarnation": "x"})


def test_counters_tell_loads_bytes_and_failures(pair):
    p, d = pair
    d.read(claimed(p, d)).wait(8)
    stats = d.workers[0].stats()
    assert stats["loads"] == 1
    assert stats["bytes"] == 3 * 3 * 512


class ThreeMethods(Pipe):
    """The least that a third party may write; the block path is the default one."""

    traits = Traits(reach=Reach.PROCESS)

    def __init__(self, spec):
        self._inner = InprocPipe(spec)

    def send_tensor(self, tensor):
        self._inner.send_tensor(tensor)

    def recv_tensor(self):
        return self._inner.recv_tensor()

    def close(self):
        self._inner.close()


def test_a_pipe_of_three_methods_carries_blocks_between_engines(monkeypatch):
    monkeypatch.setattr(registry, "pipe", lambda _: ThreeMethods)
    p, d = engines()
    for number in range(1, 4):
        local = ((20 + number, 40 + number),)
        d.read(claimed(p, d, number, ((number, number + 10),)), local=local).wait(8)
        assert torch.equal(d.block(20 + number), p.block(number))
        assert torch.equal(d.block(40 + number), p.block(number + 10))
    d.close()
    p.close()


class BreaksOnce(ThreeMethods):
    """Breaks in the middle of a transfer: at the producer, which notices first."""

    chunks_left: ClassVar[int | None]

    def send_tensor(self, tensor):
        cls = BreaksOnce
        if cls.chunks_left == 0:
            cls.chunks_left = None
            raise ConnectionResetError("cut")
        if cls.chunks_left is not None:
            cls.chunks_left -= 1
        super().send_tensor(tensor)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_load_whose_pipe_breaks_on_the_way_is_read_again_over_a_fresh_one(monkeypatch, chunks):
    monkeypatch.setattr(registry, "pipe", lambda _: BreaksOnce)
    BreaksOnce.chunks_left = chunks
    p, d = engines(shape=layout(8, 1 << 20))
    claim = claimed(p, d, blocks=((1, 2),))
    d.end.commit("r1")
    transfer = d.read(claim, local=((4, 5),))
    transfer.wait(8)
    assert BreaksOnce.chunks_left is None, "nothing broke"
    for ours, theirs in ((4, 1), (5, 2)):
        for mine, other in zip(d.memories[0].owner, p.memories[0].owner, strict=True):
            assert torch.equal(mine.view(8, -1)[ours], other.view(8, -1)[theirs])
    assert p.freed() == [((1, 2),)]
    assert d.workers[0].stats() == {**d.workers[0].stats(), "loads": 1, "bytes": transfer.nbytes}
    d.close()
    p.close()


class OwnTime(ThreeMethods):
    timeout_s = 7.0


class OwnTimeOnceOpen(ThreeMethods):
    def __init__(self, spec):
        super().__init__(spec)
        self.timeout_s = 30.0


@pytest.mark.parametrize(("cls", "expected"), [(ThreeMethods, 4.5), (OwnTime, 7.0), (OwnTimeOnceOpen, 30.0)])
def test_a_pipe_has_the_transfers_time_limit_unless_it_sets_its_own(monkeypatch, cls, expected):
    opened = []
    real = cls.attach
    monkeypatch.setattr(cls, "attach", lambda pipe, *args: (opened.append(pipe), real(pipe, *args))[1])
    monkeypatch.setattr(registry, "pipe", lambda _: cls)
    p, d = engines(transfer_timeout_s=4.5)
    d.read(claimed(p, d)).wait(8)
    assert [pipe.timeout_s for pipe in opened] == [expected, expected]
    assert [pipe._stream._timeout_s for pipe in opened] == [expected, expected]
    d.close()
    p.close()


# -- a producer that is killed --------------------------------------------------------------


def produce(connection, name, pipe, chosen):
    p = Engine("P", produces=True, pipe=pipe, group=name)
    connection.send([p.offer(number, ((number, number + 1),)) for number in range(1, 9)])
    connection.send(chosen)
    connection.recv()


@pytest.mark.parametrize("pipe", ["tcp", "shm"])
def test_a_killed_producer_fails_loads_and_later_lookups_in_time(pipe):
    if pipe not in describe_pipes("auto", PagedMemory(PagedLayout((), ()), []))["pipes"]:
        pytest.skip(f"{pipe} is not available")
    name = group()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=produce, args=(theirs, name, pipe, 0), daemon=True)
    process.start()
    theirs.close()
    d = Engine("D", consumes=True, pipe=pipe, group=name)
    assert ours.poll(50)
    tickets = ours.recv()
    d.read(d.find("warm", Want(key(1), ticket=tickets[0]))).wait(10)
    claim = d.find("r", Want(key(2), ticket=tickets[1]))
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    with pytest.raises(LoadError):
        d.read(claim).wait(10)
    d.end.settle("r")
    answer = d.find("late", Want(key(3), ticket=tickets[2]))
    assert getattr(answer, "cause", "claim") in ("unreachable", "claim")
    d.close()


def consume(connection, name, ticket):
    d = Engine("D", consumes=True, pipe="tcp", group=name)
    d.read(d.find("r", Want(key(1), ticket=ticket))).wait(20)
    connection.send("done")
    connection.recv()


def test_a_killed_consumer_leaves_no_pipe_at_the_producer():
    name = group()
    p = Engine("P", produces=True, pipe="tcp", group=name, lease_s=0.5)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=consume, args=(theirs, name, offer_for_long(p)))
    process.start()
    assert ours.poll(50)
    assert p.workers[0]._pipes.count == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    eventually(lambda: p.workers[0]._pipes.count == 0)
    p.close()


def offer_for_long(p):
    """Return a ticket whose entry outlives the start of a process, whatever the engine's lease."""
    p.end._lender._ledger.lease_s = 60.0
    return p.offer()


def test_a_consumer_that_closes_ends_its_pipe_at_the_producer(pair):
    p, d = pair
    d.read(claimed(p, d)).wait(8)
    assert p.workers[0]._pipes.count == 1
    d.close()
    eventually(lambda: p.workers[0]._pipes.count == 0, 3)


def test_a_hello_waits_until_the_workers_are_known():
    name = group()
    p, d = Engine("P", produces=True, group=name, introduce=False), Engine("D", consumes=True, group=name)
    d.end.look("r", Want(key(1), ticket=p.offer()))
    later = time.monotonic() + 0.3
    eventually(lambda: time.monotonic() > later)
    assert d.end.found("r") is None
    p.end.introduce([worker.describe() for worker in p.workers])
    claim = d.answer("r")
    d.read(claim).wait(8)
    d.close()
    p.close()


# -- choosing -----------------------------------------------------------------------------------
