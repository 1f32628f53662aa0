"""Loads that wait for the step before them, as releases need that hand a block out while it is still written."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvconnect.connectors.fence import Fence

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

#: Cycles that the device is busy with: some 50 ms.
BUSY = 100_000_000
keep_busy: Any = torch.cuda._sleep
event: Any = torch.cuda.Event
stream: Any = torch.cuda.Stream


@pytest.fixture
def fence() -> Iterator[Fence]:
    made = Fence("cuda:0")
    yield made
    made.close()


def test_a_call_is_made_after_the_work_before_it_and_nobody_waits_for_that(fence: Fence) -> None:
    own, before, seen = stream(0), event(), queue.SimpleQueue[bool]()
    with torch.cuda.stream(own):
        keep_busy(BUSY)
        before.record()
        fence.then(lambda: seen.put(before.query()))
    assert not before.query()
    assert seen.get(timeout=10)


def test_a_call_does_not_wait_for_other_streams(fence: Fence) -> None:
    other, slow, seen = stream(0), event(), queue.SimpleQueue[bool]()
    with torch.cuda.stream(other):
        keep_busy(BUSY)
        slow.record()
    with torch.cuda.stream(stream(0)):
        fence.then(lambda: seen.put(slow.query()))
    assert not seen.get(timeout=10)
    slow.synchronize()


def test_calls_are_made_in_order_whatever_one_of_them_raises(fence: Fence) -> None:
    seen = queue.SimpleQueue[int]()
    fence.then(lambda: 1 // 0)
    for number in range(20):
        keep_busy(BUSY // 100)
        fence.then(lambda number=number: seen.put(number))  # type: ignore[misc]
    assert [seen.get(timeout=10) for _ in range(20)] == list(range(20))
