"""What a process holds: threads, open files, shared memory – before and after."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_SHM = Path("/dev") / "shm"


@dataclass(frozen=True)
class Holdings:
    """What this process holds at one moment."""

    threads: Counter[str]
    fds: Counter[str]
    shm: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Look: names of live threads, targets of open fds, files of this user in ``/dev/shm``."""
        fds: Counter[str] = Counter()
        for entry in os.scandir("/proc/self/fd"):
            try:
                target = str(Path(entry.path).readlink())
            except OSError:
                continue  # the fd of this very scan, or one closed meanwhile
            if target != f"/proc/{os.getpid()}/fd":
                fds[target.split(":[", maxsplit=1)[0]] += 1
        return cls(Counter(t.name for t in threading.enumerate()), fds, frozenset(_own_shm()))

    def more_than(self, before: Holdings) -> list[str]:
        """Say, one line each, what is held now and was not before."""
        lines = [f"thread {name!r} × {n}" for name, n in (self.threads - before.threads).items()]
        lines += [f"open file {name!r} × {n}" for name, n in (self.fds - before.fds).items()]
        return lines + [str(_SHM / name) for name in sorted(self.shm - before.shm)]


def assert_nothing_left(before: Holdings, settle_s: float = 5.0) -> None:
    """Raise `AssertionError` if, after up to ``settle_s``, more is held than ``before``."""
    deadline = time.monotonic() + settle_s
    pause = threading.Event()
    while left := Holdings.now().more_than(before):
        if time.monotonic() > deadline:
            raise AssertionError("left behind: " + "; ".join(left))
        pause.wait(0.02)


def _own_shm() -> list[str]:
    names = []
    for entry in os.scandir(_SHM):
        try:
            if entry.stat(follow_symlinks=False).st_uid == os.getuid() and "kvconnect" in entry.name:
                names.append(entry.name)
        except OSError:
            continue  # removed meanwhile
    return names
