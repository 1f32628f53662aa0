"""`kvconnect.pipes.shm`: the laws in both modes, and what only this medium has to withstand."""

from kvconnect.pipes.shm import ShmPipe
from kvconnect.testing.pipe_tests import PipeTests


class TestDirect(PipeTests):
    """Large messages are read from the peer's memory."""

    pipe_class = ShmPipe
    options = {"copy": "direct"}


class TestRing(PipeTests):
    """Large messages go through the ring."""

    pipe_class = ShmPipe
    options = {"copy": "ring", "ring_bytes": 1 << 20}
