"""The worker's half over a buffer end whose transfers the test ends."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect.buffers.base import Claim, LookupKey, WorkerEnd
from kvconnect.config import Config
from kvconnect.connectors import worker
from kvconnect.connectors.plan import Load, Plan
from kvconnect.connectors.worker import WorkerHalf
from kvconnect.errors import LoadError
from kvconnect.pipes.base import Transfer

CLAIM = Claim("g", LookupKey("ns", b"d" * 16, 8), ((5, 6),))
IDLE, BUSY = Plan(patient=True), Plan()


class Loads:
    """A worker's half, and the transfers that it has begun."""

    def __init__(self) -> None:
        self.half = WorkerHalf(SimpleNamespace(config=Config()), 0)  # type: ignore[arg-type]
        self.half._end = end = create_autospec(WorkerEnd, instance=True)
        end.read.side_effect = self._read
        self.transfers: list[Transfer] = []

    def _read(self, claim: Claim, remote: object, local: object, on_done: Any) -> Transfer:
        transfer = Transfer(1)
        transfer.add_done_callback(on_done)
        self.transfers.append(transfer)
        return transfer

    def start(self, *names: str) -> None:
        self.half.start(Plan(tuple(Load(name, CLAIM, ((5, 6),), ((1, 2),), 8) for name in names)))

    def collect(self, plan: Plan) -> tuple[set[str], set[str], float]:
        """Return what ended, what failed, and the seconds that it took to say so."""
        before = time.monotonic()
        over, failed = self.half.take_results(plan)
        return over, failed, time.monotonic() - before


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    monkeypatch.setattr(worker, "_PATIENCE_S", 5.0)
    return Loads()


def test_every_load_is_reported_once_with_its_failure(loads: Loads) -> None:
    loads.start("a", "b", "c")
    loads.transfers[0].finish()
    loads.transfers[2].finish(LoadError("gone"))
    assert loads.half.take_results(BUSY) == ({"a", "c"}, {"c"})
    assert loads.half.take_results(BUSY) == (set(), set())
    loads.transfers[1].finish()
    assert loads.half.take_results(BUSY) == ({"b"}, set())


def test_a_step_that_computes_waits_for_no_load(loads: Loads) -> None:
    loads.start("a")
    over, _, seconds = loads.collect(BUSY)
    assert not over
    assert seconds < 1


def test_an_idle_step_waits_until_a_load_is_over(loads: Loads) -> None:
    loads.start("a", "b")
    threading.Timer(0.1, loads.transfers[1].finish).start()
    over, _, seconds = loads.collect(IDLE)
    assert over == {"b"}
    assert 0.05 < seconds < 4


def test_an_idle_step_waits_only_so_long(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PATIENCE_S", 0.05)
    loads.start("a")
    over, _, seconds = loads.collect(IDLE)
    assert not over
    assert seconds >= 0.05


def test_an_idle_step_without_loads_waits_for_nothing(loads: Loads) -> None:
    assert loads.collect(IDLE)[2] < 1
    loads.start("a")
    loads.transfers[0].finish()
    assert loads.collect(IDLE)[0] == {"a"}
    assert loads.collect(IDLE)[2] < 1


def test_a_load_that_was_over_when_the_idle_step_asks_is_reported_at_once(loads: Loads) -> None:
    loads.start("a", "b")
    loads.transfers[0].finish()
    over, _, seconds = loads.collect(IDLE)
    assert over == {"a"}
    assert seconds < 1


def test_a_refused_load_keeps_no_idle_step_waiting(loads: Loads) -> None:
    refused = Load("a", CLAIM, ((5, 6),), ((1, 2),), 8, refused="the claim has ended")
    loads.half.start(Plan((refused,)))
    assert loads.half.take_results(BUSY) == ({"a"}, {"a"})
    assert loads.collect(IDLE)[2] < 1
