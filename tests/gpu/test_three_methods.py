"""A pipe of three methods that carries CUDA tensors: the default block path on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest

from kvconnect.pipes.base import Pipe, PipeSpec, Reach, Traits
from kvconnect.testing.pipe_tests import CudaPipeTests
from tests.gpu.pipes import CudaPipe

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.gpu


class ThreeMethodCudaPipe(Pipe):
    """What a third party writes: a constructor and three methods."""

    name = "three-cuda"
    traits = Traits(devices=frozenset({"cuda"}), reach=Reach.PROCESS)
    wire_class: ClassVar[type[Pipe]] = CudaPipe

    def __init__(self, spec: PipeSpec) -> None:
        self._wire = self.wire_class.open(spec)

    def send_tensor(self, tensor: Tensor | None) -> None:
        self._wire.send_tensor(tensor)

    def recv_tensor(self) -> Tensor | None:
        return self._wire.recv_tensor()

    def close(self) -> None:
        self._wire.close()


class TestThreeMethodCudaPipe(CudaPipeTests):
    pipe_class = ThreeMethodCudaPipe
    many_pipes = 200
