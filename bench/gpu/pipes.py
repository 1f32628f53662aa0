"""Registered pipes through their public methods, between the pools of P and D."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from bench.gpu.contender import Contender, Host, Ids
from kvconnect.bench.ends import PipeEnd
from kvconnect.bench.link import Scoped
from kvconnect.pipes.base import Pipe, Transfer

_LIMIT_S = 20.0


class RegisteredPipe(Contender):
    """One registered pipe, attached to one of the pools. ``read`` is begun by D, ``write`` by P."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        self._name, self._layout = str(options["pipe"]), str(options["layout"])
        self._pipe: Pipe | None = None

    def meet(self, theirs: dict[str, Any]) -> None:
        """Open this end and attach it; the exchange goes straight to the other process."""
        side, exchange = ("asks", self.host.peer.swap) if self.host.near else ("serves", self.host.peer.answer)
        options = dict(self.options.get("options", {}))
        self._pipe = PipeEnd(self._name, options, side, exchange, self.host.device).pipe  # type: ignore[arg-type]
        pool = self.host.pools[self._layout]
        self._pipe.attach(pool.memory, pool.layout, Scoped(self.host.channel, f"{self._name} {self._layout}"))

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`: from the ids to a transfer that is over.

        An engine looks whether a load is over between two steps, it does not sleep until then. So
        what counts is when the transfer says so, not when a thread that slept would have woken.
        """
        if self._pipe is None:
            raise RuntimeError("the pipe is not open")
        move = self._pipe.read_blocks if way == "read" else self._pipe.write_blocks
        return [time_of(lambda ids=ids: move([ids[1]], [ids[0]])) for ids in zip(near, far, strict=True)]  # type: ignore[misc]


def time_of(start: Callable[[], Transfer]) -> float:
    """Return the seconds from a call that starts a transfer until the transfer says that it is over."""
    over: SimpleQueue[float] = SimpleQueue()
    began = time.perf_counter()
    transfer = start()
    transfer.add_done_callback(lambda _: over.put(time.perf_counter()))
    try:
        took = over.get(timeout=_LIMIT_S) - began
    except Empty:
        took = _LIMIT_S
    transfer.wait(0)
    return took
