"""A results file as a whole: the rows, and what they were measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report import ROOT
from bench.rows import Row, unique

SCHEMA = 1
COMMAND = "make bench"
GIT = shutil.which("git") or "git"
#: Files that a run itself writes; they do not make the commit that was measured dirty.
WRITTEN = ("bench/results/cpu.json", "bench/results/h200x2.json", "docs/benchmarks.md", "docs/img/h200x2.svg")
MEASURED = ("kvconnect", "torch", "numpy", "nixl", "xxhash", "pytest-benchmark")


def build(rows: list[Row], load: float) -> dict[str, Any]:
    """Return the contents of a results file; ``load`` is what the machine did before the run, in runnable tasks."""
    return {
        "schema": SCHEMA,
        "command": COMMAND,
        "hardware": hardware() | {"load_before": round(load, 2)},
        "versions": versions(),
        "commit": commit(),
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


def commit() -> str:
    """Return the commit that was measured, with ``-dirty`` if files differ from it."""
    changed = [line[3:] for line in _git("status", "--porcelain", "--untracked-files=no")]
    dirty = any(path not in WRITTEN for path in changed)
    return next(iter(_git("rev-parse", "HEAD")), "unknown") + ("-dirty" if dirty else "")


def _git(*arguments: str) -> list[str]:
    try:
        done = subprocess.run([GIT, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
