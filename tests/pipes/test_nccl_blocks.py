"""The block path of the NCCL pipe over wires that copy within this process: all but the device's part."""

from __future__ import annotations

import threading

import pytest

from kvconnect.config import parse_backend
from kvconnect.errors import BrokenError, ClosedError, HandshakeError, LoadError
from kvconnect.pipes.base import Pipe, Reach, Traits
from kvconnect.pipes.companion import join
from kvconnect.pipes.nccl_blocks import NcclBlocks
from kvconnect.pipes.nccl_tensors import HostTensors
from kvconnect.testing import block_laws, pipe_laws
from kvconnect.testing.layouts import naive_stream, noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S, open_pair
from tests.pipes.nccl_fakes import FakeWires

SLOT = 1 << 20


class FakeNcclPipe(Pipe):
    """An NCCL pipe without NCCL."""

    name = "fake-nccl"
    traits = Traits(reach=Reach.PROCESS)

    def __init__(self, spec):
        self.timeout_s = spec.timeout_s
        self.blocks, self.wires = None, None
        self.tensors = HostTensors(join(spec, {}, parse_backend("pipe.companion", "tcp")), "cpu")

    def send_tensor(self, tensor):
        self.tensors.send(tensor)

    def recv_tensor(self):
        return self.tensors.receive()

    def recv_tensor_into(self, out):
        self.tensors.receive_into(out)

    def close(self):
        if self.blocks is not None:
            self.blocks.close(ClosedError("this end was closed"))
        self.tensors.close()

    def abort(self):
        if self.blocks is not None:
            self.blocks.end(ClosedError("this end was closed"))
        self.tensors.abort()

    def attach(self, local, remote, channel):
        self.wires = FakeWires(local)
        self.blocks = NcclBlocks(local, remote, channel, self.wires, slot_bytes=SLOT, timeout_s=self.timeout_s)

    def read_blocks(self, remote, local):
        return self.blocks.read(remote, local)

    def write_blocks(self, local, remote):
        return self.blocks.write(local, remote)


@pytest.fixture
def pair():
    pair = open_pair(FakeNcclPipe, timeout_s=10.0)
    yield pair
    pair.close()


@pytest.mark.parametrize("law", block_laws.LAWS, ids=lambda law: law.__name__)
def test_block_law(law, pair):
    law(pair)


@pytest.mark.parametrize("law", pipe_laws.LAWS, ids=lambda law: law.__name__)
def test_tensor_law(law, pair):
    law(pair)


def test_many_pipes_share_their_threads():
    block_laws.many_pipes_are_served_by_a_fixed_set_of_threads(FakeNcclPipe, pipes=40)


def _attached(pair, blocks=64):
    mine = noisy_memory(separate_layers(2, blocks, 1, 1 << 15), 1)
    theirs = noisy_memory(separate_layers(2, blocks, 1, 1 << 15), 2)
    return block_laws.attach(pair, mine, theirs)


def _outcome(transfer):
    over = threading.Event()
    transfer.add_done_callback(lambda _: over.set())
    assert over.wait(LIMIT_S), "the transfer never ended"
    return transfer.error


def test_a_direction_that_is_not_used_costs_no_wire(pair):
    ends = _attached(pair)
    assert not ends.here.wires.made
    ends.here.read_blocks([[1, 2]], [[3, 4]]).wait(LIMIT_S)
    assert naive_stream(ends.mine, [[3, 4]]).equal(naive_stream(ends.theirs, [[1, 2]]))
    assert [wire.receives for wire in ends.here.wires.made] == [True]
    assert [wire.receives for wire in ends.there.wires.made] == [False]


def test_who_waits_hears_on_the_loops_thread_whoever_ends_a_transfer(pair):
    ends = _attached(pair)
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    ends.here.wires.made[0].line.held = True
    heard, over = [], threading.Event()

    def hear(_):
        heard.append(threading.current_thread().name)
        ends.here.close()  # may wait for that thread, unless it is that thread
        over.set()

    ends.here.read_blocks([[2]], [[2]])
    transfer = ends.here.read_blocks([list(range(3, 60))], [list(range(3, 60))])
    transfer.add_done_callback(hear)
    transfer.cancel()
    ends.here.wires.made[0].line.held = False
    assert over.wait(LIMIT_S / 2)
    assert heard == ["kvconnect-nccl-test"]


def test_a_wire_that_fails_ends_all_transfers_at_both_ends(pair):
    ends = _attached(pair)
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    ends.here.wires.made[0].line.held = True
    reading, writing = ends.here.read_blocks([[2]], [[2]]), ends.there.write_blocks([[3]], [[3]])
    ends.here.wires.made[0].line.dead = True
    for transfer in (reading, writing):
        assert isinstance(_outcome(transfer), BrokenError)
    for end in (ends.here, ends.there):
        with pytest.raises(BrokenError):
            end.read_blocks([[4]], [[4]]).wait(LIMIT_S)


def test_a_peer_that_falls_silent_is_given_up_at_the_deadline():
    pair = open_pair(FakeNcclPipe, timeout_s=0.5)
    try:
        ends = _attached(pair)
        ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
        ends.here.wires.made[0].line.held = True
        assert "nothing moved for 0.5 s" in str(_outcome(ends.here.read_blocks([[2]], [[2]])))
        assert ends.here.wires.made[0].aborted
    finally:
        pair.close()


def test_closing_waits_until_the_device_has_let_go(pair):
    ends = _attached(pair)
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    ends.here.wires.made[0].line.held = True
    transfer = ends.here.read_blocks([[2]], [[2]])
    ends.here.close()
    assert ends.here.wires.made[0].aborted
    assert isinstance(_outcome(transfer), ClosedError)


def test_a_write_that_the_other_end_refuses_fails_alone(pair):
    ends = _attached(pair)

    def refuse(_):
        raise HandshakeError("no such blocks")

    pair.channels[1].handle("nccl.write", refuse)
    assert "no such blocks" in str(_outcome(ends.here.write_blocks([[1]], [[1]])))
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)


def test_a_cancelled_write_is_over_when_the_other_end_says_so(pair):
    ends = _attached(pair)
    ends.there.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    line = ends.here.wires.made[0].line
    line.held = True
    line.sent.clear()
    transfer = ends.here.write_blocks([[2, 3]], [[2, 3]])
    assert line.sent.wait(LIMIT_S)
    transfer.cancel()
    assert not threading.Event().wait(0.2)
    assert not transfer.done  # its blocks are still to be received
    line.held = False
    assert isinstance(_outcome(transfer), LoadError)
    ends.here.write_blocks([[6]], [[7]]).wait(LIMIT_S)
    assert naive_stream(ends.theirs, [[7]]).equal(naive_stream(ends.mine, [[6]]))
