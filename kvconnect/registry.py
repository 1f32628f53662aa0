"""Pipes, buffers and connectors by name: a look-up over entry points.

Built-in backends are entry points too, so a third party's are their equals.
Reading the registry loads nothing: a backend's module is imported by
`Entry.load`, `pipe` and `buffer` only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvconnect.errors import ConfigError, UnavailableBackendError, UnknownBackendError

if TYPE_CHECKING:
    from kvconnect.buffers.base import LookupBuffer
    from kvconnect.pipes.base import Pipe

Kind = Literal["pipe", "buffer", "connector"]

GROUPS: Mapping[Kind, str] = {
    "pipe": "kvconnect.pipes",
    "buffer": "kvconnect.buffers",
    "connector": "kvconnect.connectors",
}


@dataclass(frozen=True)
class Entry:
    """One registered backend; nothing of it has been imported yet.

    Args:
        name: what users write.
        kind: ``"pipe"``, ``"buffer"`` or ``"connector"``.
        distribution: installed distribution that registers it.
        version: version of that distribution.
        value: where it is, ``"module:attr"``.

    """

    name: str
    kind: Kind
    distribution: str
    version: str
    value: str

    @property
    def module(self) -> str:
        """The module half of `value`."""
        return self.value.partition(":")[0]

    @property
    def attr(self) -> str:
        """The attribute half of `value`."""
        return self.value.partition(":")[2]

    def load(self) -> Any:
        """Import the module and return the object.

        Raises:
            UnavailableBackendError: it cannot be imported; the cause is chained.

        """
        try:
            return functools.reduce(getattr, self.attr.split("."), importlib.import_module(self.module))
        # Importing runs foreign code: a missing module, a shared library that is
        # not there (OSError) or a failing initialiser all mean the same to users.
        except Exception as error:
            raise UnavailableBackendError(self.kind, self.name, *self._explain(error)) from error

    def _explain(self, error: Exception) -> tuple[str, str]:
        """Return the reason and the cure for a failed import."""
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and not (self.module + ".").startswith(missing + "."):
            return f"it needs the module {missing!r}", f"install {missing!r}"
        if missing is not None or isinstance(error, AttributeError):
            return f"{self.distribution} {self.version} does not have {self.value}", f"reinstall {self.distribution}"
        return f"importing {self.module} failed: {type(error).__name__}: {error}", ""


def pipes() -> dict[str, Entry]:
    """Return the registered pipes by name. Raises `ConfigError` if two distributions claim one name."""
    return _entries("pipe")


def buffers() -> dict[str, Entry]:
    """Return the registered buffers by name. Raises `ConfigError` if two distributions claim one name."""
    return _entries("buffer")


def connectors() -> dict[str, Entry]:
    """Return the registered connectors by name. Raises `ConfigError` if two distributions claim one name."""
    return _entries("connector")


def pipe(name: str) -> type[Pipe]:
    """Return the pipe class registered under ``name``.

    Raises:
        UnknownBackendError: there is none; lists the names that are and the nearest.
        UnavailableBackendError: it cannot run here; says why and what to install.

    """
    return _usable(_find("pipe", name))  # type: ignore[no-any-return]


def buffer(name: str) -> type[LookupBuffer]:
    """Return the buffer class registered under ``name``; raises as `pipe` does."""
    return _usable(_find("buffer", name))  # type: ignore[no-any-return]


def connector_target(name: str) -> tuple[str, str]:
    """Return module and class name of the connector registered under ``name``, importing neither."""
    entry = _find("connector", name)
    return entry.module, entry.attr


def check_availability(entry: Entry, loaded: Any) -> None:
    """Raise `UnavailableBackendError` if the class itself says that it cannot run here.

    A class without ``availability`` (an old vLLM pipe, say) is taken to be available.
    """
    ask = getattr(loaded, "availability", None)
    if ask is None:
        return
    try:
        verdict = ask()
    # The contract says that it never raises; a backend that breaks it is as
    # unusable as one that says no, and must not take the caller down.
    except Exception as error:
        reason = f"its availability() failed: {type(error).__name__}: {error}"
        raise UnavailableBackendError(entry.kind, entry.name, reason) from error
    if not verdict:
        raise UnavailableBackendError(entry.kind, entry.name, verdict.reason, verdict.cure)


def _usable(entry: Entry) -> Any:
    loaded = entry.load()
    if not isinstance(loaded, type):
        raise UnavailableBackendError(entry.kind, entry.name, f"{entry.value} is not a class")
    check_availability(entry, loaded)
    return loaded


def _find(kind: Kind, name: str) -> Entry:
    known = _entries(kind)
    if name not in known:
        raise UnknownBackendError(kind, name, known)
    return known[name]


def _entries(kind: Kind) -> dict[str, Entry]:
    return dict(_scan(kind, tuple(sys.path)))


@functools.lru_cache(maxsize=16)
def _scan(kind: Kind, _path: tuple[str, ...]) -> Mapping[str, Entry]:
    """Read the entry points on ``sys.path`` (the cache's key: reading them opens every distribution's files)."""
    found: dict[str, Entry] = {}
    for point in importlib.metadata.entry_points(group=GROUPS[kind]):
        owner = point.dist
        entry = Entry(
            name=point.name,
            kind=kind,
            distribution=owner.name if owner else "unknown",
            version=owner.version if owner else "",
            # Written out, since an entry point's own value may carry extras.
            value=f"{point.module}:{point.attr}",
        )
        other = found.setdefault(entry.name, entry)
        if other.distribution != entry.distribution:
            raise ConfigError(
                f"{kind} {entry.name!r} is registered by both {other.distribution} {other.version} and "
                f"{entry.distribution} {entry.version}; uninstall one of them"
            )
    return found
