"""Every error that kvconnect raises on purpose.

Each docstring says what happened and whether the object it came from can
still be used. Foreign exceptions (``OSError``, ``zmq.ZMQError``, …) are mapped
to one of these where they arise, with the cause chained.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KVConnectError(Exception):
    """Base of all errors raised on purpose. Tracebacks end with its `page`."""

    def __init__(self, *args: object) -> None:
        """Take the text."""
        super().__init__(*args)
        # A note, no part of the text: other errors quote texts, and peers send them.
        self.add_note(f"see {self.page}")

    @property
    def page(self) -> str:
        """Where the documentation explains the error; of a class from elsewhere, its nearest base here."""
        here = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        return f"docs/errors.md#{here.__name__.lower()}"


class ConfigError(KVConnectError):
    """A configuration value is wrong; the text names the field and the cure."""


class UnknownBackendError(ConfigError):
    """No pipe, buffer or connector is registered under the name asked for."""

    def __init__(self, kind: str, name: str, registered: Iterable[str]) -> None:
        """Say what is registered and which name comes nearest."""
        names = sorted(registered)
        near = nearest(name, names)
        hint = f"; did you mean {near!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (registered: {', '.join(names) or 'none'})")
        self.kind, self.name, self.registered = kind, name, names


class UnavailableBackendError(ConfigError):
    """The backend is registered but cannot run here; the text says what to install."""

    def __init__(self, kind: str, name: str, reason: str, cure: str = "") -> None:
        """Name the backend, why it cannot run, and the cure."""
        super().__init__(f"{kind} {name!r} is not available: {reason}" + (f" ({cure})" if cure else ""))
        self.kind, self.name, self.reason, self.cure = kind, name, reason, cure


class HandshakeError(KVConnectError):
    """Two peers do not fit; the text names the field, ours and theirs. Nothing was transferred."""


class TensorRejectedError(KVConnectError):
    """This tensor cannot be carried. Raised before a byte moved; the pipe stays usable."""


class ClosedError(KVConnectError):
    """This end was closed by its owner. The object is not usable."""


class BrokenError(KVConnectError):
    """The other end or the wire failed; the cause is chained. Only ``close``/``abort`` remain."""


class EndOfPipe(KVConnectError):  # noqa: N818 - a stream's end, named as EOFError is
    """The peer closed in an orderly way and all it sent was delivered."""


class BusyError(KVConnectError):
    """A second thread sends (or receives) on one end at the same time. The first goes on unharmed."""


class DeadlineError(KVConnectError):
    """A deadline passed. In the middle of a message the pipe is dead afterwards."""


class BufferFullError(KVConnectError):
    """The entry does not fit the buffer's capacity. The buffer stays usable."""


class IntegrityError(KVConnectError):
    """Bytes arrived that are not the bytes that were sent. They must not be used."""


class LoadError(KVConnectError):
    """KV could not be loaded into the engine's blocks; the request must be recomputed."""


class StaleError(LoadError):
    """The owner no longer vouches for the blocks that were read: their lease had ended."""


def as_ours(error: BaseException, what: str = "") -> KVConnectError:
    """Return ``error`` if it is one of ours, else a `BrokenError` caused by it: ``what``, its type and its text."""
    if isinstance(error, KVConnectError):
        return error
    broken = BrokenError(f"{what}{type(error).__name__}: {error}")
    broken.__cause__ = error
    return broken


def named(error: BaseException) -> str:
    """Return an error as a line of a log has it: class, text and, if it is one of ours, where it is explained."""
    text = f"{type(error).__name__}: {error}"
    return f"{text} ({error.page})" if isinstance(error, KVConnectError) else text


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, whatever its case, or ``None`` if none is close."""
    folded = {candidate.casefold(): candidate for candidate in known}
    match = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return folded[match[0]] if match else None
