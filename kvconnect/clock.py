"""Time, as leases and deadlines count it."""

from __future__ import annotations

import time


class Clock:
    """Seconds that only grow, the same for all processes of a host; also while the host sleeps.

    A promise that somebody else's clock ends must not outlast a suspended machine: that is
    why it is not `time.monotonic`.
    """

    def now(self) -> float:
        """Return the time in seconds; only differences mean something."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def poll_ms(self, when: float) -> int:
        """Return how many milliseconds a poller may sleep that has something to do at ``when``."""
        return max(0, int((when - self.now()) * 1000) + 1)


#: The host's.
SYSTEM = Clock()
