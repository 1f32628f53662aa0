"""A results file as a whole: the rows, and what they were measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvconnect.bench.rows import Row, unique

SCHEMA = 1
MEASURED = ("kvconnect", "torch", "numpy", "nixl", "xxhash", "pytest-benchmark")


def build(rows: list[Row], load: float, command: str, commit: str) -> dict[str, Any]:
    """Return the contents of a results file.

    Args:
        rows: what was measured.
        load: what the machine did before the run, in runnable tasks.
        command: that was run.
        commit: that was measured, or ``""``.

    """
    return {
        "schema": SCHEMA,
        "command": command,
        "hardware": hardware() | {"load_before": round(load, 2)},
        "versions": versions(),
        "commit": commit,
        "rows": [asdict(row) for row in unique(rows)],
    }


def hardware() -> dict[str, Any]:
    """Describe this machine."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    pages = next(iter(_lines("/sys/kernel/mm/transparent_hugepage/enabled")), "unknown")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "kernel": platform.release(),
        "transparent_hugepages": pages,
    }


def versions(distributions: tuple[str, ...] = MEASURED) -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
