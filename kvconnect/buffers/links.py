"""Open pipes between workers: those we asked for and those we serve.

The asking worker names the pipe, opens its end on a thread that may block, and
swaps `PipeSpec.exchange`'s message with the peer's control server; the peer opens
and attaches the serving end. Readers of a peer that is just being met wait on one
opening.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvconnect import registry
from kvconnect.buffers import fields
from kvconnect.buffers.base import EndSettings
from kvconnect.buffers.channels import Channels
from kvconnect.buffers.choice import choose_pipe
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.hello import Hello, check_fit, check_shapes
from kvconnect.buffers.peers import RETRY_S, Peer, Peers, worker_of
from kvconnect.control import ControlClient, ControlServer, wait_for
from kvconnect.errors import BrokenError, ClosedError, HandshakeError, KVConnectError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Message, Pipe, PipeSpec

logger = logging.getLogger(__name__)

Then = Callable[["Link | KVConnectError"], None]


def pipe_spec(
    settings: EndSettings, name: str, side: Any, device: str, exchange: Callable[[Message], Message]
) -> PipeSpec:
    """Return the spec of one end; options belong to the pipe that the configuration names."""
    options = settings.pipe.options if settings.pipe.name == name else {}
    return PipeSpec(side, exchange, device, settings.options.transfer_timeout_s, options)


def foreign(error: Exception) -> KVConnectError:
    """Return a pipe's error, or whatever a third party's pipe raised, as one of ours."""
    if isinstance(error, KVConnectError):
        return error
    broken = BrokenError(f"the pipe failed: {type(error).__name__}: {error}")
    broken.__cause__ = error
    return broken


@dataclass(eq=False)
class Link:
    """One peer worker, as the asking end sees it. Lives on the control client's thread."""

    at: str
    incarnation: str
    pipe: Pipe | None = None
    name: str = ""
    id: str = ""
    endpoint: str = ""
    failure: KVConnectError | None = None
    retry_at: float = 0.0
    waiting: list[Then] = field(default_factory=list)


class Links:
    """Pipes that this worker asked for, by owner."""

    def __init__(
        self,
        settings: EndSettings,
        mine: Mapping[str, Any],
        memory: PagedMemory,
        me: Hello,
        client: ControlClient,
        channels: Channels,
        crew: Crew,
    ) -> None:
        """Join the worker described by ``mine`` to its counterparts."""
        self._settings, self._mine, self._memory, self._me = settings, mine, memory, me
        self._client, self._channels, self._crew = client, channels, crew
        self._peers = Peers(me, client, settings.options.connect_timeout_s)
        self._links: dict[tuple[str, str], Link] = {}
        self._told: set[str] = set()

    # -- on the client's thread -----------------------------------------------------

    def get(self, at: str, incarnation: str, then: Then) -> None:
        """Call ``then`` with the open link to the owner at ``at``, or with why there is none."""
        link = self._links.setdefault((at, incarnation), Link(at, incarnation))
        if link.pipe is not None:
            then(link)
        elif link.failure is not None and time.monotonic() < link.retry_at:
            then(link.failure)
        else:
            link.waiting.append(then)
            if len(link.waiting) == 1:
                self._peers.meet(at, lambda peer: self._met(link, peer), incarnation)

    def _met(self, link: Link, peer: Peer) -> None:
        hello = peer.hello
        if hello is None:
            self._opened(link, BrokenError(peer.failure.detail if peer.failure else "the peer cannot be reached"))
        elif hello.incarnation != link.incarnation:
            self._opened(link, BrokenError(f"engine {hello.engine} was restarted"))
        elif not self._crew.submit(lambda: self._open(link, hello)):
            self._opened(link, ClosedError("the buffer was closed"))

    def _opened(self, link: Link, failure: KVConnectError | None = None) -> None:
        link.failure, link.retry_at = failure, time.monotonic() + RETRY_S
        for key in [key for key, other in self._links.items() if key[0] == link.at and other is not link]:
            if self._links[key].pipe is not None and failure is None:
                self.drop(self._links[key])  # of an earlier incarnation
        waiting, link.waiting = link.waiting, []
        for then in waiting:
            then(failure or link)

    def drop(self, link: Link) -> None:
        """Forget a link and end its pipe; the next `get` opens another."""
        if self._links.get((link.at, link.incarnation)) is link:
            del self._links[link.at, link.incarnation]
        pipe, link.pipe = link.pipe, None
        if pipe is not None:
            self._channels.close(link.id)
            self._crew.submit(pipe.abort)
            self._client.call(link.endpoint, "pipe.close", {"pipe": link.id}, self._settings.options.release_timeout_s)

    def lost(self, pipe: str) -> None:
        """The other end of a pipe is gone."""
        for link in [link for link in self._links.values() if link.id == pipe]:
            self.drop(link)

    def take_all(self) -> list[Pipe]:
        """Forget every link and return the pipes, for whoever closes. Any thread, after the client's end."""
        links, self._links = list(self._links.values()), {}
        return [link.pipe for link in links if link.pipe is not None]

    # -- on the crew: may block -------------------------------------------------------

    def _open(self, link: Link, hello: Hello) -> None:
        try:
            pipe = self._join(link, hello)
        except Exception as error:  # a third party's pipe may raise anything; the readers must hear of it
            failure = foreign(error)
            logger.warning("no pipe to %s: %s", link.at, failure)
            self._channels.close(link.id)
            self._client.soon(lambda: self._opened(link, failure))
            return

        def opened() -> None:
            link.pipe = pipe
            self._opened(link)

        if not self._client.soon(opened):
            pipe.abort()

    def _join(self, link: Link, hello: Hello) -> Pipe:
        theirs = worker_of(hello, self._mine["rank"])
        check_shapes(self._mine, theirs)
        link.name, cls, passed = choose_pipe(self._mine, theirs)
        link.id, link.endpoint = secrets.token_hex(8), fields.text(theirs, "endpoint")
        channel = self._channels.open(link.id, link.endpoint)
        timeout_s = self._settings.options.connect_timeout_s
        exchanged = False

        def exchange(message: Message) -> Message:
            nonlocal exchanged
            exchanged = True
            body = {
                "pipe": link.id,
                "name": link.name,
                "message": dict(message),
                "hello": self._me.to_wire(),
                "worker": dict(self._mine),
            }
            answer = wait_for(self._client.call(link.endpoint, "pipe.open", body, timeout_s), timeout_s + 1)
            return fields.mapping(answer, "message")

        pipe = cls.open(pipe_spec(self._settings, link.name, "asks", self._memory.device, exchange))
        try:
            if not exchanged:
                exchange({})
            pipe.attach(self._memory, PagedLayout.from_wire(fields.mapping(theirs, "layout")), channel)
            # The serving end attaches after its answer to `exchange`; its blocks may be read from now on.
            wait_for(self._client.call(link.endpoint, "pipe.ready", {"pipe": link.id}, timeout_s), timeout_s + 1)
        except BaseException:
            pipe.abort()
            raise
        self._tell(link, passed)
        return pipe

    def _tell(self, link: Link, passed: Mapping[str, str]) -> None:
        line = f"{link.name} (" + "; ".join(f"not {name}: {why}" for name, why in sorted(passed.items())) + ")"
        level = logging.DEBUG if line in self._told else logging.INFO
        self._told.add(line)
        logger.log(level, "reading from %s over %s", link.at, line if passed else link.name)


@dataclass(eq=False)
class _Served:
    """One pipe that a peer asked for."""

    id: str
    opened: Future[Message] = field(default_factory=Future)
    ready: Future[Message] = field(default_factory=Future)
    pipe: Pipe | None = None
    dropped: bool = False


class PipeServer:
    """Pipes that peers' workers asked for, over this worker's memory."""

    def __init__(
        self,
        settings: EndSettings,
        mine: Mapping[str, Any],
        memory: PagedMemory,
        me: Hello,
        server: ControlServer,
        channels: Channels,
        crew: Crew,
    ) -> None:
        """Answer ``pipe.open``, ``pipe.ready`` and ``pipe.close`` at ``server``."""
        self._settings, self._mine, self._memory, self._me = settings, mine, memory, me
        self._channels, self._crew = channels, crew
        self._served: dict[str, _Served] = {}
        server.handle("pipe.open", self._handle_open)
        server.handle("pipe.ready", self._handle_ready)
        server.handle("pipe.close", self._handle_close)

    def lost(self, pipe: str) -> None:
        """The other end of a pipe is gone."""
        self.drop(pipe)

    def drop(self, pipe: str) -> None:
        """End a served pipe."""
        served = self._served.pop(pipe, None)
        if served is not None:
            served.dropped = True
            self._channels.close(pipe)
            if served.pipe is not None:
                self._crew.submit(served.pipe.abort)

    def take_all(self) -> list[Pipe]:
        """Forget every pipe and return them, for whoever closes."""
        all_, self._served = list(self._served.values()), {}
        for served in all_:
            served.dropped = True
        return [served.pipe for served in all_ if served.pipe is not None]

    @property
    def count(self) -> int:
        """Pipes served now."""
        return len(self._served)

    # -- on the server's thread ---------------------------------------------------------

    def _handle_open(self, body: dict[str, Any]) -> Future[Message]:
        check_fit(Hello.from_wire(fields.mapping(body, "hello")), self._me)
        worker = fields.mapping(body, "worker")
        check_shapes(worker, self._mine)
        name = fields.text(body, "name")
        if name not in self._mine["pipes"]:
            raise HandshakeError(f"pipe differs: ours {name!r}, theirs one of {sorted(self._mine['pipes'])}")
        served = _Served(fields.text(body, "pipe"))
        if served.id in self._served:
            raise HandshakeError(f"pipe {served.id} is open already")
        channel = self._channels.open(served.id, fields.text(worker, "endpoint"))
        self._served[served.id] = served
        message, layout = fields.mapping(body, "message"), fields.mapping(worker, "layout")
        if not self._crew.submit(lambda: self._open(served, name, message, PagedLayout.from_wire(layout), channel)):
            raise ClosedError("the peer is shutting down")
        return served.opened

    def _handle_ready(self, body: dict[str, Any]) -> Future[Message]:
        served = self._served.get(fields.text(body, "pipe"))
        if served is None:
            raise BrokenError("the peer has closed its end of the pipe")
        return served.ready

    def _handle_close(self, body: dict[str, Any]) -> Message:
        self.drop(fields.text(body, "pipe"))
        return {}

    # -- on the crew: may block -------------------------------------------------------------

    def _open(self, served: _Served, name: str, theirs: Message, layout: PagedLayout, channel: Any) -> None:
        def exchange(message: Message) -> Message:
            served.opened.set_result({"message": dict(message)})
            return theirs

        try:
            served.pipe = registry.pipe(name).open(pipe_spec(self._settings, name, "serves", self._memory.device, exchange))
            if not served.opened.done():
                served.opened.set_result({"message": {}})
            served.pipe.attach(self._memory, layout, channel)
        except Exception as error:  # a third party's pipe may raise anything; the peer must hear of it
            failure = foreign(error)
            logger.warning("a pipe for a peer could not be opened: %s", failure)
            for future in (served.opened, served.ready):
                if not future.done():
                    future.set_exception(failure)
            self.drop(served.id)
            return
        served.ready.set_result({})
        if served.dropped:
            served.pipe.abort()

