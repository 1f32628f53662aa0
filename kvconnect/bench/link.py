"""Small messages between the processes of a measurement, never inside a timed region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from kvconnect.pipes.base import Channel

Message = Mapping[str, Any]
TIMEOUT_S = 60.0


class Link:
    """Strictly alternating msgpack messages with one other process, used by one thread."""

    def __init__(self, connection: Connection, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    def send(self, body: Message) -> None:
        """Send one message."""
        self._connection.send_bytes(msgpack.packb(dict(body)))

    def recv(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Receive one message, within the link's own limit unless another is given.

        Raises:
            RuntimeError: with the text of what the other process raised.
            EOFError: the other process is gone.
            TimeoutError: nothing came in time.

        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if not self._connection.poll(limit_s):
            raise TimeoutError(f"the other process did not answer within {limit_s:g} s")
        return self.await_message()

    def await_message(self) -> dict[str, Any]:
        """Receive one message, however long it takes; raises as `recv`."""
        body: dict[str, Any] = msgpack.unpackb(self._connection.recv_bytes())
        if "failed" in body:
            raise RuntimeError(f"in the other process:\n{body['failed']}")
        return body

    def ask(self, op: str, **body: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        return self.swap({"op": op, **body})

    def swap(self, body: Message) -> dict[str, Any]:
        """Send one message and receive one: what `PipeSpec.exchange` is."""
        self.send(body)
        return self.recv()

    def answer(self, body: Message) -> dict[str, Any]:
        """Receive one message and send one back: what `PipeSpec.exchange` is for the end that serves."""
        theirs = self.recv()
        self.send(body)
        return theirs


class Scoped:
    """A `Channel` over another, with a prefix to its operations: several pipes share one channel."""

    def __init__(self, channel: Channel, prefix: str) -> None:
        self._channel, self._prefix = channel, prefix

    def call(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Ask the other end."""
        return self._channel.call(f"{self._prefix}/{op}", body)

    def handle(self, op: str, handler: Callable[[dict[str, Any]], Message]) -> None:
        """Answer the other end's calls of ``op``."""
        self._channel.handle(f"{self._prefix}/{op}", handler)
