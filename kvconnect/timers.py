"""How exactly a thread's time-outs are kept."""

from __future__ import annotations

import contextlib
import ctypes

#: See prctl(2).
_PR_SET_TIMERSLACK = 29


def keep_time() -> None:
    """Have the kernel wake the calling thread when its time-outs end.

    It may otherwise be 50 µs late, so that timers of other threads can share the wake-up:
    as long as a GPU's link takes for 20 MB. Threads that wait for a copy which is due say
    that it matters. Where the kernel does not know this, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
