"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Have vLLM import what it imports late, once and not in every forked engine."""
    pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")
    from tests.faults.world import warm_up

    warm_up()


@pytest.fixture(scope="session", autouse=True)
def coverage(warm: None, request: pytest.FixtureRequest) -> Iterator[None]:  # noqa: ARG001 - imports what needs vLLM
    """Print how often each cell of the table was struck."""
    from tests.faults import cells

    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and cells.struck:
        reporter.write_line("\n" + cells.table())
