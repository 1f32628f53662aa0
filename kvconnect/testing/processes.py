"""The other end of pipes in a process of its own, driven by small commands.

`ProcessPeer` starts the process; `ProcessPeer.open` joins a pipe to it. Exchange
and channel go over a connection of `multiprocessing`. The process can be killed and
frozen, which is what it is for.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes.base import Pipe, PipeSpec
from kvconnect.testing.channels import Body, ConnectionChannel
from kvconnect.testing.layouts import naive_stream, noisy_memory
from kvconnect.testing.peers import LIMIT_S, spawn


class ScopedChannel:
    """One pipe's share of a channel: its operations get a prefix."""

    def __init__(self, channel: ConnectionChannel, number: int) -> None:
        self._channel, self._prefix = channel, f"{number}/"

    def call(self, op: str, body: Body) -> Future[dict[str, Any]]:
        """Ask the other end of this pipe."""
        return self._channel.call(self._prefix + op, body)

    def handle(self, op: str, handler: Callable[[dict[str, Any]], Body]) -> None:
        """Answer the other end of this pipe."""
        self._channel.handle(self._prefix + op, handler)


@dataclass
class RemoteEnd:
    """A pipe whose other end is in another process: our end, and commands for theirs."""

    pipe: Pipe
    channel: ScopedChannel
    peer: ProcessPeer
    number: int

    def tell(self, command: str, **arguments: Any) -> Future[dict[str, Any]]:
        """Have the other end run a method of `_End`; the future fails with its error."""
        return self.peer.channel.call("tell", {"pipe": self.number, "command": command, "arguments": arguments})

    def attach(self, mine: PagedMemory, theirs: PagedLayout, seed: int) -> PagedMemory:
        """Attach both ends; theirs gets `noisy_memory` (``theirs``, ``seed``), of which this returns a copy."""
        arguments = {"mine": theirs.to_wire(), "theirs": mine.layout.to_wire(), "seed": seed}
        self.tell("attach", **arguments).result(LIMIT_S)
        self.pipe.attach(mine, theirs, self.channel)
        return noisy_memory(theirs, seed)


class ProcessPeer:
    """A process with the other ends of any number of pipes of one class."""

    def __init__(self, pipe_class: type[Pipe], options: Mapping[str, Any] | None = None) -> None:
        """Start the process. ``pipe_class`` must be importable there by its module and name."""
        self.pipe_class, self.options = pipe_class, dict(options or {})
        ours, theirs = multiprocessing.Pipe()
        where = f"{pipe_class.__module__}:{pipe_class.__qualname__}"
        self._process = multiprocessing.get_context("spawn").Process(
            target=_main, args=(theirs, where, self.options), name="kvconnect-test-peer", daemon=True
        )
        self._process.start()
        theirs.close()
        self._numbers = itertools.count(1)
        self.channel = ConnectionChannel(ours, "kvconnect-test-peer")
        self.channel.start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def open(self, timeout_s: float = 10.0) -> RemoteEnd:
        """Join one more pipe to the process; this end asks, the other one serves."""
        number = next(self._numbers)

        def exchange(mine: Body) -> Body:
            body = {"pipe": number, "mine": dict(mine), "timeout_s": timeout_s}
            return self.channel.call("open", body).result(LIMIT_S)

        pipe = self.pipe_class.open(PipeSpec("asks", exchange, timeout_s=timeout_s, options=self.options))
        return RemoteEnd(pipe, ScopedChannel(self.channel, number), self, number)

    def kill(self) -> None:
        """End the process at once (SIGKILL) and wait until it is gone."""
        self._process.kill()
        self._process.join(LIMIT_S)

    def freeze(self) -> None:
        """Stop the process where it is (SIGSTOP)."""
        os.kill(self._process.pid or 0, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self._process.pid or 0, signal.SIGCONT)

    def close(self) -> None:
        """Kill the process and release what belongs to it. Idempotent."""
        self.kill()
        self.channel.close()


class _End:
    """What the process does at its end of one pipe."""

    def __init__(self, pipe: Pipe, channel: ScopedChannel) -> None:
        self.pipe, self._channel = pipe, channel
        self._memory: PagedMemory | None = None

    def echo(self, count: int) -> None:
        """Receive ``count`` messages and send each back."""
        for _ in range(count):
            self.pipe.send_tensor(self.pipe.recv_tensor())

    def send(self, count: int, nbytes: int) -> None:
        """Send messages 0, 1, … of bytes 0, 1, …."""
        for i in range(count):
            self.pipe.send_tensor(torch.full((nbytes,), i % 256, dtype=torch.uint8))

    def receive(self, count: int) -> dict[str, Any]:
        """Receive messages and return their checksums."""
        got = [self.pipe.recv_tensor() for _ in range(count)]
        return {"crc": [None if t is None else zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data) for t in got]}

    def attach(self, mine: dict[str, Any], theirs: dict[str, Any], seed: int) -> None:
        """Make noise the end's paged memory."""
        self._memory = noisy_memory(PagedLayout.from_wire(mine), seed)
        self.pipe.attach(self._memory, PagedLayout.from_wire(theirs), self._channel)

    def stream(self, blocks: BlockIds) -> dict[str, Any]:
        """Return the checksum of the blocks."""
        if self._memory is None:
            raise RuntimeError("not attached")
        return {"crc": zlib.crc32(naive_stream(self._memory, blocks).numpy().data)}

    def read(self, remote: BlockIds, local: BlockIds) -> None:
        """Read blocks and wait."""
        self.pipe.read_blocks(remote, local).wait(LIMIT_S)

    def close(self) -> None:
        """Close the end."""
        self.pipe.close()

    def abort(self) -> None:
        """Abort the end."""
        self.pipe.abort()


class _Ends:
    """All ends of the process."""

    def __init__(self, pipe_class: type[Pipe], options: Mapping[str, Any], channel: ConnectionChannel) -> None:
        self._pipe_class, self._options, self._channel = pipe_class, options, channel
        self._ends: dict[int, Future[_End]] = {}

    def open(self, body: dict[str, Any]) -> Future[dict[str, Any]]:
        """Open the serving end; the answer is what it exchanges."""
        answer: Future[dict[str, Any]] = Future()
        number: int = body["pipe"]

        def exchange(mine: Body) -> Body:
            answer.set_result(dict(mine))
            theirs: Body = body["mine"]
            return theirs

        def open_end() -> _End:
            spec = PipeSpec("serves", exchange, timeout_s=body["timeout_s"], options=self._options)
            return _End(self._pipe_class.open(spec), ScopedChannel(self._channel, number))

        def opened(end: Future[_End]) -> None:
            error = end.exception()
            if error is not None and not answer.done():
                answer.set_exception(error)

        self._ends[number] = spawn(open_end)
        self._ends[number].add_done_callback(opened)
        return answer

    def tell(self, body: dict[str, Any]) -> Future[dict[str, Any]]:
        """Run one command in a thread of its own."""
        opening = self._ends[body["pipe"]]

        def run() -> dict[str, Any]:
            return getattr(opening.result(LIMIT_S), body["command"])(**body["arguments"]) or {}

        return spawn(run)


def _main(connection: Connection, where: str, options: Mapping[str, Any]) -> None:
    module, _, name = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    channel = ConnectionChannel(connection, "kvconnect-test-peer")
    ends = _Ends(found, options, channel)
    channel.handle("open", ends.open)
    channel.handle("tell", ends.tell)
    channel.start()
    channel.join()
