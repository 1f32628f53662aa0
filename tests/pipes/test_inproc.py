"""The reference pipe obeys every law."""

from kvconnect.pipes.inproc import InprocPipe
from kvconnect.testing.pipe_tests import PipeTests


class TestInprocPipe(PipeTests):
    pipe_class = InprocPipe
    many_pipes = 1000
