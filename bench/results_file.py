"""What results files of this repository say besides: the commit that was measured."""

from __future__ import annotations

import shutil
import subprocess

from bench.report import ROOT

COMMAND = "make bench"
GIT = shutil.which("git") or "git"
#: Files that a run itself writes; they do not make the commit that was measured dirty.
WRITTEN = (
    "bench/results/control.json",
    "bench/results/cpu.json",
    "bench/results/h200x2.json",
    "bench/results/proxy.json",
    "bench/results/ray.json",
    "docs/benchmarks.md",
    "docs/img/h200x2.svg",
    "docs/proxy.md",
    "docs/scale.md",
    "docs/ray.md",
)


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
