"""Time, as leases and deadlines count it."""

from __future__ import annotations

import functools
import time
from pathlib import Path


class Clock:
    """Seconds that only grow, the same for all processes of a host; also while the host sleeps.

    A promise that somebody else's clock ends must not outlast a suspended machine: that is
    why it is not `time.monotonic`.
    """

    @property
    def identity(self) -> str:
        """Name of the clock, the same for all that read it and for nobody else; empty if that cannot be told.

        A subclass that reads another clock gives another name.
        """
        return _of_this_host()

    def now(self) -> float:
        """Return the time in seconds; only differences mean something."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def poll_ms(self, when: float) -> int:
        """Return how many milliseconds a poller may sleep that has something to do at ``when``."""
        return max(0, int((when - self.now()) * 1000) + 1)


@functools.cache
def _of_this_host() -> str:
    """Name the running system and, where the kernel has them, the time namespace, which may have shifted the clock."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    namespace = Path("/proc/self/ns/time")
    return f"{name} {namespace.readlink()}" if namespace.is_symlink() else name


#: The host's.
SYSTEM = Clock()
