"""The conformance suite over a pipe by its registered name."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from kvconnect import registry
from kvconnect.errors import UnavailableBackendError, UnknownBackendError
from kvconnect.testing.pipe_tests import CudaPipeTests


class OneDevice(CudaPipeTests):
    """Both ends on the first device; subclasses name the `medium`."""

    medium: ClassVar[str]
    peer_device: ClassVar[str | None] = "cuda:0"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def registered(cls, request: pytest.FixtureRequest) -> None:
        """Look the class up; skip where there are too few devices, or with the registry's reason."""
        assert registry.pipes(), "kvconnect is not installed here: its entry points are missing"
        if request.cls.peer_device == "cuda:1" and torch.cuda.device_count() < 2:
            pytest.skip(f"{request.cls.medium}: needs two CUDA devices, here is one")
        try:
            request.cls.pipe_class = registry.pipe(request.cls.medium)
        except (UnknownBackendError, UnavailableBackendError) as error:
            pytest.skip(str(error))


class TwoDevices(OneDevice):
    """The ends on two devices, which the peer process numbers the other way round."""

    peer_device: ClassVar[str | None] = "cuda:1"
