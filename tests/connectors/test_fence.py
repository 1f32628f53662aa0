"""The thread behind a fence; what it waits for is tested on GPUs (`tests/gpu/test_fence.py`)."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvconnect.connectors.fence import Fence


class Work:
    """An event that is over when the test says so."""

    def __init__(self, **_: Any) -> None:
        self.over = threading.Event()

    def record(self, stream: Any) -> None:
        stream.append(self)

    def synchronize(self) -> None:
        assert self.over.wait(10)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The events of all calls, in order."""
    found: list[Work] = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Work, current_stream=lambda _: found))
    return found


def thread() -> threading.Thread | None:
    return next((each for each in threading.enumerate() if each.name == "kvconnect-fence"), None)


def test_its_thread_never_keeps_a_process_alive_and_ends_with_it_without_another_call(recorded: list[Work]) -> None:
    fence = Fence("cuda:0")
    waiter = thread()
    assert waiter is not None
    assert waiter.daemon
    made = queue.SimpleQueue[int]()
    fence.then(lambda: made.put(1))
    fence.close()
    recorded[0].over.set()
    waiter.join(10)
    assert not waiter.is_alive()
    assert made.empty()


def test_a_call_that_raises_holds_nobody_up(recorded: list[Work]) -> None:
    fence = Fence("cuda:0")
    made = queue.SimpleQueue[int]()
    fence.then(lambda: 1 // 0)
    fence.then(lambda: made.put(2))
    recorded[0].over.set()
    with pytest.raises(queue.Empty):
        made.get(timeout=0.1)
    recorded[1].over.set()
    assert made.get(timeout=10) == 2
    fence.close()
