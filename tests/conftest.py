"""For all tests: what a run may not leave behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _children() -> list[str]:
    """Command lines of this process's children, less those of the interpreter's own resource tracker."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue  # the thread has ended meanwhile
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            if command and "multiprocessing.resource_tracker" not in command:
                found.append(f"{pid}: {command[:200]}")
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fail the run if it leaves a child process, or a thread that would keep the interpreter alive."""
    before = set(_children())
    yield
    threads = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    assert not threads, f"threads left running: {threads}"
    children = [line for line in _children() if line not in before]
    assert not children, f"processes left running by {os.getpid()}: {children}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests failed at first that may have passed when they tried again (``make test RERUNS=1``)."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_sep("_", f"at first: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)
