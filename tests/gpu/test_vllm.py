"""Hand-overs between real vLLM engines on GPUs, over each pipe for CUDA memory.

bfloat16 kernels give other last bits to other batch shapes, so that two equally likely
tokens may change places. Bytes are therefore compared block by block, and outputs
wherever one engine alone is sure of its token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvconnect.buffers.ticket import Ticket
from kvconnect.demo.client import Prompt
from tests.vllm.conftest import running
from tests.vllm.fleet import Fleet, Plan, unique

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

CONNECTORS = {"cuda_ipc": "KvConnectCudaIpc", "nccl": "KvConnectNccl", "nixl": "KvConnectNixl"}
LENGTHS = [1, 7, 15, 16, 17, 100, 160, 517, 1636]
#: Least difference of log probabilities between the first and the second choice that counts as
#: sure: more than one step of bfloat16 (0.0625) at the size that these logits have.
SURE = 0.1


@pytest.fixture(scope="module", params=sorted(CONNECTORS))
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    plan = Plan(
        CONNECTORS[request.param],
        producers=1,
        consumers=1,
        tiny=False,
        devices=(0, 1),
        arguments=("--num-gpu-blocks-override", "1000", "--block-size", "16"),
    )
    with running(plan, tmp_path_factory.mktemp(f"gpu-{request.param}")) as fleet:
        yield fleet
        assert fleet.settle() == []


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_full_block_arrives_bit_by_bit(fleet: Fleet, tokens: int) -> None:
    prompt = fleet.prompt(max(tokens, 2), tokens)
    prompt = replace(prompt, content=prompt.content[:tokens])
    params = fleet.ticket(fleet.producers[0], prompt)
    blocks = Ticket.from_wire(params["kvconnect"]).blocks
    lent = fleet.digests(fleet.producers[0])
    consumer = fleet.consumers[0]
    _, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, prompt, kv_transfer_params=params))
    assert fetched >= tokens - 1
    here = set(fleet.digests(consumer).values())
    assert {lent[block] for block in blocks[0][:-1]} <= here


def test_outputs_are_those_of_one_engine_wherever_it_is_sure(fleet: Fleet) -> None:
    unsure = 0
    for seed in range(40):
        prompt = fleet.prompt(100 + 7 * seed, 100 + seed, more={"logprobs": 2})
        params = fleet.ticket(fleet.producers[0], prompt)
        got = choices(fleet, prompt, kv_transfer_params=dict(params))
        alone = choices(fleet, replace(prompt, salt=unique("alone")))
        different = next((i for i, (a, b) in enumerate(zip(got, alone, strict=True)) if a[0] != b[0]), None)
        if different is not None:
            assert alone[different][1] < SURE, f"prompt {seed}, token {different}"
            unsure += 1
    assert unsure <= 8


def test_a_zeroed_block_changes_the_output_so_equality_means_something(fleet: Fleet) -> None:
    prompt = fleet.prompt(200, 999)
    params = fleet.ticket(fleet.producers[0], prompt)
    fleet.zero_block(fleet.producers[0], Ticket.from_wire(params["kvconnect"]).blocks[0][5])
    answer = fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=params)
    assert answer.texts != fleet.reference(prompt).texts


def test_many_at_once(fleet: Fleet) -> None:
    prompts = [fleet.prompt(20 + 37 * i, 500 + i, max_tokens=4) for i in range(32)]

    def hand_over(prompt: Prompt) -> None:
        fleet.by_ticket(prompt)

    _, fetched = fleet.fetched(
        fleet.consumers[0],
        lambda: fleet.together([lambda p=p: hand_over(p) for p in prompts]),  # type: ignore[misc]
    )
    assert fetched >= sum(19 + 37 * i for i in range(32))


def choices(fleet: Fleet, prompt: Prompt, **changes: Any) -> list[tuple[str, float]]:
    """Return D's tokens, each with how much likelier it was than the next best one."""
    response = fleet._http.post(fleet.consumers[0].url + prompt.path, json=prompt.body(**changes))
    response.raise_for_status()
    found = response.json()["choices"][0]["logprobs"]
    tops = [sorted(top.values(), reverse=True) for top in found["top_logprobs"]]
    return [
        (token, values[0] - values[1] if len(values) > 1 else 99.0)
        for token, values in zip(found["tokens"], tops, strict=True)
    ]
