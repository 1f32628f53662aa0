"""The laws over `kvconnect.pipes.cuda_ipc`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvconnect import registry
from kvconnect.testing.block_laws import attach
from kvconnect.testing.layouts import noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S, open_pair
from tests.gpu.registered import OneDevice, TwoDevices

pytestmark = pytest.mark.gpu


class TestCudaIpcOnOneDevice(OneDevice):
    medium = "cuda_ipc"


class TestCudaIpcOnTwoDevices(TwoDevices):
    medium = "cuda_ipc"


@pytest.mark.parametrize(("options", "within", "between"), [({}, None, 16), ({"multiprocessors": 4}, 4, 4)])
def test_within_one_gpu_no_link_limits_a_copy_but_an_option_does(
    devices: tuple[str, str], options: dict[str, Any], within: int | None, between: int
) -> None:
    """Few multiprocessors saturate a link; memory takes all of them."""
    layout = separate_layers(2, 8, 2, 32 << 10)
    pair = open_pair(registry.pipe("cuda_ipc"), options, device=devices[0], peer_device=devices[1])
    ends = attach(pair, noisy_memory(layout, 1, devices[0]), noisy_memory(layout, 2, devices[1]))
    everything = torch.cuda.get_device_properties(0).multi_processor_count
    wanted = (within or everything) if devices[0] == devices[1] else between
    assert ends.here._blocks.multiprocessors == ends.there._blocks.multiprocessors == wanted
    ends.here.read_blocks([[1, 2]], [[3, 0]]).wait(LIMIT_S)
    pair.close()
