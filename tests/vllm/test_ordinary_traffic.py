"""What a producer's own traffic pays for prompts that nobody takes."""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Iterator

import pytest

from kvconnect.demo.client import Prompt
from kvconnect.demo.engines import Server
from tests.vllm.conftest import running
from tests.vllm.fleet import Fleet, Plan, unique

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

#: Requests at once and in one measurement; every prompt is new, so every one is computed and lent.
AT_ONCE, REQUESTS = 16, 48
PAIRS = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One producer, and the same engine without any connector."""
    plan = Plan(connector="KvConnectShm", producers=1, consumers=0, plain=1)
    with running(plan, tmp_path_factory.mktemp("ordinary")) as fleet:
        yield fleet


def seconds(fleet: Fleet, engine: Server) -> float:
    """Serve `REQUESTS` prompts of mixed lengths and return how long it took."""
    prompts = [Prompt(f"{unique('traffic')} {'word ' * (5 + i * 5 % 90)}", max_tokens=12) for i in range(REQUESTS)]
    began = time.perf_counter()
    fleet.together([functools.partial(fleet.ask, engine, prompt) for prompt in prompts], AT_ONCE)
    return time.perf_counter() - began


def test_a_producer_without_takers_serves_as_fast_as_an_engine_without_connector(
    pair: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    producer, plain = pair.producers[0], pair.plain[0]
    for engine in (producer, plain):
        seconds(pair, engine)
    ratios = []
    for _ in range(PAIRS):
        with_connector, without = seconds(pair, producer), seconds(pair, plain)
        ratios.append(without / with_connector)
    middle = statistics.median(ratios)
    with capsys.disabled():
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        sys.stdout.write(f"\nproducer's throughput / plain engine's: median {middle:.3f} of {PAIRS} pairs ({spread})\n")
    # The goal is 0.98. Two engines on two shared cores differ by more than that from run to run,
    # so this bound is wider; `docs/benchmarks.md` has the figure of a quiet machine.
    assert middle > 0.9
