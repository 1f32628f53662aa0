"""Tests of `kvconnect.timers`."""

from __future__ import annotations

import ctypes
import threading

from kvconnect import timers

PR_GET_TIMERSLACK = 30


def slack_ns() -> int:
    return int(ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0))


def test_only_the_thread_that_says_so_is_woken_exactly() -> None:
    found = []

    def keep() -> None:
        timers.keep_time()
        found.append(slack_ns())

    before = slack_ns()
    thread = threading.Thread(target=keep)
    thread.start()
    thread.join(10)
    assert found == [1]
    assert slack_ns() == before > 1
