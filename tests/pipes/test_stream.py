"""A pipe with nothing but the three methods gets a working block path."""

from typing import ClassVar

from torch import Tensor

from kvconnect.pipes.base import Pipe, PipeSpec, Reach, Traits
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.testing.pipe_tests import PipeTests


class ThreeMethodPipe(Pipe):
    """What a third party writes: a constructor and three methods."""

    name = "three"
    traits = Traits(reach=Reach.PROCESS)

    def __init__(self, spec: PipeSpec) -> None:
        self._wire = InprocPipe(spec)

    def send_tensor(self, tensor: Tensor | None) -> None:
        self._wire.send_tensor(tensor)

    def recv_tensor(self) -> Tensor | None:
        return self._wire.recv_tensor()

    def close(self) -> None:
        self._wire.close()


class TestThreeMethodPipe(PipeTests):
    pipe_class: ClassVar[type[Pipe]] = ThreeMethodPipe
    many_pipes = 1000
