"""The whole hand-over as the connectors make it, without an engine: ids in hand → bytes that a kernel may read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.gpu.contender import Contender, Host, Ids
from kvconnect.buffers.base import Claim, EndSettings, LookupKey, Miss, Want
from kvconnect.buffers.remote import RemoteBuffer
from kvconnect.config import Config, parse_backend

#: From where the clock runs: D has its claim, granted by P; or no more than the ticket.
CLAIM, TICKET = "claim", "ticket"

_LIMIT_S = 20.0
_POLL_S = 0.5e-3


class HandOver(Contender):
    """Both ends of `RemoteBuffer` in either process, over the pipe that is named, with ``checksum`` or without.

    P lends blocks for a ticket, which names them. D looks, has its claim, reads. The clock
    ends when the bytes are in place *and* P has promised that they were the right ones:
    an engine may compute with them. By way of `CLAIM` it starts when P has granted the
    claim, as it has while a request waits to be scheduled; by way of `TICKET` before D
    looks, so that the round trip of the claim runs beside the read. The two ends of D are in
    one process, as those of an engine without tensor parallelism.
    """

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        config = Config(
            group=str(options["group"]),
            connect_timeout_s=_LIMIT_S,
            transfer_timeout_s=_LIMIT_S,
            lease_s=120.0,
            checksum=bool(options.get("checksum", False)),
        )
        settings = EndSettings(
            "bench-D" if host.near else "bench-P",
            {"model": "bench"},
            num_parts=1,
            produces=not host.near,
            consumes=host.near,
            options=config,
            pipe=parse_backend("pipe", options["pipe"]),
        )
        self._end = RemoteBuffer.scheduler_end(settings)
        self._worker = RemoteBuffer.worker_end(settings, 0, host.pools[str(options["layout"])].memory)
        self._end.introduce([self._worker.describe()])
        self._number = 0

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`."""
        return [self._one(way, to_ids) for to_ids in near]

    def assist(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> None:
        """Lend the blocks that D is about to read."""
        for ids in far:
            asked = self.host.peer.recv()
            key = _key(int(asked["number"]))
            self.host.peer.send({"ticket": self._end.offer(key, (tuple(ids),), label=None, asked=True)})
            self._end.drain_released()

    def _one(self, way: str, to_ids: Ids) -> float:
        self._number += 1
        request = f"request-{self._number}"
        ticket = self.host.peer.swap({"number": self._number})["ticket"]
        start = time.perf_counter()
        self._end.look(request, Want(_key(self._number), ticket=ticket))
        claim = self._claim(request)
        if way != TICKET:
            _wait_until(lambda: claim.promise.holds(_LIMIT_S))
            start = time.perf_counter()
        transfer = self._worker.read(claim, claim.blocks, (tuple(to_ids),), _ignore)
        transfer.wait(_LIMIT_S)
        took = time.perf_counter() - start
        self._end.settle(request)
        return took

    def _claim(self, request: str) -> Claim:
        # At once, but for the very first one, which is not timed.
        _wait_until(lambda: self._end.found(request) is not None)
        answer = self._end.commit(request)
        if isinstance(answer, Miss):
            raise RuntimeError(  # noqa: TRY004 - a miss is an answer, not a mistake of type
                f"no claim: {answer.cause} {answer.detail}"
            )
        return answer


def _wait_until(come: Callable[[], bool]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + _LIMIT_S
    while not come():
        if time.monotonic() > deadline:
            raise TimeoutError("no claim in time")
        pause.wait(_POLL_S)


def _key(number: int) -> LookupKey:
    return LookupKey("bench", number.to_bytes(16, "big"), number)


def _ignore(_: object) -> None:
    """Do nothing: the caller waits."""
