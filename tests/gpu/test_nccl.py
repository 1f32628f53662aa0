"""The laws over `kvconnect.pipes.nccl`."""

from __future__ import annotations

import pytest

from tests.gpu.registered import TwoDevices

pytestmark = pytest.mark.gpu


class TestNccl(TwoDevices):
    """On two devices only: NCCL refuses two ranks on one."""

    medium = "nccl"
    # A communicator takes tens of MB on each device.
    many_pipes = 12
