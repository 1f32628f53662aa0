"""The process that times: the asking end of every medium, and the samples that are timed."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kvconnect.bench import far
from kvconnect.bench.ends import End, PipeEnd, open_end
from kvconnect.bench.link import Scoped
from kvconnect.bench.memory import LARGEST_BYTES, Pool, Selection, digest, fill, layout, others
from kvconnect.bench.process import Process
from kvconnect.pipes.base import Pipe
from kvconnect.testing.channels import ConnectionChannel

REFERENCES = ("socket", "gloo")


class Near:
    """Both ends of every medium, driven from here. Times are seconds on one clock.

    ``time.perf_counter`` reads CLOCK_MONOTONIC, which all processes of a host share:
    a sample starts here and ends when the *receiver* holds the last byte.
    """

    def __init__(self) -> None:
        channel, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = Process(far.main, theirs, name="bench-far")
        self.link = self._process.link
        self._channel = ConnectionChannel(channel, "bench-channel")
        self._channel.start()
        self._ends: dict[str, End] = {}
        self._pool: Pool | None = None
        self._attached: set[str] = set()
        self._openings = 0
        self._source = torch.empty(LARGEST_BYTES, dtype=torch.uint8)
        fill(self._source, np.random.default_rng(1))
        self._copy = torch.zeros(LARGEST_BYTES, dtype=torch.uint8)

    @property
    def pool(self) -> Pool:
        """The paged memory, made when first needed."""
        if self._pool is None:
            self._pool = Pool()
            self._pool.fill(2)
        return self._pool

    def end(self, name: str, options: Mapping[str, Any] | None = None) -> str:
        """Open a pipe or a reference once, in both processes; return the key of its ends."""
        key = f"{name} {sorted((options or {}).items())}"
        if key not in self._ends:
            known = f"reference:{name}" if name in REFERENCES else name
            self.link.send({"op": "open", "end": key, "name": known, "options": dict(options or {})})
            self._ends[key] = open_end(known, options or {}, "asks", self.link.swap)
            self.link.recv()
        return key

    def attached(self, key: str) -> Pipe:
        """Return this end's pipe, attached to the pools of both processes."""
        end = self._ends[key]
        if not isinstance(end, PipeEnd):
            raise TypeError(f"{key} is not a pipe")
        if key not in self._attached:
            # Both sides must have their handlers up before either asks: attach returns without asking.
            # A scope of its own for each opening: ends that were closed still answer on theirs.
            self._openings += 1
            scope = f"{key} {self._openings}"
            end.pipe.attach(self.pool.memory, layout(), Scoped(self._channel, scope))
            self.link.ask("attach", end=key, scope=scope)
            self._attached.add(key)
        return end.pipe

    def release(self, key: str) -> None:
        """Close both ends."""
        self._ends.pop(key).close()
        self._attached.discard(key)
        self.link.ask("close", end=key)

    # -- samples ------------------------------------------------------------------

    def tensors(self, key: str, nbytes: int, count: int, *, into: bool) -> float:
        """Send ``count`` tensors; return seconds a tensor."""
        send, tensor = self._ends[key].send, self._source[:nbytes]
        self.link.ask("recv", end=key, nbytes=nbytes, count=count, into=into)
        start = time.perf_counter()
        for _ in range(count):
            send(tensor)
        sent = time.perf_counter()
        return float(max(sent, self.link.recv()["at"]) - start) / count

    def memcpy(self, nbytes: int, count: int, *, into: bool) -> float:
        """Copy within this process, on one thread; return seconds a copy."""
        source = self._source.data_ptr()
        start = time.perf_counter()
        for _ in range(count):
            out = self._copy if into else torch.empty(nbytes, dtype=torch.uint8)
            ctypes.memmove(out.data_ptr(), source, nbytes)
        return (time.perf_counter() - start) / count

    def memory_read(self, nbytes: int) -> float:
        """Read within this process, on one thread; return seconds."""
        words = self._source[:nbytes].numpy().view(np.uint64)
        start = time.perf_counter()
        words.max()
        return time.perf_counter() - start

    def ping_pong(self, key: str, nbytes: int, count: int) -> list[float]:
        """Return ``count`` times half a round trip, the receivers blocked."""
        end, tensor = self._ends[key], self._source[:nbytes]
        self.link.ask("echo", end=key, nbytes=nbytes, count=count)
        halves = []
        for _ in range(count):
            start = time.perf_counter()
            end.send(tensor)
            end.recv(nbytes)
            halves.append((time.perf_counter() - start) / 2)
        self.link.recv()
        return halves

    def idle_cpu(self, key: str, nbytes: int) -> float:
        """Return the share of one core that a blocked receiver uses."""
        self.link.ask("idle", end=key, nbytes=nbytes)
        time.sleep(far.IDLE_S)
        self._ends[key].send(self._source[:nbytes])
        return float(self.link.recv()["cpu_s"]) / far.IDLE_S

    def blocks(self, pipe: Pipe, op: str, chosen: Selection) -> float:
        """Read or write the chosen blocks; return seconds until they are in place."""
        start = time.perf_counter()
        if op == "read":
            pipe.read_blocks([chosen.far], [chosen.near]).wait(60)
        else:
            pipe.write_blocks([chosen.near], [chosen.far]).wait(60)
        return time.perf_counter() - start

    # -- checks -------------------------------------------------------------------

    def check_tensor(self, key: str, nbytes: int, *, into: bool) -> None:
        """Send one tensor and compare what arrived."""
        self.link.ask("check", end=key, nbytes=nbytes, into=into)
        self._ends[key].send(self._source[:nbytes])
        if self.link.recv()["digest"] != digest(self._source[:nbytes]):
            raise RuntimeError(f"{key}: {nbytes} bytes arrived that are not those that were sent")

    def check_echo(self, key: str, nbytes: int) -> None:
        """Send one tensor there and back and compare."""
        self.link.ask("echo", end=key, nbytes=nbytes, count=1)
        self._ends[key].send(self._source[:nbytes])
        back = self._ends[key].recv(nbytes)
        self.link.recv()
        if digest(back) != digest(self._source[:nbytes]):
            raise RuntimeError(f"{key}: {nbytes} bytes came back that are not those that were sent")

    def check_blocks(self, pipe: Pipe, op: str, chosen: Selection) -> None:
        """Move blocks that differ on the two sides: they must arrive, and no other may change."""
        self.pool.flip(chosen.near)
        before = self._others(op, chosen)
        self.blocks(pipe, op, chosen)
        same = self.pool.digest(chosen.near) == self.link.ask("digest", ids=chosen.far)["digest"]
        if not same or before != self._others(op, chosen):
            raise RuntimeError(f"{op} of {len(chosen.near)} blocks: wrong bytes, or blocks that nobody chose changed")

    def _others(self, op: str, chosen: Selection) -> str:
        """Hash what must stay as it is on the receiving side."""
        if op == "read":
            return self.pool.digest(others(chosen.near))
        return str(self.link.ask("digest", ids=others(chosen.far))["digest"])

    def kill(self) -> None:
        """End the other process, and this end of everything."""
        self._process.kill()
        for end in self._ends.values():
            end.close()
