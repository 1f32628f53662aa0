"""Open pipes between workers: those that peers asked for."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvconnect import registry
from kvconnect.buffers import fields, layouts
from kvconnect.buffers.channels import PeerChannel
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.hello import Hello, check_fit
from kvconnect.buffers.recent import Recent
from kvconnect.buffers.station import Station, foreign
from kvconnect.control import ControlServer
from kvconnect.errors import BrokenError, ClosedError, HandshakeError
from kvconnect.paging import PagedLayout
from kvconnect.pipes.base import Message, Pipe

logger = logging.getLogger(__name__)


_MAX_PIPES = 4096
_MAX_PIPES_OF_ONE = 64  # one is in use; others are tried, or those of earlier incarnations at its address


@dataclass(eq=False)
class Served:
    """One pipe that a peer asked for."""

    id: str
    peer: str
    opened: Future[Message] = field(default_factory=Future)
    ready: Future[Message] = field(default_factory=Future)
    pipe: Pipe | None = None
    dropped: bool = False


class PipeServer:
    """Pipes that peers' workers asked for, over this worker's memory."""

    def __init__(self, station: Station, server: ControlServer, crew: Crew, ending: Crew) -> None:
        """Answer ``pipe.*`` at ``server``; open pipes on ``crew`` and abort them on ``ending``."""
        self._station, self._channels, self._crew, self._ending = station, station.channels, crew, ending
        self._served: dict[str, Served] = {}
        self._told: Recent[str] = Recent()
        server.handle("pipe.open", self._handle_open)
        server.handle("pipe.ready", self._handle_ready)
        server.handle("pipe.close", self._handle_close)

    def drop(self, pipe: str) -> None:
        """End a served pipe; unknown ones are ignored."""
        served = self._served.pop(pipe, None)
        if served is not None:
            served.dropped = True
            self._channels.close(pipe, "serves")
            if served.pipe is not None:
                self._ending.submit(served.pipe.abort)

    def drop_all(self) -> None:
        """End every pipe."""
        for pipe in list(self._served):
            self.drop(pipe)

    def serves(self, pipe: str) -> bool:
        """Whether a peer has the pipe ``pipe``."""
        return pipe in self._served

    @property
    def count(self) -> int:
        """Pipes served now."""
        return len(self._served)

    # -- on the server's thread ---------------------------------------------------------

    def _handle_open(self, body: dict[str, Any]) -> Future[Message]:
        try:
            return self._admit(body)
        except HandshakeError as error:
            if self._told.add(str(error)):
                logger.warning("a peer's pipe is refused; in its words: %s", error)
            raise

    def _admit(self, body: dict[str, Any]) -> Future[Message]:
        check_fit(Hello.from_wire(fields.mapping(body, "hello")), self._station.me)
        worker = fields.mapping(body, "worker")
        layouts.check_shapes(worker, self._station.worker)
        name = fields.text(body, "name")
        if name not in self._station.worker["pipes"]:
            raise HandshakeError(f"pipe differs: ours {name!r}, theirs one of {sorted(self._station.worker['pipes'])}")
        message, layout = fields.mapping(body, "message"), layouts.read(worker)
        served = Served(fields.text(body, "pipe"), fields.text(worker, "endpoint"))
        self._check_room(served)
        self._station.client.check(served.peer)  # it will be asked whether it is there still
        channel = self._channels.open(served.id, "serves", served.peer)
        self._served[served.id] = served
        # A lane of its own: the peer's next pipe must not wait behind one that hangs.
        lane = (served.peer, name)
        if not self._crew.submit(lambda: self._open(served, name, message, layout, channel), lane):
            self.drop(served.id)
            raise ClosedError("the peer is shutting down")
        return served.opened

    def _check_room(self, served: Served) -> None:
        if served.id in self._served:
            raise HandshakeError(f"pipe {served.id} is open already")
        pipes = list(self._served.values())
        if len(pipes) >= _MAX_PIPES or sum(pipe.peer == served.peer for pipe in pipes) >= _MAX_PIPES_OF_ONE:
            raise HandshakeError("the peer serves too many pipes already")

    def _handle_ready(self, body: dict[str, Any]) -> Future[Message]:
        served = self._served.get(fields.text(body, "pipe"))
        if served is None:
            raise BrokenError("the peer has closed its end of the pipe")
        return served.ready

    def _handle_close(self, body: dict[str, Any]) -> Message:
        self.drop(fields.text(body, "pipe"))
        return {}

    # -- on the crew: may block -------------------------------------------------------------

    def _open(self, served: Served, name: str, theirs: Message, layout: PagedLayout, channel: PeerChannel) -> None:
        def exchange(message: Message) -> Message:
            served.opened.set_result({"message": dict(message)})
            return theirs

        try:
            if served.dropped:
                raise ClosedError("the pipe was given up before its turn came")
            served.pipe = self._station.open(registry.pipe(name), name, "serves", exchange)
            if not served.opened.done():
                served.opened.set_result({"message": {}})
            served.pipe.attach(self._station.memory, layout, channel)
        except Exception as error:  # noqa: BLE001 - a third party's pipe may raise anything; the peer must hear of it
            failure = foreign(error)
            logger.warning("a pipe for a peer could not be opened: %s", failure)
            for future in (served.opened, served.ready):
                if not future.done():
                    future.set_exception(failure)
            self.drop(served.id)
        else:
            served.ready.set_result({})
        if served.dropped and served.pipe is not None:
            served.pipe.abort()
