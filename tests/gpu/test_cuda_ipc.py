"""The laws over `kvconnect.pipes.cuda_ipc`."""

from __future__ import annotations

import pytest

from tests.gpu.registered import OneDevice, TwoDevices

pytestmark = pytest.mark.gpu


class TestCudaIpcOnOneDevice(OneDevice):
    medium = "cuda_ipc"


class TestCudaIpcOnTwoDevices(TwoDevices):
    medium = "cuda_ipc"
