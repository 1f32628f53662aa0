"""A peer killed in the middle of a copy, over each pipe, between two processes with a GPU each.

What is asked of a consumer whose producer dies: every transfer ends, in time, with an error or with
the right bytes; nothing touches its blocks afterwards; its CUDA context goes on, and the next
producer serves it.

Why it can be had, pipe by pipe:

- ``cuda_ipc``: a kernel that reads memory of a dead process does not fault. The driver keeps an
  allocation for as long as any process has it mapped, so the copy runs to its end; that its owner is
  gone is seen from the process (a pidfd), and the transfer fails although its bytes came.
- ``nccl``: a send or receive without its other end spins on the device for ever. The host sees the end
  of the channel and aborts the communicator, which lets the kernel go.
- ``nixl``: UCX maps the peer's memory as ``cuda_ipc`` does. What runs, runs to its end; what waits for
  the peer's part fails with its connection.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kvconnect import registry
from kvconnect.errors import KVConnectError, UnavailableBackendError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Pipe, Transfer
from kvconnect.testing.ends import End
from kvconnect.testing.layouts import noisy_memory, random_ids, regions, separate_layers
from kvconnect.testing.peers import LIMIT_S, spawn
from kvconnect.testing.processes import ProcessPeer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(75)]

LAYERS, PIECE = 32, 32 << 10
#: Blocks of one transfer: 1 GiB in pieces of 32 KiB, keys and values of 32 layers.
COUNT = 512
#: Transfers under way at any moment, each into blocks of its own.
DEPTH = 3
#: What a pipe may wait for something that does not move, and what the end of everything may take.
TIMEOUT_S, DEADLINE_S = 2.0, 8.0
#: The other end dies at a random moment within this time, in which dozens of copies begin and end.
WITHIN_S = 0.06


#: Of the other end: when.
Death = Future[float]


@dataclass(frozen=True)
class Move:
    """A transfer of `COUNT` blocks, and which of theirs went into which of ours."""

    transfer: Transfer
    remote: list[int]
    local: list[int]


@dataclass(frozen=True)
class Consumer:
    """This process: its memory, and the other ends' to come, of which each has the same bytes."""

    mine: PagedMemory
    theirs: PagedMemory

    def right(self, move: Move) -> bool:
        """Whether every byte of a read is the one that the other end has."""
        pairs = zip(regions(self.mine), regions(self.theirs), strict=True)
        return all(torch.equal(rows(ours)[move.local], rows(other)[move.remote]) for ours, other in pairs)

    def sums(self) -> list[int]:
        """One number for each region, on the device; to compare with later."""
        return [int(region.view(torch.int64).sum()) for region in regions(self.mine)]


def rows(region: torch.Tensor) -> torch.Tensor:
    """Split a region into its blocks."""
    return region.view(-1, 2 * PIECE)


@pytest.fixture(scope="module")
def consumer() -> Consumer:
    mine = noisy_memory(layout(DEPTH * COUNT), 1, "cuda:0")
    return Consumer(mine, noisy_memory(layout(COUNT), 2, "cuda:0"))


def layout(blocks: int) -> PagedLayout:
    return separate_layers(LAYERS, blocks, 2, PIECE)


@pytest.fixture(params=["cuda_ipc", "nccl", "nixl"])
def pipe_class(request: pytest.FixtureRequest) -> type[Pipe]:
    if torch.cuda.device_count() < 2 and request.param != "cuda_ipc":
        pytest.skip("needs two CUDA devices, here is one")
    try:
        return registry.pipe(request.param)
    except UnavailableBackendError as error:
        pytest.skip(str(error))


class Producers:
    """Processes with the other ends; the next one starts while the last one works."""

    def __init__(self, pipe_class: type[Pipe]) -> None:
        self._class = pipe_class
        self._device = f"cuda:{min(1, torch.cuda.device_count() - 1)}"
        self._started = [self._start()]

    def next(self) -> ProcessPeer:
        self._started.append(self._start())
        return self._started[-2]

    def close(self) -> None:
        for peer in self._started:
            peer.close()

    def _start(self) -> ProcessPeer:
        return ProcessPeer(self._class, {}, "cuda:0", self._device)


@pytest.fixture
def producers(pipe_class: type[Pipe]) -> Iterator[Producers]:
    found = Producers(pipe_class)
    yield found
    found.close()


def test_a_peer_killed_in_the_middle_of_a_copy_harms_no_one_else(
    pipe_class: type[Pipe],
    producers: Producers,
    consumer: Consumer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    delays_s = np.random.default_rng().uniform(0, WITHIN_S, 4)
    for way, delay_s in zip((reads, reads, writes, is_read), delays_s.tolist(), strict=True):
        peer = producers.next()
        end = joined(peer, consumer)
        check_a_read(end, consumer)  # whatever became of the ones before
        found = way(end, consumer, spawn(functools.partial(killed, peer, delay_s)))
        with capsys.disabled():
            sys.stdout.write(f"\n{pipe_class.name} {way.__name__}, killed after {delay_s * 1e3:.0f} ms: {found}")
        end.pipe.abort()
    last = joined(producers.next(), consumer)
    check_a_read(last, consumer)
    last.pipe.abort()


# -- what is under way when the other end dies ---------------------------------------------


def reads(end: End, consumer: Consumer, death: Death) -> str:
    """Read 1 GiB after 1 GiB."""
    moves, refused = keep_moving(lambda number: a_read(end, number))
    return over(moves, refused, death, consumer)


def writes(end: End, _: Consumer, death: Death) -> str:
    """Write 1 GiB after 1 GiB."""

    def write(number: int) -> Move:
        remote, local = ids(number)
        return Move(end.pipe.write_blocks([local], [remote]), remote, local)

    moves, refused = keep_moving(write)
    return over(moves, refused, death, None)


def is_read(end: End, consumer: Consumer, death: Death) -> str:
    """The other end reads 1 GiB after 1 GiB from this one; then this one wants to read from it."""
    asked = [end.tell("read", remote=[ids(n)[1]], local=[ids(n)[0]]) for n in range(32)]
    for each in asked:
        assert each.exception(LIMIT_S) is None or isinstance(each.exception(), KVConnectError)
    moves, refused = keep_moving(lambda number: a_read(end, number))
    return over(moves, refused, death, consumer)


# -- parts -----------------------------------------------------------------------------------


def joined(peer: ProcessPeer, consumer: Consumer) -> End:
    """Open a pipe to the process and attach both ends."""
    end = peer.open(TIMEOUT_S)
    ours, theirs = consumer.mine.layout.to_wire(), consumer.theirs.layout
    end.tell("attach", mine=theirs.to_wire(), theirs=ours, seed=2).result(LIMIT_S)
    end.pipe.attach(consumer.mine, theirs, end.channel)
    return end


def ids(number: int) -> tuple[list[int], list[int]]:
    """Return the other end's blocks and ours for a transfer: others each time, in no order."""
    (remote,), (places,) = random_ids(number, COUNT, [COUNT]), random_ids(number + 5, COUNT, [COUNT])
    return remote, [number % DEPTH * COUNT + place for place in places]


def a_read(end: End, number: int) -> Move:
    remote, local = ids(number)
    return Move(end.pipe.read_blocks([remote], [local]), remote, local)


def check_a_read(end: End, consumer: Consumer) -> None:
    """The pipe works, and so does the context of this process."""
    move = a_read(end, 1000)
    move.transfer.wait(LIMIT_S)
    assert consumer.right(move)


def killed(peer: ProcessPeer, delay_s: float) -> float:
    """Kill the process after a while; return when."""
    threading.Event().wait(delay_s)
    at = time.monotonic()
    peer.kill()
    return at


def keep_moving(start: Callable[[int], Move]) -> tuple[list[Move], KVConnectError | None]:
    """Keep `DEPTH` transfers under way until one fails or is refused; return all of them."""
    moves: list[Move] = []
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        try:
            moves.append(start(len(moves)))
        except KVConnectError as error:
            return moves, error
        if len(moves) < DEPTH:
            continue
        oldest = moves[-DEPTH].transfer
        wait(oldest)
        if oldest.error is not None:
            return moves, None
    raise AssertionError(f"{len(moves)} transfers, and none heard that the other end is gone")


def wait(transfer: Transfer) -> None:
    """Wait for the end of a transfer, well or not."""
    ended = threading.Event()
    transfer.add_done_callback(lambda _: ended.set())
    assert ended.wait(DEADLINE_S), f"a transfer of {transfer.nbytes} bytes did not end"


def over(moves: list[Move], refused: KVConnectError | None, death: Death, consumer: Consumer | None) -> str:
    """All have ended, in time; what ended well has the right bytes; afterwards nothing moves any more."""
    for move in moves:
        wait(move.transfer)
    ended = time.monotonic()
    died = death.result(LIMIT_S)
    torch.cuda.synchronize(0)  # would raise what a kernel died of
    errors = [move.transfer.error for move in moves if move.transfer.error is not None]
    errors += [refused] if refused is not None else []
    assert errors
    if consumer is not None:
        # Blocks of an earlier transfer were written over by a later one.
        assert all(consumer.right(move) for move in moves[-DEPTH:] if move.transfer.error is None)
        before = consumer.sums()
        threading.Event().wait(0.3)
        assert consumer.sums() == before, "something wrote into the blocks of transfers that were over"
    assert ended - died < DEADLINE_S
    kinds = ", ".join(sorted({type(error).__name__ for error in errors}))
    return f"{len(moves) - len(errors) + (refused is not None)} well, all over {ended - died:.3f} s later ({kinds})"
