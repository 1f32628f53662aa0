"""The command itself, as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def running(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the proxy at a free port; give the process and its URL."""
    command = [sys.executable, "-m", "kvconnect", "proxy", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | env) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "listening on" in line
            yield process, "http://" + line.split("listening on ")[1].split(",")[0]
        finally:
            process.kill()
