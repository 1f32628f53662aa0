"""One fleet of engines a pipe, shared by all cases of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvconnect.demo.engines import free_port
from tests.vllm.collector import collecting
from tests.vllm.fleet import Fleet, Plan

#: Connector name by pipe.
CONNECTORS = {"tcp": "KvConnectTcp", "shm": "KvConnectShm"}
#: For starting a whole fleet on two cores that do nothing else.
START_S = 420.0


@pytest.fixture(scope="session", params=sorted(CONNECTORS))
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two producers and two consumers over one pipe; the second consumer has a tiny KV cache.

    Session-scoped and parametrized: pytest runs all cases of one pipe, stops its
    fleet, and starts the next.
    """
    with collecting() as collector:
        plan = Plan(
            CONNECTORS[request.param],
            arguments=collector.arguments,
            env=collector.env,
            router=f"127.0.0.1:{free_port()}",
        )
        with running(plan, tmp_path_factory.mktemp(f"fleet-{request.param}")) as fleet:
            fleet.collector = collector
            yield fleet
            # After all cases: every engine idle, every block free.
            assert fleet.settle() == []


@contextlib.contextmanager
def running(plan: Plan, folder: Path) -> Iterator[Fleet]:
    """Run a fleet for a while."""
    fleet = Fleet(plan, folder)
    try:
        fleet.start(START_S)
        yield fleet
    finally:
        fleet.stop()
