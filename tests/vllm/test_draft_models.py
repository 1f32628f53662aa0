"""Speculative decoding: the draft model's layers are handed over with the target's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvconnect.buffers.ticket import Ticket
from kvconnect.demo import model
from kvconnect.demo.client import Answer
from tests.vllm.conftest import START_S, running
from tests.vllm.fleet import CHUNK, Fleet, Plan

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(START_S + 300)]


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A producer and a consumer whose draft model is the target itself, and a consumer without one.

    So every draft is right exactly if the draft model's KV is.
    """
    draft = {"method": "draft_model", "model": str(model.ensure()), "num_speculative_tokens": 3}
    plan = Plan(
        "KvConnect",
        producers=1,
        consumers=1,
        tiny=False,
        strangers=1,
        stranger_arguments=("--speculative-config", "null"),
        arguments=("--speculative-config", json.dumps(draft)),
    )
    with running(plan, tmp_path_factory.mktemp("draft")) as fleet:
        yield fleet
        assert fleet.settle() == []


def accepted(fleet: Fleet, call: Callable[[], Answer]) -> tuple[Answer, float]:
    """Run ``call``; return its answer and the share of drafts that the consumer accepted meanwhile."""
    names = ("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total")
    before = [fleet.metric(fleet.consumers[0], name) for name in names]
    answer = call()
    right, all_of_them = (fleet.metric(fleet.consumers[0], name) - b for name, b in zip(names, before, strict=True))
    return answer, right / all_of_them


@pytest.mark.parametrize("tokens", [33, 100, CHUNK + 200])
def test_output_and_accepted_drafts_equal_one_engines(drafting: Fleet, tokens: int) -> None:
    prompt = drafting.prompt(tokens, tokens, max_tokens=40)
    alone, share_alone = accepted(drafting, lambda: drafting.reference(prompt))
    (answer, share), fetched = drafting.fetched(
        drafting.consumers[0], lambda: accepted(drafting, lambda: drafting.by_ticket(prompt))
    )
    assert fetched >= tokens - 1
    assert answer.texts == alone.texts
    assert share >= share_alone - 0.1 > 0.5


def test_every_layer_of_both_models_arrives(drafting: Fleet) -> None:
    prompt = drafting.prompt(200, 1)
    params: Any = drafting.ticket(drafting.producers[0], prompt)
    lent = drafting.digests(drafting.producers[0])
    drafting.ask(drafting.consumers[0], prompt, kv_transfer_params=params)
    here = set(drafting.digests(drafting.consumers[0]).values())
    blocks = Ticket.from_wire(params["kvconnect"]).blocks[0]
    assert {lent[block] for block in blocks[:-1]} <= here  # decoding has written to the last one


def test_a_peer_without_the_draft_model_is_refused_by_name_and_recomputes(drafting: Fleet) -> None:
    stranger = drafting.strangers[0]
    for seed in (2, 3):
        prompt = drafting.prompt(150, seed)
        params = drafting.ticket(drafting.producers[0], prompt)
        call = functools.partial(drafting.ask, stranger, prompt, kv_transfer_params=params)
        answer, fetched = drafting.fetched(stranger, call)
        assert fetched == 0
        assert answer.texts == drafting.reference(prompt).texts
    said = [line for line in stranger.log.read_text().splitlines() if " differs" in line]
    assert len(said) == 1
    assert "draft_model differs: ours ''" in said[0]
