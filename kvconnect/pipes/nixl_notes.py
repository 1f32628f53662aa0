"""What two ends tell each other while a transfer runs: small messages of one size, by NIXL's own notifications.

An agent that is progressed hears of one within microseconds, on the thread that goes
on with it. The channel beside the pipe takes several changes of threads instead, in
which a GPU's link would move as much as all slots hold; it remains for what begins and
ends a transfer, for errors, and for backends without notifications.
"""

from __future__ import annotations

import logging
import secrets
import struct
from concurrent.futures import Future
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

from kvconnect.errors import HandshakeError, KVConnectError
from kvconnect.pipes.base import Message
from kvconnect.pipes.nixl_agent import TOKEN_BYTES, Agent
from kvconnect.pipes.nixl_meeting import Target

log = logging.getLogger(__name__)

# what, transfer, portion, address
_NOTE = struct.Struct("<B3Q")


class What(IntEnum):
    """What is told."""

    #: The lender has gathered a portion, at the address.
    FULL = 0
    #: The reader has read it.
    TAKEN = 1
    #: The reader has read everything; may it count on it?
    END = 2
    #: It may.
    ENDED = 3


class Note(NamedTuple):
    """One such message."""

    what: What
    transfer: int
    portion: int = 0
    address: int = 0

    def pack(self) -> bytes:
        """Return it in bytes."""
        return _NOTE.pack(*self)

    @classmethod
    def unpack(cls, packed: object) -> Note:
        """Read a peer's; raise `HandshakeError` if it is none."""
        try:
            what, *rest = _NOTE.unpack(packed)  # type: ignore[arg-type]
            return cls(What(what), *rest)
        except (struct.error, TypeError, ValueError) as error:
            raise HandshakeError(f"not a note of a transfer: {error}") from error


class Correspondent(Protocol):
    """What notes need of their end of the pipe."""

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def target(self) -> Target:
        """Return the other end; raise `BrokenError` if it is unknown."""

    def noted(self, note: Note) -> None:
        """The other end has told something. On the agent's thread."""


class Notes:
    """The notes between two ends of a pipe."""

    def __init__(self, agent: Agent, end: Correspondent) -> None:
        self._agent, self._end = agent, end
        #: Names this end to whoever sends a note to the agent.
        self.token = secrets.token_bytes(TOKEN_BYTES)
        agent.listen(self.token, self._on_notification)

    def send(self, note: Note) -> None:
        """Tell the other end; by the channel if NIXL does not. On the agent's thread."""
        try:
            target = self._end.target()
            if self._agent.notify(target.peer.name, target.token, note.pack()):
                return
        except KVConnectError as error:
            log.debug("the other end is told by the channel: %s", error)
        self._end.tell("nixl.note", {"note": note.pack()})

    def on_note(self, body: dict[str, Any]) -> dict[str, Any]:
        """A note came by the channel."""
        self._agent.soon(partial(self._end.noted, Note.unpack(body.get("note"))))
        return {}

    def _on_notification(self, name: str, packed: bytes) -> None:
        if self._end.target().peer.name != name:
            raise HandshakeError(f"{name} sent a note to a pipe that it is no end of")
        self._end.noted(Note.unpack(packed))

    def end(self) -> None:
        """Hear no more."""
        self._agent.unlisten(self.token)
