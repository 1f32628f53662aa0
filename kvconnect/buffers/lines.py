"""Pipes to peers' workers, one by one: the asking ends are opened, each within a time, and ended.

Opening is foreign code as much as ours, and may hang. It runs on a thread of its own;
what comes of it too late is ended there and then.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from kvconnect.buffers import fields, layouts
from kvconnect.buffers.choice import Candidate
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.station import Station, foreign
from kvconnect.control import wait_for
from kvconnect.errors import BusyError, ClosedError, DeadlineError
from kvconnect.paging import BlockIds
from kvconnect.pipes.base import Message, Pipe, Transfer

#: Given to an exchange or a reply beyond its own deadline, so that the error is the deadline's.
_SLACK_S = 1.0
#: Openings of one medium, each of which holds a thread: the others need some, too.
_MAX_HANGING = 3


@dataclass(eq=False)
class Line:
    """One pipe to a peer's worker, from before it is opened until it is ended."""

    name: str
    endpoint: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    pipe: Pipe | None = None
    ended: bool = False


class Lines:
    """Opens and ends lines. Thread-safe."""

    def __init__(self, station: Station, crew: Crew, ending: Crew) -> None:
        """Open pipes, and start reads that may block, on ``crew``; abort pipes on ``ending``."""
        self._station, self._crew, self._ending = station, crew, ending
        self._timeout_s = station.settings.options.connect_timeout_s
        #: How long an opening takes at most that the peer answers in time: there are two questions.
        self.limit_s = 2 * (self._timeout_s + _SLACK_S)
        self._lock = threading.Lock()
        self._hanging: Counter[str] = Counter()

    def open(self, candidate: Candidate, theirs: Mapping[str, Any], timeout_s: float) -> Line:
        """Open a pipe to the worker that describes itself as ``theirs``; blocks for at most ``timeout_s``.

        Raises:
            KVConnectError: it cannot be opened, or not in time; nothing is left of it at either end.

        """
        if self._hanging[candidate.name] >= _MAX_HANGING:
            raise BusyError(f"{_MAX_HANGING} such pipes hang still while they are opened")
        line = Line(candidate.name, fields.text(theirs, "endpoint"))
        # A lane of its own: the next pipe to this peer must not wait behind one that hangs.
        opening = self._crew.call(lambda: self._join(line, candidate.cls, theirs), lane=(line.endpoint, line.name))
        wait([opening], timeout_s)
        if not opening.done():
            self._give_up(line, opening)
            raise DeadlineError(f"it did not open within {timeout_s:.3g} s")
        error = opening.exception()
        if error is not None:
            self.end(line)
            raise foreign(error)
        return line

    def _give_up(self, line: Line, opening: Future[None]) -> None:
        """End a line whose opening hangs, and what comes of it after all."""

        def late(_: Future[None]) -> None:
            self.end(line)
            with self._lock:
                self._hanging[line.name] -= 1

        self.end(line)
        with self._lock:
            self._hanging[line.name] += 1
        opening.add_done_callback(late)

    def _join(self, line: Line, cls: type[Pipe], theirs: Mapping[str, Any]) -> None:
        _check(line)
        channel = self._station.channels.open(line.id, "asks", line.endpoint)
        exchanged = False

        def exchange(message: Message) -> Message:
            nonlocal exchanged
            exchanged = True
            body = {
                "name": line.name,
                "message": dict(message),
                "hello": self._station.me.to_wire(),
                "worker": dict(self._station.worker),
            }
            return fields.mapping(self._ask(line, "pipe.open", body), "message")

        line.pipe = pipe = self._station.open(cls, line.name, "asks", exchange)
        if not exchanged:
            exchange({})
        pipe.attach(self._station.memory, layouts.read(theirs), channel)
        # The serving end attaches after its answer to `exchange`; its blocks may be read from now on.
        self._ask(line, "pipe.ready", {})

    def _ask(self, line: Line, op: str, body: Message) -> dict[str, Any]:
        _check(line)
        call = self._station.client.call(line.endpoint, op, {**body, "pipe": line.id}, self._timeout_s)
        return wait_for(call, self._timeout_s + _SLACK_S)

    def read(self, line: Line, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start a read from wherever; whatever goes wrong is the transfer's error."""
        pipe, inner = line.pipe, list[Transfer]()

        def cancel() -> None:
            for moving in inner:
                moving.cancel()

        whole = Transfer(self._station.memory.layout.nbytes(local), cancel)

        def start() -> None:
            try:
                if pipe is None:
                    raise ClosedError("the pipe was closed")
                inner.append(pipe.read_blocks(remote, local))
            except Exception as error:  # noqa: BLE001 - a third party's may raise anything
                whole.finish(foreign(error))
                return
            if whole.cancelled:
                inner[0].cancel()
            inner[0].add_done_callback(lambda over: whole.finish(over.error))

        if pipe is None or pipe.traits.immediate:
            start()
        elif not self._crew.submit(start, lane=line):
            whole.finish(ClosedError("the buffer was closed"))
        return whole

    def end(self, line: Line) -> None:
        """End a pipe at both ends, and what moves over it; a second call does no harm."""
        line.ended = True
        self._station.channels.close(line.id, "asks")
        pipe, line.pipe = line.pipe, None
        if pipe is not None and not self._ending.submit(pipe.abort):
            pipe.abort()
        # Or its end waits for ours, and our next one waits behind it.
        timeout_s = self._station.settings.options.release_timeout_s
        self._station.client.call(line.endpoint, "pipe.close", {"pipe": line.id}, timeout_s)


def _check(line: Line) -> None:
    if line.ended:
        raise ClosedError("the pipe was given up while it was opened")
