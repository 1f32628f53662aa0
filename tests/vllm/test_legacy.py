"""A pipe of vLLM's former shape, adopted and registered by an entry point, between one producer and one consumer."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest

from bench.report import ROOT
from tests.vllm.conftest import running
from tests.vllm.fleet import CHUNK, Fleet, Plan

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines in whose environment the pipe of `tests/pipes/test_legacy.py` is installed."""
    site = tmp_path_factory.mktemp("site")
    info = site / "old_pipe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: old-pipe\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[kvconnect.pipes]\nold = tests.pipes.test_legacy:Adopted\n", "utf-8")
    env = {"PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}
    plan = Plan("KvConnect", producers=1, consumers=1, tiny=False, extra_config={"pipe": "old"}, env=env)
    with running(plan, tmp_path_factory.mktemp("old")) as fleet:
        yield fleet
        assert fleet.settle() == []


def test_it_carries_hand_overs_one_at_a_time_and_many_at_once(pair: Fleet) -> None:
    consumer = pair.consumers[0]
    for tokens in (33, CHUNK + 200):
        prompt = pair.prompt(tokens, tokens)
        answer, fetched = pair.fetched(consumer, functools.partial(pair.by_ticket, prompt))
        assert fetched >= tokens - 1
        assert answer.texts == pair.reference(prompt).texts
    prompts = [pair.prompt(40 + 31 * i, 900 + i) for i in range(12)]
    answers = pair.together([functools.partial(pair.by_ticket, prompt) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.texts == pair.reference(prompt).texts
    assert '"pipe": "old"' in consumer.log.read_text(errors="replace")
