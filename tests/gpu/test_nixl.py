"""The laws over `kvconnect.pipes.nixl`."""

from __future__ import annotations

import pytest

from tests.gpu.registered import OneDevice, TwoDevices

pytestmark = pytest.mark.gpu


class TestNixlOnOneDevice(OneDevice):
    medium = "nixl"


class TestNixlOnTwoDevices(TwoDevices):
    medium = "nixl"
