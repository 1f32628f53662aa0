"""Which host and process this is, so that two ends can tell how far apart they are."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvconnect.pipes.base import YES, Reach, Verdict


@functools.cache
def _host() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _namespace(kind: str) -> int:
    """Inode of one of this process's namespaces: equal numbers on one host mean a shared one."""
    try:
        return Path(f"/proc/self/ns/{kind}").stat().st_ino
    except OSError:
        return 0


def identity() -> dict[str, Any]:
    """Return what peers need to place this process: host, namespaces, pid and user."""
    return {
        "host": _host(),
        "pid": os.getpid(),
        "uid": os.getuid(),
        "pidns": _namespace("pid"),
        "ipcns": _namespace("ipc"),
        "netns": _namespace("net"),
    }


def within(reach: Reach, local: Mapping[str, Any], remote: Mapping[str, Any]) -> Verdict:
    """Say whether two identities are no further apart than ``reach``."""
    if reach is Reach.NETWORK:
        return YES
    if local.get("host") != remote.get("host"):
        return Verdict(False, "the peers are on different hosts")
    if reach is Reach.PROCESS and (local.get("pid"), local.get("pidns")) != (remote.get("pid"), remote.get("pidns")):
        return Verdict(False, "the peers are different processes")
    return YES
