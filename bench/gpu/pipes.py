"""Registered pipes through their public methods, between the pools of P and D."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.ends import PipeEnd
from bench.gpu.contender import Contender, Host, Ids
from bench.link import Scoped
from kvconnect.pipes.base import Pipe

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
        """See `Contender.time`: from the ids to a transfer that is over."""
        if self._pipe is None:
            raise RuntimeError("the pipe is not open")
        found = []
        for to_ids, from_ids in zip(near, far, strict=True):
            start = time.perf_counter()
            if way == "read":
                self._pipe.read_blocks([from_ids], [to_ids]).wait(_LIMIT_S)
            else:
                self._pipe.write_blocks([from_ids], [to_ids]).wait(_LIMIT_S)
            found.append(time.perf_counter() - start)
        return found
