"""Where a load's time goes, from the scheduler's first sight of a request to the line in the worker's log."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvconnect.config import Config
from kvconnect.connectors import timeline
from kvconnect.connectors.fetching import Fetching
from kvconnect.connectors.groups import Group
from kvconnect.connectors.identity import key_of
from kvconnect.connectors.plan import Load, Plan
from kvconnect.connectors.worker import WorkerHalf
from tests.buffers.engines import Engine, engines, eventually

GROUPS = (Group(0, 4, None, ("layer",)),)


@pytest.fixture
def pair() -> Iterator[tuple[Engine, Engine]]:
    with engines() as both:
        yield both


def planned(p: Engine, d: Engine) -> Load:
    """Return the load that D's scheduler half plans for a request with a ticket of P's."""
    request = Request("r", list(range(8)), SamplingParams(max_tokens=1), None)
    key = key_of(request, "ns")
    assert key is not None
    ticket = p.end.offer(key, ((1, 2),), label=None, asked=True)
    request.kv_transfer_params = {"do_remote_prefill": True, "kvconnect": ticket}
    fetching = Fetching(d.end, "ns", GROUPS, content_lookup=False)
    fetching.arrived(request)
    assert eventually(lambda: fetching.external_tokens(request, 0)) == 8
    fetching.allocated(request, [[10, 11]], 8)
    (load,) = fetching.take_loads()
    return load


def worker(d: Engine, **options: Any) -> WorkerHalf:
    half = WorkerHalf(SimpleNamespace(config=Config(**options)), 0)  # type: ignore[arg-type]
    half._end = d.workers[0]
    return half


def run(half: WorkerHalf, load: Load) -> tuple[set[str], set[str]]:
    """Start a load as vLLM's worker does, and collect it."""
    half.start(Plan((pickle.loads(pickle.dumps(load)),)))  # noqa: S301 - as vLLM hands it to its workers
    eventually(lambda: half._over)
    return half.take_results(Plan())


def test_a_line_tells_when_each_phase_of_a_load_ended(pair: tuple[Engine, Engine], caplog: Any) -> None:
    before = time.monotonic()
    load = planned(*pair)
    with caplog.at_level(logging.INFO):
        assert run(worker(pair[1], log_transfers=True), load) == ({"r"}, set())
    (line,) = [record.getMessage() for record in caplog.records if "kvconnect.load" in record.getMessage()]
    name, _, text = line.partition(" ")
    facts = json.loads(text)
    assert name == "kvconnect.load"
    assert before < facts["seen"] < time.monotonic()
    assert list(facts["at_ms"]) == list(timeline.PHASES)
    ends = list(facts["at_ms"].values())
    assert ends == sorted(ends)
    assert facts["ms"] == pytest.approx(facts["at_ms"]["confirmed"] - facts["at_ms"]["begun"], abs=0.01)
    assert (facts["request"], facts["tokens"], facts["pipe"], facts["rank"]) == ("r", 8, "inproc", 0)
    assert facts["bytes"] == 2 * 3 * 512


def test_without_log_transfers_nobody_is_told(pair: tuple[Engine, Engine], caplog: Any) -> None:
    load = planned(*pair)
    with caplog.at_level(logging.INFO):
        assert run(worker(pair[1]), load) == ({"r"}, set())
    assert "kvconnect.load" not in caplog.text


def test_a_load_that_fails_has_no_line(pair: tuple[Engine, Engine], caplog: Any) -> None:
    p, d = pair
    load = planned(p, d)
    wrong = Load("r", load.claim, ((60, 61),), load.local, 8)
    with caplog.at_level(logging.INFO):
        assert run(worker(d, log_transfers=True), wrong) == ({"r"}, {"r"})
    assert "could not load the KV of r" in caplog.text
    assert "kvconnect.load" not in caplog.text


def test_phases_count_from_first_sight_and_those_unknown_are_left_out() -> None:
    times = {"moved": 5.25, "seen": 5.0, "claimed": 5.001, "other": 9.0}
    assert timeline.since_seen(times) == {"claimed": 1.0, "moved": 250.0}
    assert timeline.since_seen({"moved": 5.0}) == {}
