"""Open pipes between workers: those that this one asked for.

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
from dataclasses import dataclass, field
from typing import Any

from kvconnect.buffers import fields
from kvconnect.buffers.base import EndSettings
from kvconnect.buffers.channels import Channels, Side
from kvconnect.buffers.choice import choose_pipe
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.hello import Hello, check_shapes
from kvconnect.buffers.peers import RETRY_S, Peer, Peers, worker_of
from kvconnect.buffers.recent import Recent
from kvconnect.control import ControlClient, wait_for
from kvconnect.errors import BrokenError, ClosedError, KVConnectError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Message, Pipe, PipeSpec

logger = logging.getLogger(__name__)

#: Given to an exchange or a reply beyond its own deadline, so that the error is the deadline's.
_SLACK_S = 1.0
#: From here on, failures whose time is over are forgotten.
_MAX_LINKS = 1024

Then = Callable[["Link | KVConnectError"], None]


@dataclass(frozen=True)
class Station:
    """One worker: what both ends of its pipes are opened with.

    Args:
        settings: of its engine.
        me: its engine's hello.
        worker: its own description (`WorkerEnd.describe`).
        memory: its paged memory.
        client: for asking peers; its thread owns `Links`.
        channels: of all its pipes.

    """

    settings: EndSettings
    me: Hello
    worker: Mapping[str, Any]
    memory: PagedMemory
    client: ControlClient
    channels: Channels

    def open(self, cls: type[Pipe], name: str, side: Side, exchange: Callable[[Message], Message]) -> Pipe:
        """Open one end; options belong to the pipe that the configuration names."""
        chosen = self.settings.pipe
        options = chosen.options if chosen.name == name else {}
        spec = PipeSpec(side, exchange, self.memory.device, self.settings.options.transfer_timeout_s, options)
        pipe = cls.open(spec)
        if "timeout_s" not in vars(pipe) and cls.timeout_s is Pipe.timeout_s:
            # Its author may have thought of the three methods only.
            pipe.timeout_s = spec.timeout_s
        return pipe


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

    @property
    def immediate(self) -> bool:
        """Whether its pipe is open and only enqueues what is to be read."""
        return self.pipe is not None and self.pipe.traits.immediate


class Links:
    """Pipes that this worker asked for, by owner."""

    def __init__(self, station: Station, crew: Crew, ending: Crew) -> None:
        """Join ``station`` to its counterparts; pipes are opened on ``crew`` and aborted on ``ending``."""
        self._station, self._crew, self._ending = station, crew, ending
        self._client, self._channels, self._options = station.client, station.channels, station.settings.options
        self._peers = Peers(station.me, station.client, self._options.connect_timeout_s)
        self._links: dict[tuple[str, str], Link] = {}
        self._told: Recent[str] = Recent()

    def at_hand(self, at: str, incarnation: str) -> Link | None:
        """Return the link to an owner if its pipe is open and may be asked by any thread there and then."""
        link = self._links.get((at, incarnation))
        return link if link is not None and link.immediate else None

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
        elif not self._crew.submit(lambda: self._open(link, hello), lane=link.at):
            self._opened(link, ClosedError("the buffer was closed"))

    def _opened(self, link: Link, failure: KVConnectError | None = None) -> None:
        link.failure, link.retry_at = failure, time.monotonic() + RETRY_S
        if len(self._links) > _MAX_LINKS:
            self._forget_failed()
        for key in [key for key, other in self._links.items() if key[0] == link.at and other is not link]:
            if self._links[key].pipe is not None and failure is None:
                self.drop(self._links[key])  # of an earlier incarnation
        waiting, link.waiting = link.waiting, []
        for then in waiting:
            then(failure or link)

    def _forget_failed(self) -> None:
        """Forget failures whose time is over; addresses and incarnations are whatever tickets say."""
        now = time.monotonic()
        for key, link in list(self._links.items()):
            if link.failure is not None and not link.waiting and link.retry_at <= now:
                del self._links[key]

    def drop(self, link: Link) -> None:
        """Forget a link and end its pipe; the next `get` opens another."""
        if self._links.get((link.at, link.incarnation)) is link:
            del self._links[link.at, link.incarnation]
        pipe, link.pipe = link.pipe, None
        if pipe is not None:
            self._channels.close(link.id, "asks")
            self._ending.submit(pipe.abort)
            self._tell_closed(link)

    def _tell_closed(self, link: Link) -> None:
        if link.endpoint:
            self._client.call(link.endpoint, "pipe.close", {"pipe": link.id}, self._options.release_timeout_s)

    def lost(self, pipe: str) -> None:
        """The other end of a pipe is gone."""
        for link in [link for link in self._links.values() if link.id == pipe]:
            self.drop(link)

    def drop_all(self) -> None:
        """End every pipe, and tell the peers so."""
        for link in list(self._links.values()):
            self.drop(link)

    # -- on the crew: may block -------------------------------------------------------

    def _open(self, link: Link, hello: Hello) -> None:
        try:
            pipe = self._join(link, hello)
        except Exception as error:  # noqa: BLE001 - a third party's pipe may raise anything; the readers must hear of it
            failure = foreign(error)
            self._complain(f"no pipe to {link.at}: {failure}")
            self._channels.close(link.id, "asks")
            self._tell_closed(link)  # or its end waits for ours, and our next one waits behind it
            self._client.soon(lambda: self._opened(link, failure))
            return

        def opened() -> None:
            link.pipe = pipe
            if self._links.get((link.at, link.incarnation)) is link:
                self._opened(link)
                return
            self.drop(link)  # it was dropped meanwhile
            self._opened(link, ClosedError("the pipe was closed while it was opened"))

        if not self._client.soon(opened):
            pipe.abort()

    def _join(self, link: Link, hello: Hello) -> Pipe:
        theirs = worker_of(hello, self._station.worker["rank"])
        check_shapes(self._station.worker, theirs)
        link.name, cls, passed = choose_pipe(self._station.worker, theirs)
        link.id, link.endpoint = secrets.token_hex(8), fields.text(theirs, "endpoint")
        channel = self._channels.open(link.id, "asks", link.endpoint)
        timeout_s = self._options.connect_timeout_s
        exchanged = False

        def exchange(message: Message) -> Message:
            nonlocal exchanged
            exchanged = True
            body = {
                "pipe": link.id,
                "name": link.name,
                "message": dict(message),
                "hello": self._station.me.to_wire(),
                "worker": dict(self._station.worker),
            }
            answer = wait_for(self._client.call(link.endpoint, "pipe.open", body, timeout_s), timeout_s + _SLACK_S)
            return fields.mapping(answer, "message")

        pipe = self._station.open(cls, link.name, "asks", exchange)
        try:
            if not exchanged:
                exchange({})
            pipe.attach(self._station.memory, PagedLayout.from_wire(fields.mapping(theirs, "layout")), channel)
            # The serving end attaches after its answer to `exchange`; its blocks may be read from now on.
            wait_for(self._client.call(link.endpoint, "pipe.ready", {"pipe": link.id}, timeout_s), timeout_s + _SLACK_S)
        except BaseException:
            pipe.abort()
            raise
        self._tell(link, passed)
        return pipe

    def _complain(self, line: str) -> None:
        logger.log(logging.WARNING if self._told.add(line) else logging.DEBUG, line)

    def _tell(self, link: Link, passed: Mapping[str, str]) -> None:
        line = f"{link.name} (" + "; ".join(f"not {name}: {why}" for name, why in sorted(passed.items())) + ")"
        level = logging.INFO if self._told.add(line) else logging.DEBUG
        logger.log(level, "reading from %s over %s", link.at, line if passed else link.name)
