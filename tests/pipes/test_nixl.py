"""The NIXL pipe: the laws in each of its modes, and what only this medium has to withstand."""

from typing import ClassVar

from kvconnect.pipes.nixl import NixlPipe
from kvconnect.testing.pipe_tests import PipeTests


class TestAuto(PipeTests):
    pipe_class = NixlPipe


class TestRuns(PipeTests):
    pipe_class = NixlPipe
    options: ClassVar = {"mode": "runs", "companion": "tcp"}


class TestStaged(PipeTests):
    pipe_class = NixlPipe
    options: ClassVar = {"mode": "staged", "portion_bytes": 1 << 20}
