"""Fault pipes do what they say, over messages, over the default block path and over a pipe's own."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from kvconnect.errors import BrokenError, ClosedError, DeadlineError, EndOfPipe, LoadError
from kvconnect.pipes.base import Pipe
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.pipes.shm import ShmPipe
from kvconnect.testing.block_laws import Attached, attach
from kvconnect.testing.faults import Clog, Corrupt, Cut, Delay, Fault, faulty
from kvconnect.testing.layouts import differences, noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S, PipePair, open_pair, spawn
from tests.pipes.test_stream import ThreeMethodPipe

LATE_S = 0.3
ALL = [range(16)]


class Opened:
    """Opens pairs, and closes them in the end."""

    def __init__(self) -> None:
        self.pairs: list[PipePair] = []

    def __call__(self, pipe_class: type[Pipe], fault: Fault, timeout_s: float = 10.0) -> PipePair:
        self.pairs.append(open_pair(faulty(pipe_class, fault), timeout_s=timeout_s))
        return self.pairs[-1]

    def attached(self, pipe_class: type[Pipe], fault: Fault) -> Attached:
        layout = separate_layers(2, 16, 1, 4096)
        return attach(self(pipe_class, fault), noisy_memory(layout, 1), noisy_memory(layout, 2))


@pytest.fixture
def opened() -> Iterator[Opened]:
    made = Opened()
    yield made
    for pair in made.pairs:
        pair.close()


both = pytest.mark.parametrize("pipe_class", [InprocPipe, ShmPipe, ThreeMethodPipe], ids=lambda cls: cls.name)


def test_what_comes_before_the_fault_passes(opened: Opened) -> None:
    fault = Cut(after_bytes=2000)
    pair = opened(InprocPipe, fault)
    for _ in range(2):
        pair.here.send_tensor(torch.zeros(250))
    assert not fault.struck.is_set()
    with pytest.raises(BrokenError):
        pair.here.send_tensor(torch.zeros(1))
    assert fault.struck.is_set()
    assert isinstance(spawn(pair.there.recv_tensor).exception(LIMIT_S), (BrokenError, EndOfPipe, type(None)))


def test_a_delayed_message_is_late_and_whole(opened: Opened) -> None:
    pair = opened(InprocPipe, Delay(LATE_S))
    began = time.monotonic()
    pair.here.send_tensor(torch.ones(3))
    assert time.monotonic() - began >= LATE_S
    assert pair.there.recv_tensor().equal(torch.ones(3))


def test_a_clogged_message_ends_at_the_deadline_and_the_pipe_with_it(opened: Opened) -> None:
    pair = opened(InprocPipe, Clog(), timeout_s=LATE_S)
    with pytest.raises(DeadlineError):
        pair.here.send_tensor(torch.ones(3))
    with pytest.raises(ClosedError):
        pair.here.send_tensor(torch.ones(3))


def test_abort_wakes_a_clogged_message_and_healing_lets_it_go(opened: Opened) -> None:
    fault = Clog()
    pair = opened(InprocPipe, fault)
    stuck, aborted = pair.here, pair.another().here
    calls = [spawn(lambda pipe=pipe: pipe.send_tensor(torch.ones(3))) for pipe in (stuck, aborted)]
    assert fault.struck.wait(LIMIT_S)
    aborted.abort()
    assert isinstance(calls[1].exception(LIMIT_S), ClosedError)
    fault.heal()
    assert calls[0].exception(LIMIT_S) is None
    assert pair.there.recv_tensor().equal(torch.ones(3))


def test_a_corrupt_message_differs_in_one_bit_and_the_senders_own_does_not(opened: Opened) -> None:
    pair = opened(InprocPipe, Corrupt(offset=-1))
    mine = torch.zeros(100, dtype=torch.uint8)
    pair.here.send_tensor(mine)
    pair.here.send_tensor(mine)
    assert pair.there.recv_tensor().tolist() == [0] * 99 + [4]
    assert not pair.there.recv_tensor().any()
    assert not mine.any()


@both
def test_delayed_blocks_arrive_late(opened: Opened, pipe_class: type[Pipe]) -> None:
    ends = opened.attached(pipe_class, Delay(LATE_S))
    began = time.monotonic()
    ends.here.read_blocks(ALL, ALL).wait(LIMIT_S)
    assert time.monotonic() - began >= LATE_S
    assert not differences(ends.mine, ends.theirs)


@both
def test_clogged_blocks_end_when_they_are_cancelled(opened: Opened, pipe_class: type[Pipe]) -> None:
    ends = opened.attached(pipe_class, Clog())
    transfer = ends.here.read_blocks(ALL, ALL)
    with pytest.raises(DeadlineError):
        transfer.wait(LATE_S)
    transfer.cancel()
    with pytest.raises(LoadError):
        transfer.wait(LIMIT_S)


@both
def test_blocks_on_a_wire_that_is_cut_end_with_an_error(opened: Opened, pipe_class: type[Pipe]) -> None:
    ends = opened.attached(pipe_class, Cut())
    with pytest.raises((BrokenError, LoadError)):
        ends.here.read_blocks(ALL, ALL).wait(LIMIT_S)


@both
def test_corrupt_blocks_arrive_and_are_wrong(opened: Opened, pipe_class: type[Pipe]) -> None:
    ends = opened.attached(pipe_class, Corrupt(offset=5000))
    ends.here.read_blocks(ALL, ALL).wait(LIMIT_S)
    assert differences(ends.mine, ends.theirs)
    ends.here.read_blocks(ALL, ALL).wait(LIMIT_S)
    assert not differences(ends.mine, ends.theirs)
