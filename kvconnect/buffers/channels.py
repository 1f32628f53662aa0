"""Channels beside pipes, and the pipes' lives: all over one control server and client per worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from kvconnect.buffers import fields
from kvconnect.control import ControlClient, ControlServer
from kvconnect.errors import BrokenError, DeadlineError, HandshakeError, KVConnectError
from kvconnect.pipes.base import Message

logger = logging.getLogger(__name__)

_MAX_HELD = 64
#: How often the other end of a pipe is asked whether it is there, and how long it may take to say so.
#: Together one lease, where leases are shorter.
_WATCH_S, _ANSWER_S = 5.0, 7.5
#: Questions a second of one worker, each of which costs it time: with more than 200 pipes the pauses are longer.
_MOST_A_S = 40.0
_MOST_PAUSE_MS = 120_000
#: One answer may be missed: when it is this process that hung, the next one comes.
_MISSES = 2

Side = Literal["asks", "serves"]
_OTHER: dict[Side, Side] = {"asks": "serves", "serves": "asks"}

ChannelHandler = Callable[[dict[str, Any]], Message]


class PeerChannel:
    """A `Channel` to the other end of one pipe.

    A call that comes before its handler waits for it: the two ends attach at
    different times.
    """

    def __init__(self, pipe: str, side: Side, endpoint: str, client: ControlClient, timeout_s: float) -> None:
        """Be the end ``side`` of ``pipe``, and reach the other at its worker's ``endpoint``."""
        self.pipe, self.side, self.endpoint = pipe, side, endpoint
        # Both ends may live in one worker, so that a pipe's name is not enough.
        self.name, self.peer = f"{pipe}/{side}", f"{pipe}/{_OTHER[side]}"
        self._client, self._timeout_s = client, timeout_s
        self._lock = threading.Lock()
        self._handlers: dict[str, ChannelHandler] = {}
        self._held: list[tuple[str, dict[str, Any], Future[Message]]] = []
        self._closed = False
        #: How long the other end, which may have very many pipes, wants to be left alone.
        self.pause_s = 0.0

    def call(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Ask the other end."""
        message = {"pipe": self.peer, "op": op, "body": dict(body)}
        return self._client.call(self.endpoint, "pipe.call", message, self._timeout_s)

    def handle(self, op: str, handler: ChannelHandler) -> None:
        """Answer the other end's calls of ``op``, those that wait for it included."""
        with self._lock:
            self._handlers[op] = handler
            due = [held for held in self._held if held[0] == op]
            self._held = [held for held in self._held if held[0] != op]
        for _, body, future in due:
            _settle(future, handler, body)

    def serve(self, op: str, body: dict[str, Any]) -> Message | Future[Message]:
        """Answer one call, on the control server's thread."""
        with self._lock:
            handler = self._handlers.get(op)
            if handler is None:
                if self._closed or len(self._held) >= _MAX_HELD:
                    raise BrokenError(f"this end of the pipe does not answer {op!r}")
                future: Future[Message] = Future()
                self._held.append((op, body, future))
                return future
        return handler(body)

    def close(self) -> None:
        """Fail the calls that still wait for a handler."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, []
        for _, _, future in held:
            future.set_exception(BrokenError("the other end of the pipe was closed"))


class Channels:
    """All channels of one worker, and a watch over the peers at their other ends."""

    def __init__(
        self,
        server: ControlServer,
        client: ControlClient,
        timeout_s: float,
        lease_s: float,
        on_lost: Callable[[str, Side], None],
    ) -> None:
        """Call ``on_lost(pipe, our side)`` when the other end of a pipe is gone or hangs."""
        self._client, self._timeout_s, self._on_lost = client, timeout_s, on_lost
        haste = min(1.0, lease_s / (_WATCH_S + _ANSWER_S))
        self._watch_s, self._answer_s = _WATCH_S * haste, _ANSWER_S * haste
        self._lock = threading.Lock()
        self._channels: dict[str, PeerChannel] = {}
        server.handle("pipe.call", self._call)
        server.handle("pipe.ping", self._ping)

    def open(self, pipe: str, side: Side, endpoint: str) -> PeerChannel:
        """Make the channel of a new pipe's end."""
        channel = PeerChannel(pipe, side, endpoint, self._client, self._timeout_s)
        with self._lock:
            if channel.name in self._channels:
                raise HandshakeError(f"pipe {pipe} is open already")
            self._channels[channel.name] = channel
        self._watch(channel)
        return channel

    def close(self, pipe: str, side: Side) -> None:
        """Forget the channel of a pipe's end."""
        with self._lock:
            channel = self._channels.pop(f"{pipe}/{side}", None)
        if channel is not None:
            channel.close()

    def _call(self, body: dict[str, Any]) -> Message | Future[Message]:
        pipe, op = fields.text(body, "pipe"), fields.text(body, "op")
        with self._lock:
            channel = self._channels.get(pipe)
        if channel is None:
            raise BrokenError("the other end of the pipe was closed")
        return channel.serve(op, fields.mapping(body, "body"))

    def _ping(self, body: dict[str, Any]) -> Message:
        with self._lock:
            return {"known": fields.text(body, "pipe") in self._channels, "pause_ms": int(self._pause_s * 1000)}

    # A pipe says nothing when its peer's process vanishes while nothing moves, or hangs while
    # something does. The ping finds out, so that a load does not wait for the latter until its
    # own deadline, and a producer does not collect the ends of dead consumers.

    @property
    def _pause_s(self) -> float:
        return max(self._watch_s, len(self._channels) / _MOST_A_S)

    def _watch(self, channel: PeerChannel) -> None:
        self._client.later(max(self._pause_s, channel.pause_s), lambda: self._look_after(channel, 1))

    def _look_after(self, channel: PeerChannel, attempt: int) -> None:
        if self._channels.get(channel.name) is channel:
            call = self._client.call(channel.endpoint, "pipe.ping", {"pipe": channel.peer}, self._answer_s)
            call.add_done_callback(lambda answer: self._seen(channel, answer, attempt))

    def _seen(self, channel: PeerChannel, answer: Future[dict[str, Any]], attempt: int) -> None:
        try:
            known = answer.result().get("known") is True
            channel.pause_s = fields.number(answer.result(), "pause_ms", _MOST_PAUSE_MS) / 1000
        except KVConnectError as error:
            logger.debug("the other end of pipe %s does not answer: %s", channel.name, error)
            if isinstance(error, DeadlineError) and attempt < _MISSES:
                self._look_after(channel, attempt + 1)
                return
            known = False
        if known:
            self._watch(channel)
        elif self._channels.get(channel.name) is channel:
            self._on_lost(channel.pipe, channel.side)


def _settle(future: Future[Message], handler: ChannelHandler, body: dict[str, Any]) -> None:
    try:
        answer = handler(body)
    except KVConnectError as error:
        future.set_exception(error)
    except Exception as error:  # a fault of a third party's pipe: the other end must hear of it
        logger.exception("a pipe's handler failed")
        future.set_exception(KVConnectError(f"internal error: {type(error).__name__}"))
    else:
        future.set_result(answer)
