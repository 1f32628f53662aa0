"""What the tests of reliability share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Have vLLM import what it imports late, once and not in every forked engine."""
    pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")
    from tests.faults.world import warm_up

    warm_up()
