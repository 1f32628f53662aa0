"""The block path of the NCCL pipe over wires that copy within this process: all but the device's part."""

from __future__ import annotations

import threading

import pytest
from tests.pipes.nccl_fakes import FakeWires

from kvconnect.errors import BrokenError, ClosedError, HandshakeError, LoadError
from kvconnect.pipes.base import Pipe, Reach, Traits
from kvconnect.pipes.companion import join
from kvconnect.pipes.nccl_blocks import NcclBlocks
from kvconnect.pipes.nccl_tensors import HostTensors
from kvconnect.config import parse_backend
from kvconnect.testing import block_laws, pipe_laws
from kvconnect.testing.layouts import naive_stream, noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S, open_pair

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
