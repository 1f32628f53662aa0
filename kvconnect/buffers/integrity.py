"""Whether what was read is what the owner has: both sum up their blocks, whatever the pipe.

The reader asks the owner's worker for the sum of the blocks when it starts to read
them, so that the owner sums while the bytes move, and compares it with the sum of its
own blocks once they are in place. Only blocks that compare equal are decoded from.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from kvconnect import blocks as paged
from kvconnect import sums
from kvconnect.buffers import fields
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.links import Link
from kvconnect.buffers.promise import Answer
from kvconnect.buffers.station import Station, foreign
from kvconnect.control import ControlServer
from kvconnect.errors import BrokenError, BusyError, ClosedError, IntegrityError, KVConnectError
from kvconnect.paging import BlockIds
from kvconnect.pipes import flows
from kvconnect.pipes.base import Message

Then = Callable[[KVConnectError | None], None]

#: What the sums that one pipe's other end waits for may cost, in blocks: 16 million tokens at a time.
_MAX_DUE: Final = 1 << 20
_COST_OF_ONE: Final = 64


class Integrity:
    """Sums of one worker's blocks: for those who read them, and to compare what it has read itself."""

    def __init__(self, station: Station, server: ControlServer, crew: Crew, serves: Callable[[str], bool]) -> None:
        """Answer ``pipe.sum`` at ``server`` to whoever has a pipe that this worker ``serves``; sum up on ``crew``."""
        self._station, self._crew, self._serves = station, crew, serves
        self._memory = station.memory
        self._lock, self._due = threading.Lock(), Counter[str]()
        server.handle("pipe.sum", self._handle)

    def ask(self, link: Link | None, remote: BlockIds) -> Answer:
        """Ask the owner for the sum of its blocks ``remote``, which are read over ``link``."""
        line = None if link is None else link.line
        if line is None:
            failed: Answer = Future()
            failed.set_exception(BrokenError("the pipe was closed before the owner could be asked for a sum"))
            return failed
        body = {"pipe": line.id, "groups": flows.pack(remote), "device": self._memory.device}
        timeout_s = self._station.settings.options.transfer_timeout_s
        return self._station.client.call(line.endpoint, "pipe.sum", body, timeout_s)

    def compare(self, answer: Answer, local: BlockIds, then: Then) -> None:
        """Call ``then``, with `IntegrityError` unless our blocks ``local`` have the sum that the owner answers.

        Whatever else goes wrong is an error, too: what cannot be checked is not used.
        """

        def check() -> None:
            try:
                body = answer.result()
                theirs = fields.binary(body, "sum")
                ours = _packed(sums.of_blocks(self._memory, local, fields.text(body, "kind")))
            except Exception as error:  # noqa: BLE001 - kernels may raise anything; the load must hear of it
                then(foreign(error))
                return
            then(None if ours == theirs else IntegrityError("the blocks that arrived are not those of the owner"))

        def heard(_: Answer) -> None:
            if not self._crew.submit(check):
                then(ClosedError("the buffer was closed"))

        answer.add_done_callback(heard)

    def _handle(self, body: dict[str, Any]) -> Future[Message]:
        pipe, device = fields.text(body, "pipe"), fields.text(body, "device")
        if not self._serves(pipe):
            raise BrokenError("the peer has closed its end of the pipe")
        blocks = flows.unpack(body.get("groups"))
        paged.check_counts(self._memory.layout, blocks)
        self._memory.layout.check(blocks)
        kind = sums.kind_for(self._memory.device, device)
        answer: Future[Message] = Future()
        self._count(pipe, _COST_OF_ONE + sum(map(len, blocks)), answer)

        def add_up() -> None:
            try:
                if not self._serves(pipe):
                    raise BrokenError("the pipe was closed before its turn came")
                found = sums.of_blocks(self._memory, blocks, kind)
            except Exception as error:  # noqa: BLE001 - kernels may raise anything; the peer must hear of it
                answer.set_exception(foreign(error))
            else:
                answer.set_result({"kind": kind, "sum": _packed(found).hex()})

        if not self._crew.submit(add_up, lane=pipe):
            answer.set_exception(ClosedError("the peer is shutting down"))
        return answer

    def _count(self, pipe: str, cost: int, answer: Future[Message]) -> None:
        """Bound what waits for its turn: a peer that asks and asks is refused, not remembered."""

        def forget(_: Future[Message]) -> None:
            with self._lock:
                self._due[pipe] -= cost
                if not self._due[pipe]:
                    del self._due[pipe]

        with self._lock:
            if self._due[pipe] and self._due[pipe] + cost > _MAX_DUE:
                raise BusyError("the peer waits for the sums of too many blocks already")
            self._due[pipe] += cost
        answer.add_done_callback(forget)


def _packed(found: int) -> bytes:
    return found.to_bytes(8, "little")
