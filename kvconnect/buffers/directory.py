"""How engines of one host find each other without any port setting.

Each producer leaves one small file in a directory that only its user can read,
and removes it when it closes. Files of processes that are gone are ignored and
removed by whoever sees them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from kvconnect.buffers import fields
from kvconnect.buffers.hello import Hello
from kvconnect.errors import HandshakeError
from kvconnect.pipes import host

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 8192
#: Directory times advance in steps of the kernel's clock; a scan this fresh may have missed a file.
_COARSE_NS = 50_000_000


def base_directory() -> Path:
    """Return this user's directory: the runtime directory where there is one, else in ``/tmp``.

    The standard place is tried even when ``XDG_RUNTIME_DIR`` is not set, so that an
    engine started by a service finds one that was started from a login.
    """
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.getuid()}"):
        if candidate and os.access(candidate, os.W_OK | os.X_OK) and Path(candidate).stat().st_uid == os.getuid():
            return Path(candidate) / "kvconnect"
    return Path(f"/tmp/kvconnect-{os.getuid()}")  # noqa: S108 - ownership and mode are checked


class Directory:
    """The producers of one group on this host."""

    def __init__(self, group: str, base: Path | None = None) -> None:
        """Use the directory of ``group`` below ``base``; without one that can be trusted, find nobody."""
        safe = group if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", group) else _hashed(group)
        self.path = (base or base_directory()) / safe
        self._file: Path | None = None
        self._found: tuple[str, ...] = ()
        self._seen: tuple[int, int] | None = None
        self._pid = os.getpid()
        self.usable = _private(self.path.parent) and _private(self.path)

    def publish(self, me: Hello, endpoint: str) -> None:
        """Tell others that the producer ``me`` answers at ``endpoint``."""
        if not self.usable:
            return
        data = msgpack.packb(
            {
                "endpoint": endpoint,
                "engine": me.engine,
                "incarnation": me.incarnation,
                "role": me.role,
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "pidns": host.identity()["pidns"],
            }
        )
        target = self.path / f"{os.getpid()}-{me.incarnation}"
        draft = self.path / f".{target.name}"
        try:
            draft.write_bytes(data)
            draft.rename(target)  # readers see all of it or none
        except OSError as error:
            logger.warning("other engines of this host will not find this one: %s", error)
        else:
            self._file = target

    def changed(self) -> bool:
        """Whether `scan` may find something else than last time. One ``stat``, no more."""
        stamp = self._stamp()
        return self._seen is None or stamp != self._seen[0] or self._seen[1] - self._seen[0] < _COARSE_NS

    @property
    def found(self) -> tuple[str, ...]:
        """Endpoints as of the last `scan`, without our own."""
        return self._found

    def scan(self) -> tuple[str, ...]:
        """Read the directory again if it changed; return the endpoints of others."""
        if self.usable and self.changed():
            self._seen = (self._stamp(), time.time_ns())
            try:
                names = sorted(entry.name for entry in os.scandir(self.path) if not entry.name.startswith("."))
            except OSError as error:
                logger.debug("cannot read %s: %s", self.path, error)
                names = []
            endpoints = (self._read(self.path / name) for name in names if self.path / name != self._file)
            self._found = tuple(endpoint for endpoint in endpoints if endpoint is not None)
        return self._found

    def close(self) -> None:
        """Remove our file."""
        if self._file is not None and os.getpid() == self._pid:
            self._file.unlink(missing_ok=True)
            self._file = None

    def _stamp(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self, path: Path) -> str | None:
        try:
            with path.open("rb") as file:
                data = msgpack.unpackb(file.read(_MAX_FILE_BYTES), max_ext_len=0)
            if not isinstance(data, dict):
                raise HandshakeError("it is not a map")
            endpoint = fields.text(data, "endpoint")
            if _alive(data):
                return endpoint
            path.unlink(missing_ok=True)
        except (OSError, ValueError, TypeError, msgpack.exceptions.UnpackException, HandshakeError) as error:
            logger.debug("ignored %s: %s", path, error)
        return None


class Producers:
    """Where to look for KV without a ticket: configured peers and those of this host."""

    def __init__(self, fixed: Sequence[str], directory: Directory | None, own: str = "") -> None:
        """Know the endpoints ``fixed`` and those in ``directory``, but never ``own``."""
        self._fixed = tuple(endpoint for endpoint in dict.fromkeys(fixed) if endpoint != own)
        self._directory = directory
        self.endpoints()  # so that later only what changed needs to be read

    def any(self) -> bool:
        """Whether there may be one. Cheap enough for the scheduling thread."""
        if self._fixed or self._directory is None:
            return bool(self._fixed)
        return self._directory.usable and (bool(self._directory.found) or self._directory.changed())

    def endpoints(self) -> tuple[str, ...]:
        """Return all; may read the directory."""
        found = self._directory.scan() if self._directory is not None else ()
        return tuple(dict.fromkeys((*self._fixed, *found)))


def _private(path: Path) -> bool:
    """Make a directory that only we can enter, or check that the existing one is."""
    try:
        path.mkdir(mode=0o700, parents=False, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        logger.warning("engines of this host cannot find each other by themselves: %s", error)
        return False
    if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077:
        return True
    logger.warning("engines of this host cannot find each other by themselves: %s is not private to this user", path)
    return False


def _hashed(group: str) -> str:
    return "g-" + hashlib.blake2b(group.encode(), digest_size=8).hexdigest()


def _started(pid: int) -> int:
    """Return a process's start time in clock ticks since boot, 0 if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The command's name, in parentheses, may hold blanks and parentheses itself.
    return int(text.rpartition(")")[2].split()[19])


def _alive(data: Mapping[str, Any]) -> bool:
    if data.get("pidns") != host.identity()["pidns"]:
        return True  # its pid means nothing here; the hello will tell
    pid, started = data.get("pid"), data.get("started")
    return type(pid) is int and started not in (0, None) and _started(pid) == started
