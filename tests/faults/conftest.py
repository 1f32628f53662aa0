"""What the tests of faults share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Have vLLM import what it imports late, once and not in every forked engine."""
    pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")
    from tests.faults.world import warm_up

    warm_up()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how often each cell of the table was struck; ``KVCONNECT_COVERAGE`` names a file that is told, too."""
    cells = sys.modules.get("tests.faults.cells")
    if cells is None or not cells.struck:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(cells.table())
    if path := os.environ.get("KVCONNECT_COVERAGE"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(cells.coverage(), indent=1) + "\n", encoding="utf-8")
