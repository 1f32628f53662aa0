"""Two host pipes beside a device pipe: its order, its ends, its deadlines and its peer's death.

What moves device memory says nothing of a peer that closed, died or fell silent.
So a device pipe carries two pipes of host memory, one for each direction: on an
end's outgoing pipe go its headers and come back the peer's acknowledgements, and
nobody has to tell one from the other.

The media are looked up by name. Neither end knows the other before their one
exchange, so both offer every candidate and both choose by the same rule: the
first one, in the asking end's order, that either end can reach the other by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvconnect import registry
from kvconnect.config import Backend
from kvconnect.errors import ConfigError, HandshakeError, KVConnectError
from kvconnect.pipes.base import Message, Pipe, PipeSpec

#: Host pipes that ``"auto"`` offers, the nearest first.
CANDIDATES: Final = ("shm", "tcp")
#: Which of them takes the options given to ``"auto"``: the one that has an address to bind.
_TAKES_OPTIONS: Final = "tcp"


@dataclass(frozen=True)
class Companion:
    """The host pipes of one end.

    Args:
        name: the medium chosen.
        out: carries what this end sends, and the acknowledgements for it.
        into: carries what the other end sends, and this end's acknowledgements.
        theirs: the device pipe's own message from the other end.

    """

    name: str
    out: Pipe
    into: Pipe
    theirs: Message

    def abort(self) -> None:
        """End both at once."""
        self.out.abort()
        self.into.abort()


def join(spec: PipeSpec, mine: Message, wanted: Backend) -> Companion:
    """Open both host pipes over the one exchange of ``spec``, which carries ``mine``, too.

    Args:
        spec: of the device pipe.
        mine: its own message to the other end.
        wanted: a host pipe by name with options, or ``"auto"``.

    Raises:
        ConfigError: the pipe that is wanted is not registered or cannot be had.
        HandshakeError: the other end is no such pipe, or no host pipe joins the two.

    """
    opening = _Opening(spec, mine, _candidates(wanted), wanted)
    try:
        return opening.join()
    except BaseException:
        opening.abort()
        raise


def _candidates(wanted: Backend) -> dict[str, type[Pipe]]:
    if wanted.name != "auto":
        return {wanted.name: registry.pipe(wanted.name)}
    found: dict[str, type[Pipe]] = {}
    reasons: list[str] = []
    for name in CANDIDATES:
        try:
            found[name] = registry.pipe(name)
        except ConfigError as error:
            reasons.append(str(error))
    if not found:
        raise ConfigError("no host pipe can be had: " + "; ".join(reasons))
    return found


class _NotChosenError(KVConnectError):
    """Ends the opening of a host pipe that another one was preferred to."""


class _Opening:
    """Opens every candidate inside the exchange of the one before, and the real exchange innermost.

    So all serving ends have bound when the messages are swapped, and all asking ends
    connect after it, as the contract of `PipeSpec` has it.
    """

    def __init__(self, spec: PipeSpec, mine: Message, classes: Mapping[str, type[Pipe]], wanted: Backend) -> None:
        self._spec, self._own, self._classes, self._wanted = spec, mine, classes, wanted
        self._plan = [(name, number) for name in classes for number in (0, 1)]
        self._messages: dict[str, list[Message]] = {name: [{}, {}] for name in classes}
        self._theirs: Message = {}
        self._chosen = ""
        self._pipes: dict[tuple[str, int], Pipe] = {}

    def join(self) -> Companion:
        self._open(0)
        theirs = _mapping(self._theirs, "own")
        first, second = (self._pipes.pop((self._chosen, number)) for number in (0, 1))
        self.abort()  # a candidate that opened without an exchange
        out, into = (first, second) if self._spec.side == "asks" else (second, first)
        return Companion(self._chosen, out, into, theirs)

    def abort(self) -> None:
        for pipe in self._pipes.values():
            pipe.abort()

    def _open(self, depth: int) -> None:
        if depth == len(self._plan):
            self._exchange()
            return
        name, number = self._plan[depth]
        exchanged = False

        def exchange(message: Message) -> Message:
            nonlocal exchanged
            exchanged = True
            self._messages[name][number] = dict(message)
            self._open(depth + 1)
            if self._chosen != name:
                raise _NotChosenError(f"{self._chosen} is nearer than {name}")
            theirs: Message = _offers(self._theirs)[name]["messages"][number]
            return theirs

        auto = self._wanted.name == "auto"
        options = self._wanted.options if not auto or name == _TAKES_OPTIONS else {}
        spec = dataclasses.replace(self._spec, exchange=exchange, device="cpu", options=options)
        try:
            self._pipes[name, number] = self._classes[name].open(spec)
        except _NotChosenError:
            return
        if not exchanged:
            self._open(depth + 1)

    def _exchange(self) -> None:
        hosts: dict[str, dict[str, Any]] = {
            name: {"at": dict(cls.descriptor("cpu")), "messages": self._messages[name]}
            for name, cls in self._classes.items()
        }
        # Rows, not a map: the asking end's order decides.
        mine = {"own": dict(self._own), "hosts": [[name, offer] for name, offer in hosts.items()]}
        self._theirs = self._spec.exchange(mine)
        theirs = _offers(self._theirs)
        order = hosts if self._spec.side == "asks" else theirs
        reasons = []
        for name in order:
            if name not in hosts or name not in theirs:
                reasons.append(f"{name}: only one side has it")
                continue
            ours, other = hosts[name]["at"], theirs[name]["at"]
            verdict = self._classes[name].can_reach(ours, other) and self._classes[name].can_reach(other, ours)
            if verdict:
                self._chosen = name
                return
            reasons.append(f"{name}: {verdict.reason}")
        raise HandshakeError(f"no host pipe joins the two ends ({'; '.join(reasons)})")


def _offers(theirs: Message) -> dict[str, dict[str, Any]]:
    """Read the other end's offers; raise `HandshakeError` if it is no such pipe."""
    rows = theirs.get("hosts")
    if not isinstance(rows, list) or not all(map(_is_offer, rows)):
        raise HandshakeError("the other end offers no host pipes: it is another kind of pipe")
    return dict(rows)


def _is_offer(row: object) -> bool:
    if not isinstance(row, (list, tuple)) or len(row) != 2 or not isinstance(row[0], str):
        return False
    offer = row[1]
    if not isinstance(offer, Mapping) or not isinstance(offer.get("at"), Mapping):
        return False
    messages = offer.get("messages")
    return isinstance(messages, list) and len(messages) == 2 and all(isinstance(one, Mapping) for one in messages)


def _mapping(message: Message, field: str) -> Message:
    value = message.get(field)
    if not isinstance(value, Mapping):
        raise HandshakeError(f"the other end's message has no {field!r}")
    return value
