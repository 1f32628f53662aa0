"""A real Redis server for tests: started on a free port or a socket, gone with the test."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest
import redis


class RedisServer:
    """One server, which keeps nothing; ``options`` are its own, as ``--requirepass=…``."""

    def __init__(self, *options: str, url: str = "unix://{socket}", **client: str) -> None:
        """``url`` is what engines are told; ``client`` what our own client needs besides."""
        found = shutil.which("redis-server")
        if found is None:
            pytest.fail("these tests need a Redis server: apt-get install redis-server")
        self._folder = tempfile.TemporaryDirectory(prefix="kvredis")
        socket = Path(self._folder.name) / "socket"
        self.url = url.format(socket=socket)
        command = [found, "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", self._folder.name]
        if not any(option == "--port" for option in options):
            command += ["--port", "0"]
        self._command = [*command, *options]
        self.client = redis.Redis.from_url(self.url, **client)
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again: it knows nothing of what it was told before."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        self._await(20.0)

    def _await(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self.client.ping()
            except redis.ConnectionError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """Have it hang until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End `stop`."""
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.kill()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
