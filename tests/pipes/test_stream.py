"""A pipe with nothing but the three methods gets a working block path."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kvconnect.errors import BrokenError, BusyError, DeadlineError, HandshakeError, KVConnectError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes import chunks as chunks_module
from kvconnect.pipes import stream as stream_module
from kvconnect.pipes.base import Pipe, PipeSpec, Reach, Traits
from kvconnect.pipes.chunks import Threads
from kvconnect.pipes.flows import TAG_BYTES, Kind, pack, read_tag, unpack, write_tag
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.pipes.stream import BlockStream
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.pipes.turns import CHUNK_BYTES
from kvconnect.testing.block_laws import attach
from kvconnect.testing.layouts import noisy_memory, regions, separate_layers
from kvconnect.testing.peers import LIMIT_S, PipePair, open_pair
from kvconnect.testing.pipe_tests import PipeTests

BLOCK = 1 << 16


class ThreeMethodPipe(Pipe):
    """What a third party writes: a constructor and three methods."""

    name = "three"
    traits = Traits(reach=Reach.PROCESS)
    wire_class: ClassVar[type[Pipe]] = InprocPipe

    def __init__(self, spec: PipeSpec) -> None:
        self._wire = self.wire_class.open(spec)

    def send_tensor(self, tensor: Tensor | None) -> None:
        self._wire.send_tensor(tensor)

    def recv_tensor(self) -> Tensor | None:
        return self._wire.recv_tensor()

    def close(self) -> None:
        self._wire.close()


class ThreeMethodTcpPipe(ThreeMethodPipe):
    name = "three-tcp"
    traits = Traits()
    wire_class = TcpPipe

    def abort(self) -> None:
        self._wire.abort()


class RendezvousPipe(ThreeMethodPipe):
    """A send that waits until the other end has received: nothing is buffered at all."""

    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec)
        self._taken = threading.Semaphore(0)

    @classmethod
    def join(cls, pair: PipePair) -> None:
        """Tell the two ends of each other."""
        pair.here._other, pair.there._other = pair.there, pair.here

    def send_tensor(self, tensor: Tensor | None) -> None:
        super().send_tensor(tensor)
        if not self._taken.acquire(timeout=LIMIT_S):
            raise DeadlineError("nobody received")

    def recv_tensor(self) -> Tensor | None:
        got = super().recv_tensor()
        self._other._taken.release()
        return got


class TestThreeMethodPipe(PipeTests):
    pipe_class = ThreeMethodPipe
    many_pipes = 1000


class TestThreeMethodTcpPipe(PipeTests):
    pipe_class = ThreeMethodTcpPipe


class GatedPipe(ThreeMethodPipe):
    """Notes whose chunks it sends; the first send waits at a gate."""

    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec)
        self.sent: list[int] = []
        self.first, self.gate = threading.Event(), threading.Event()

    def send_tensor(self, tensor: Tensor | None) -> None:
        self.sent.append(read_tag(tensor)[1][1])
        self.first.set()
        assert self.gate.wait(LIMIT_S)
        super().send_tensor(tensor)


def layout(blocks: int = 64) -> PagedLayout:
    return separate_layers(1, blocks, 1, BLOCK)


def test_a_small_transfer_takes_every_second_turn_beside_a_large_one() -> None:
    pair = open_pair(GatedPipe)
    chunk = CHUNK_BYTES // BLOCK
    large, small = [range(16 * chunk)], [range(16 * chunk, 18 * chunk)]
    shape = layout(18 * chunk)
    ends = attach(pair, noisy_memory(shape, 1), noisy_memory(shape, 2))
    moves = [ends.here.read_blocks(large, large)]
    assert pair.there.first.wait(LIMIT_S)
    moves.append(ends.here.read_blocks(small, small))
    pair.channels[0].call("blocks.credit", {"kind": 0, "transfer": 99, "receives": False, "chunks": 0}).result(LIMIT_S)
    pair.there.gate.set()
    for move in moves:
        move.wait(LIMIT_S)
    assert regions(ends.mine)[0].equal(regions(ends.theirs)[0])
    assert pair.there.sent[:5] == [1, 2, 1, 2, 1]
    pair.close()


def test_many_unbuffered_pipes_of_one_process_do_not_starve_each_other() -> None:
    """More pipes than threads, all of them sending and receiving, each send waiting for its receive."""
    pairs = [open_pair(RendezvousPipe) for _ in range(12)]
    ends = []
    for number, pair in enumerate(pairs):
        RendezvousPipe.join(pair)
        ends.append(attach(pair, noisy_memory(layout(), number), noisy_memory(layout(), 100 + number)))
    low, high = [range(32)], [range(32, 64)]
    moves = [end.here.read_blocks(low, low) for end in ends] + [end.there.read_blocks(high, high) for end in ends]
    for move in moves:
        move.wait(LIMIT_S)
    for end in ends:
        assert regions(end.mine)[0].equal(regions(end.theirs)[0])
    for pair in pairs:
        pair.close()


def test_a_transfer_on_which_nothing_moves_fails_and_the_pipe_goes_on() -> None:
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    # The other end accepts requests and never sends.
    mute = {"blocks.read": lambda _: {"credit": 4}, "blocks.stop": lambda _: {"running": False}}
    for op, handler in mute.items():
        pair.channels[1].handle(op, handler)
    stream = BlockStream(pair.here, mine, theirs.layout, pair.channels[0], timeout_s=0.5)
    with pytest.raises(DeadlineError):
        stream.read([[0]], [[0]]).wait(LIMIT_S)
    BlockStream(pair.there, theirs, mine.layout, pair.channels[1])
    stream.read([[0]], [[0]]).wait(LIMIT_S)
    assert regions(mine)[0][:BLOCK].equal(regions(theirs)[0][:BLOCK])
    pair.close()


def test_an_end_may_send_larger_chunks_than_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As memory of a device does. Credit is counted in chunks, of whatever size."""
    pair, most = open_pair(GatedPipe), [0]
    for end in pair.here, pair.there:
        end.gate.set()
    ends = attach(pair, noisy_memory(layout(1024), 1), noisy_memory(layout(1024), 2))
    sender = pair.there._stream._sender
    grant = sender.grant

    def note(flow, chunks):
        grant(flow, chunks)
        most[0] = max(most[0], flow.credit)

    monkeypatch.setattr(sender, "grant", note)
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 4 * CHUNK_BYTES)
    ends.here.read_blocks([range(1024)], [range(1024)]).wait(LIMIT_S)
    assert regions(ends.mine)[0].equal(regions(ends.theirs)[0])
    assert len(pair.there.sent) == 1024 * BLOCK // (4 * CHUNK_BYTES)
    assert most[0] <= stream_module.WINDOW
    pair.close()


def test_memory_that_the_pipe_does_not_carry_is_refused() -> None:
    pair = open_pair(ThreeMethodPipe)
    mine = noisy_memory(layout(), 1)
    elsewhere = PagedMemory(mine.layout, mine.bases.tolist(), "cuda:0", mine)
    with pytest.raises(HandshakeError, match="cuda:0, pipe 'three' carries tensors on: cpu"):
        pair.here.attach(elsewhere, mine.layout, pair.channels[0])
    pair.close()


def test_a_device_that_fails_ends_the_transfer_and_the_pipe_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = open_pair(ThreeMethodPipe)
    ends = attach(pair, noisy_memory(layout(), 1), noisy_memory(layout(), 2))
    for name in "gather", "scatter":
        with monkeypatch.context() as broken:
            broken.setattr(chunks_module.paged, name, _out_of_memory)
            with pytest.raises(KVConnectError):
                ends.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)
        ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    pair.close()


def _out_of_memory(*_: object) -> None:
    raise RuntimeError("CUDA out of memory")


class RaisingChannel:
    """A third party's channel that raises where it should return a failed future."""

    def call(self, op: str, body: object) -> Future[dict[str, object]]:
        raise OSError("the channel is gone")

    def handle(self, op: str, handler: object) -> None:
        pass


def test_a_channel_that_raises_ends_the_transfer() -> None:
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    stream = BlockStream(pair.here, mine, theirs.layout, RaisingChannel())
    for start in stream.read, stream.write:
        with pytest.raises(BrokenError, match="the channel is gone"):
            start([[0]], [[0]]).wait(LIMIT_S)
    pair.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_transfer_that_rests_finds_its_thread_started() -> None:
    """How many threads there are must not depend on how long something took."""
    pid = os.fork()
    if pid == 0:  # here nothing has been moved yet
        Threads.current()
        before = threading.enumerate()
        on: list[threading.Thread] = []
        listened = threading.Event()
        Threads.current().listeners.add(lambda: bool(on.append(threading.current_thread()) or listened.set()))
        os._exit(0 if listened.wait(LIMIT_S) and on[0] in before else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


class BadWatch:
    """Raises when the clock looks at it."""

    def __init__(self) -> None:
        self.looks = threading.Semaphore(0)

    def check_time(self, now: float) -> bool:
        self.looks.release()
        raise RuntimeError("bad")


def test_the_clock_of_all_streams_outlives_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = BadWatch(), threading.Event()

    class GoodWatch:
        def check_time(self, now: float) -> bool:
            good.set()
            return False

    with caplog.at_level(logging.ERROR, "kvconnect.pipes.chunks"):
        Threads.current().watch(bad)
        assert bad.looks.acquire(timeout=LIMIT_S)
        Threads.current().watch(GoodWatch())
        assert good.wait(LIMIT_S)
    assert "could not be looked at" in caplog.text


def test_the_deadline_of_a_pipe_is_that_of_its_block_path() -> None:
    pair = open_pair(ThreeMethodPipe)
    pair.here.timeout_s = 0.4
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    pair.channels[1].handle("blocks.read", lambda _: {"credit": 4})
    pair.here.attach(mine, theirs.layout, pair.channels[0])
    with pytest.raises(DeadlineError, match=r"0\.4 s"):
        pair.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)
    pair.close()


@pytest.mark.parametrize("pipe_class", [ThreeMethodPipe, InprocPipe])
def test_an_end_is_attached_once_only(pipe_class: type[Pipe]) -> None:
    pair = open_pair(pipe_class)
    mine, theirs, other = (noisy_memory(layout(), seed) for seed in (1, 2, 3))
    with pytest.raises(HandshakeError):
        pair.here.attach(mine, separate_layers(2, 64, 1, BLOCK), pair.channels[0])
    ends = attach(pair, mine, theirs)
    with pytest.raises(BusyError):
        pair.here.attach(other, theirs.layout, pair.channels[0])
    ends.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)
    assert regions(mine)[0][:BLOCK].equal(regions(theirs)[0][:BLOCK])
    pair.close()


def test_a_pipe_closed_while_nothing_comes_ends_its_transfers() -> None:
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    pair.channels[1].handle("blocks.read", lambda _: {"credit": 4})
    stream = BlockStream(pair.here, mine, theirs.layout, pair.channels[0])
    transfer = stream.read([[0]], [[0]])
    pair.here.close()
    with pytest.raises(KVConnectError):
        transfer.wait(LIMIT_S)
    pair.close()


@pytest.mark.parametrize(
    "change", [{"nbytes": 1}, {"groups": [b"abc"]}, {"groups": 5}, {"transfer": -1}, {"credit": "x"}]
)
def test_a_malformed_request_is_refused_before_anything_is_sent(change: dict[str, object]) -> None:
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    BlockStream(pair.there, theirs, mine.layout, pair.channels[1])
    body = {"transfer": 1, "groups": pack([[0]]), "nbytes": BLOCK, "credit": 4} | change
    error = pair.channels[0].call("blocks.read", body).exception(LIMIT_S)
    assert isinstance(error, HandshakeError)
    pair.close()


def test_a_request_for_more_blocks_than_there_are_is_refused() -> None:
    """Ids that repeat would make the serving end list pieces without bound."""
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    BlockStream(pair.there, theirs, mine.layout, pair.channels[1])
    for ids, refused in ([0] * 65, True), ([0] * 64, False):
        body = {"transfer": 1, "groups": pack([ids]), "nbytes": len(ids) * BLOCK, "credit": 0}
        error = pair.channels[0].call("blocks.read", body).exception(LIMIT_S)
        assert isinstance(error, HandshakeError) == refused, error
    pair.close()


def test_requests_beyond_a_bound_are_refused_until_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_FLOWS", 2)
    pair = open_pair(ThreeMethodPipe)
    ends = attach(pair, noisy_memory(layout(), 1), noisy_memory(layout(), 2))
    for number in 7, 8:  # without credit, so they stay
        body = {"transfer": number, "groups": pack([[0]]), "nbytes": BLOCK, "credit": 0}
        pair.channels[0].call("blocks.read", body).result(LIMIT_S)
    with pytest.raises(BusyError):
        ends.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)
    ends.there.read_blocks([[0]], [[0]]).wait(LIMIT_S)  # the bound is for what the other end asks
    stop = {"kind": int(Kind.READ), "transfer": 7, "receives": False}
    assert pair.channels[0].call("blocks.stop", stop).result(LIMIT_S) == {"running": True}
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    pair.close()


@pytest.mark.parametrize("kind", ["too long", "wrong offset", "not a chunk", "none"])
def test_bytes_that_were_not_asked_for_break_the_stream_and_touch_nothing(kind: str) -> None:
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    before = regions(mine)[0].clone()
    pair.channels[1].handle("blocks.read", lambda _: {"credit": 4})
    stream = BlockStream(pair.here, mine, theirs.layout, pair.channels[0])
    transfer = stream.read([[0]], [[0]])
    nbytes = BLOCK + 1 if kind == "too long" else BLOCK // 2
    chunk = torch.full((nbytes + TAG_BYTES,), 7, dtype=torch.uint8)
    if kind != "not a chunk":
        write_tag(chunk, (Kind.READ, 1), 1 if kind == "wrong offset" else 0)
    pair.there.send_tensor(None if kind == "none" else chunk)
    pair.channels[1].call("blocks.chunk", {})
    with pytest.raises(BrokenError):
        transfer.wait(LIMIT_S)
    assert regions(mine)[0].equal(before)
    with pytest.raises(BrokenError):
        stream.read([[0]], [[0]])
    pair.close()


def test_a_chunk_of_a_transfer_that_is_over_is_dropped() -> None:
    pair = open_pair(ThreeMethodPipe)
    mine, theirs = noisy_memory(layout(), 1), noisy_memory(layout(), 2)
    ends = attach(pair, mine, theirs)
    before = regions(mine)[0].clone()
    chunk = torch.full((BLOCK + TAG_BYTES,), 7, dtype=torch.uint8)
    write_tag(chunk, (Kind.READ, 999), 0)
    pair.there.send_tensor(chunk)
    pair.channels[1].call("blocks.chunk", {}).result(LIMIT_S)
    assert regions(mine)[0].equal(before)
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    assert regions(mine)[0][BLOCK : 2 * BLOCK].equal(regions(theirs)[0][BLOCK : 2 * BLOCK])
    pair.close()


def test_ids_and_tags_survive_packing() -> None:
    assert unpack(pack([[3, 1, 1 << 30], [], range(4)])) == [[3, 1, 1 << 30], [], [0, 1, 2, 3]]
    chunk = torch.arange(40, dtype=torch.uint8)
    write_tag(chunk, (Kind.WRITE, 1 << 40), 1 << 50)
    data, key, offset = read_tag(chunk)
    assert data.tolist() == list(range(16))
    assert (key, offset) == ((Kind.WRITE, 1 << 40), 1 << 50)
