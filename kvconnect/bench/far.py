"""The other process: it serves one end of every medium, and holds the other pool of blocks."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from kvconnect.bench.ends import End, PipeEnd, open_end
from kvconnect.bench.link import Link, Scoped
from kvconnect.bench.memory import LARGEST_BYTES, Pool, digest, layout
from kvconnect.bench.process import serve
from kvconnect.testing.channels import ConnectionChannel

#: How long the receiver waits for its message when its idle CPU time is measured.
IDLE_S = 0.5


class Far:
    """Commands of the other process; each returns what the parent is told."""

    def __init__(self, link: Link, channel: Connection) -> None:
        self.link = link
        self.channel = ConnectionChannel(channel, "bench-channel")
        self.channel.start()
        self.ends: dict[str, End] = {}
        self.into = torch.zeros(LARGEST_BYTES, dtype=torch.uint8)
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The paged memory, made when first needed."""
        if self._pool is None:
            self._pool = Pool()
            self._pool.fill(3)
        return self._pool

    def open(self, end: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Open the serving end of ``name``; the exchange goes over the link meanwhile."""
        self.ends[end] = open_end(name, options, "serves", self.link.answer)
        return {"opened": end}

    def close(self, end: str) -> dict[str, Any]:
        """Close one end."""
        self.ends.pop(end).close()
        return {}

    def attach(self, end: str, scope: str) -> dict[str, Any]:
        """Attach a pipe to the pool."""
        pipe_end = self.ends[end]
        if not isinstance(pipe_end, PipeEnd):
            raise TypeError(f"{end} is not a pipe")
        pipe_end.pipe.attach(self.pool.memory, layout(), Scoped(self.channel, scope))
        return {}

    def recv(self, end: str, nbytes: int, count: int, *, into: bool) -> dict[str, Any]:
        """Receive ``count`` messages; tell when the last one was here."""
        medium, out = self.ends[end], self.into[:nbytes]
        self.link.send({"ready": True})
        if into:
            for _ in range(count):
                medium.recv_into(out)
        else:
            for _ in range(count):
                medium.recv(nbytes)
        return {"at": time.perf_counter()}

    def check(self, end: str, nbytes: int, *, into: bool) -> dict[str, Any]:
        """Receive one message and hash it."""
        out = self.into[:nbytes].zero_()
        self.link.send({"ready": True})
        if into:
            self.ends[end].recv_into(out)
        else:
            out = self.ends[end].recv(nbytes)
        return {"digest": digest(out)}

    def echo(self, end: str, nbytes: int, count: int) -> dict[str, Any]:
        """Send every message back."""
        medium = self.ends[end]
        self.link.send({"ready": True})
        for _ in range(count):
            medium.send(medium.recv(nbytes))
        return {}

    def idle(self, end: str, nbytes: int) -> dict[str, Any]:
        """Receive one message that comes late; tell how much CPU time the waiting took."""
        self.link.send({"ready": True})
        before = time.process_time()
        self.ends[end].recv(nbytes)
        return {"cpu_s": time.process_time() - before}

    def digest(self, ids: list[int]) -> dict[str, Any]:
        """Hash the blocks ``ids``."""
        return {"digest": self.pool.digest(ids)}


def main(connection: Connection, channel: Connection) -> None:
    """Run the other process."""
    far = Far(Link(connection), channel)
    names = ("open", "close", "attach", "recv", "check", "echo", "idle", "digest")
    serve(far.link, {name: getattr(far, name) for name in names})
