"""A pipe of three methods that carries CUDA tensors: the default block path on a device."""

from __future__ import annotations

import pytest

from kvconnect.pipes.base import Reach, Traits
from kvconnect.testing.pipe_tests import CudaPipeTests
from tests.gpu.pipes import CudaPipe
from tests.pipes.test_stream import ThreeMethodPipe

pytestmark = pytest.mark.gpu


class ThreeMethodCudaPipe(ThreeMethodPipe):
    name = "three-cuda"
    traits = Traits(devices=frozenset({"cuda"}), reach=Reach.PROCESS)
    wire_class = CudaPipe


class TestThreeMethodCudaPipe(CudaPipeTests):
    pipe_class = ThreeMethodCudaPipe
    many_pipes = 200
