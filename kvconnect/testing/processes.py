"""The other end of pipes in a process of its own, driven by small commands.

`ProcessPeer` starts the process; `ProcessPeer.open` joins a pipe to it. Exchange
and channel go over a connection of `multiprocessing`. The process can be killed and
frozen, which is what it is for. It is spawned, never forked: CUDA does not survive a fork.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import torch

from kvconnect.errors import BrokenError
from kvconnect.pipes.base import Pipe, PipeSpec
from kvconnect.testing.channels import Body, ConnectionChannel
from kvconnect.testing.devices import is_cuda
from kvconnect.testing.ends import DrivenEnd, End
from kvconnect.testing.peers import LIMIT_S, spawn

#: How long a process may take to start.
START_S = 100.0


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


class RemoteEnd(End):
    """A pipe whose other end is in another process."""

    def __init__(self, pipe: Pipe, peer: ProcessPeer, number: int) -> None:
        super().__init__(pipe, ScopedChannel(peer.channel, number), peer.device, frozenset({peer.device}))
        self.peer, self._number = peer, number

    def tell(self, command: str, **arguments: Any) -> Future[dict[str, Any]]:
        """Have the other process run the command in a thread of its own."""
        return self.peer.channel.call("tell", {"pipe": self._number, "command": command, "arguments": arguments})


class ProcessPeer:
    """A process with the other ends of any number of pipes of one class."""

    def __init__(
        self,
        pipe_class: type[Pipe],
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        peer_device: str | None = None,
        *,
        renumber: bool = True,
    ) -> None:
        """Start the process.

        Args:
            pipe_class: must be importable there by its module and name.
            options: `PipeSpec.options` of all ends.
            device: of the ends in this process.
            peer_device: of those in the other one, if it is another; named as in this process.
            renumber: let the other process see the CUDA devices in reverse order, so that
                the same device has another number there.

        """
        self.pipe_class, self.options, self.device = pipe_class, dict(options or {}), device
        there, environ = seen_there(peer_device or device, renumber=renumber)
        ours, theirs = multiprocessing.Pipe()
        where = f"{pipe_class.__module__}:{pipe_class.__qualname__}"
        self._process = multiprocessing.get_context("spawn").Process(
            target=_main,
            args=(theirs, where, self.options, there, environ),
            name="kvconnect-test-peer",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._numbers = itertools.count(1)
        self._opened: list[Pipe] = []
        self.channel = ConnectionChannel(ours, "kvconnect-test-peer")
        self.channel.start()
        try:  # importing torch takes what it takes: no law's deadline counts it
            self.channel.call("ready", {}).result(START_S)
        except (BrokenError, TimeoutError) as error:
            self.close()
            raise BrokenError(f"the other process did not start; a new one has to be able to import {where}") from error

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

        pipe = self.pipe_class.open(PipeSpec("asks", exchange, self.device, timeout_s, self.options))
        self._opened.append(pipe)
        return RemoteEnd(pipe, self, number)

    def kill(self) -> None:
        """End the process at once (SIGKILL) and wait until it is gone."""
        self._process.kill()
        self._process.join(LIMIT_S)

    def freeze(self) -> None:
        """Stop the process where it is (SIGSTOP); return once all its threads stand still."""
        os.kill(self._process.pid or 0, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid or 0, os.WSTOPPED)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self._process.pid or 0, signal.SIGCONT)

    def close(self) -> None:
        """Kill the process, abort what was joined to it and release what belongs to it. Idempotent."""
        self.kill()
        for pipe in self._opened:
            pipe.abort()
        self.channel.close()


class _Ends:
    """All ends of the process."""

    def __init__(
        self, pipe_class: type[Pipe], options: Mapping[str, Any], channel: ConnectionChannel, device: str
    ) -> None:
        self._pipe_class, self._options, self._channel, self._device = pipe_class, options, channel, device
        self._ends: dict[int, Future[DrivenEnd]] = {}

    def open(self, body: dict[str, Any]) -> Future[dict[str, Any]]:
        """Open the serving end; the answer is what it exchanges."""
        answer: Future[dict[str, Any]] = Future()
        number: int = body["pipe"]

        def exchange(mine: Body) -> Body:
            answer.set_result(dict(mine))
            theirs: Body = body["mine"]
            return theirs

        def open_end() -> DrivenEnd:
            spec = PipeSpec("serves", exchange, self._device, body["timeout_s"], self._options)
            return DrivenEnd(self._pipe_class.open(spec), ScopedChannel(self._channel, number), self._device)

        def opened(end: Future[DrivenEnd]) -> None:
            error = end.exception()
            if error is not None and not answer.done():
                answer.set_exception(error)

        self._ends[number] = spawn(open_end)
        self._ends[number].add_done_callback(opened)
        return answer

    def tell(self, body: dict[str, Any]) -> Future[dict[str, Any]]:
        """Run one command in a thread of its own."""
        opening = self._ends[body["pipe"]]
        return spawn(lambda: opening.result(LIMIT_S).obey(body["command"], body["arguments"]))


def seen_there(device: str, *, renumber: bool) -> tuple[str, dict[str, str]]:
    """Return the name of ``device`` in a process that is given the returned environment."""
    if not is_cuda(device) or not renumber:
        return device, {}
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    # Entries beyond the devices there are (a bad one hides those behind it) would come first.
    turned = reversed(visible.split(",")[:count])
    return f"cuda:{count - 1 - (torch.device(device).index or 0)}", {"CUDA_VISIBLE_DEVICES": ",".join(turned)}


def _main(
    connection: Connection, where: str, options: Mapping[str, Any], device: str, environ: Mapping[str, str]
) -> None:
    os.environ.update(environ)  # before anything here asks CUDA for devices
    module, _, name = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    channel = ConnectionChannel(connection, "kvconnect-test-peer")
    ends = _Ends(found, options, channel, device)
    channel.handle("ready", lambda _: {})
    channel.handle("open", ends.open)
    channel.handle("tell", ends.tell)
    channel.start()
    channel.join()
