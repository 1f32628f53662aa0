"""What tests on GPUs share: they are skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

TWO = "needs two CUDA devices, here is one"


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    """Skip where torch finds no CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device here")


@pytest.fixture(params=[("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")], ids=["one_device", "two_devices"])
def devices(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Devices of a pipe's two ends: the same one, and two where there are two."""
    device, peer_device = request.param
    if torch.device(peer_device).index >= torch.cuda.device_count():
        pytest.skip(TWO)
    return device, peer_device
