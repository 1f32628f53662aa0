"""Pipes with both ends at hand: two in one process, or one in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvconnect.pipes.base import Pipe, PipeSpec
from kvconnect.testing.channels import MemoryChannel, MemoryExchange, memory_channels

T = TypeVar("T")

#: Nothing in a test waits longer than this for anything.
LIMIT_S = 30.0


@dataclass
class PipePair:
    """Two joined, open ends in this process; ``here`` asked and ``there`` serves."""

    here: Pipe
    there: Pipe
    channels: tuple[MemoryChannel, MemoryChannel]
    pipe_class: type[Pipe]
    options: Mapping[str, Any]
    timeout_s: float
    #: Where the tensors and the paged memory of `here` are, and those of `there`.
    device: str = "cpu"
    peer_device: str = "cpu"
    _others: list[PipePair] = field(default_factory=list)

    def another(self, timeout_s: float | None = None) -> PipePair:
        """Open one more pair of the same class; `close` ends it, too."""
        pair = self.opened_anew(self.timeout_s if timeout_s is None else timeout_s)
        self._others.append(pair)
        return pair

    def opened_anew(self, timeout_s: float) -> PipePair:
        """Open one more pair of the same class, for the caller to close."""
        return open_pair(self.pipe_class, self.options, timeout_s, self.device, self.peer_device)

    def device_of(self, pipe: Pipe) -> str:
        """Return the device of one of the two ends."""
        return self.device if pipe is self.here else self.peer_device

    def close(self) -> None:
        """Abort both ends of this pair and of `another`."""
        for pair in self._others:
            pair.close()
        for pipe in (self.here, self.there):
            pipe.abort()
        for channel in self.channels:
            channel.close()


def open_pair(
    pipe_class: type[Pipe],
    options: Mapping[str, Any] | None = None,
    timeout_s: float = 10.0,
    device: str = "cpu",
    peer_device: str | None = None,
) -> PipePair:
    """Open both ends in this process, each in a thread of its own meanwhile.

    Args:
        pipe_class: what to open.
        options: `PipeSpec.options` of both ends.
        timeout_s: `PipeSpec.timeout_s` of both ends.
        device: `PipeSpec.device` of the end that asks.
        peer_device: that of the end that serves, if it is another one.

    """
    options, peer_device = options or {}, peer_device or device
    exchange = MemoryExchange(LIMIT_S)

    def serve() -> Pipe:
        exchange.await_asked()
        return _open(PipeSpec("serves", exchange.serve, peer_device, timeout_s, options))

    def _open(spec: PipeSpec) -> Pipe:
        try:
            return pipe_class.open(spec)
        except BaseException as error:
            exchange.fail(error)
            raise

    there = spawn(serve)
    here = spawn(lambda: _open(PipeSpec("asks", exchange.ask, device, timeout_s, options)))
    ends = [here.exception(LIMIT_S), there.exception(LIMIT_S)]
    if error := next((e for e in ends if e is not None), None):
        for end in (here, there):
            if end.exception() is None:
                end.result().abort()
        raise error
    return PipePair(
        here.result(), there.result(), memory_channels(), pipe_class, options, timeout_s, device, peer_device
    )


def spawn(work: Callable[[], T], name: str = "kvconnect-test") -> Future[T]:
    """Run ``work`` in a daemon thread of its own."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the outcome
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
