"""One producer and one consumer over NIXL; the cases that do not depend on the pipe run over `tcp` and `shm`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vllm.conftest import running
from tests.vllm.fleet import CHUNK, Fleet, Plan

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines."""
    plan = Plan("KvConnectNixl", producers=1, consumers=1, tiny=False)
    with running(plan, tmp_path_factory.mktemp("nixl")) as fleet:
        yield fleet
        assert fleet.settle() == []


def test_hand_over_equals_one_engine_one_at_a_time_and_many_at_once(pair: Fleet) -> None:
    consumer = pair.consumers[0]
    for tokens in (33, CHUNK + 200):
        prompt = pair.prompt(tokens, tokens)
        answer, fetched = pair.fetched(consumer, lambda prompt=prompt: pair.by_ticket(prompt))
        assert fetched >= tokens - 1
        assert answer.texts == pair.reference(prompt).texts
    prompts = [pair.prompt(40 + 31 * i, 900 + i) for i in range(12)]
    answers = pair.together([lambda prompt=prompt: pair.by_ticket(prompt) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.texts == pair.reference(prompt).texts
