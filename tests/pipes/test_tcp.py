"""The TCP pipe: the laws of the contract, and what only sockets can do wrong."""

from __future__ import annotations

from kvconnect.pipes.tcp import TcpPipe
from kvconnect.testing.pipe_tests import PipeTests


class TestTcpPipe(PipeTests):
    """Every law of the contract."""

    pipe_class = TcpPipe
