"""Hand-overs between real vLLM engines on GPUs: over each pipe, and in each way to run an engine.

Bytes are compared block by block, and tokens with those of one engine that computed everything
itself. Where its first two choices are as good as equal, that engine's answer depends on how its
batches fell; such tokens are counted, and few (`tests.gpu.agreement`).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="its engines run here")

from kvconnect.buffers.ticket import Ticket
from tests.gpu.agreement import Agreement, ask, handed_over
from tests.gpu.fleets import BLOCK, CASES, FLOAT32, Case, started
from tests.vllm.fleet import Fleet, unique

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

LENGTHS = [1, 7, 15, 16, 17, 100, 160, 517, 1636]
#: Prompts whose tokens are compared, tokens of each, and requests under way at once.
PROMPTS, TOKENS, AT_ONCE = 200, 8, 16


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Name of the fleet."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def fleet(case: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with started(CASES[case], tmp_path_factory.mktemp(f"gpu-{case}")) as fleet:
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
    # The last token is computed here, and those behind it.
    assert {lent[block] for block in blocks[0][: (tokens - 1) // BLOCK]} <= here


def test_a_zeroed_block_changes_the_output_so_equality_means_something(fleet: Fleet) -> None:
    prompt = fleet.prompt(200, 999)
    params = fleet.ticket(fleet.producers[0], prompt)
    fleet.zero_block(fleet.producers[0], Ticket.from_wire(params["kvconnect"]).blocks[0][5])
    answer = fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=params)
    assert answer.texts != fleet.reference(prompt).texts


def test_what_the_consumer_has_in_its_prefix_cache_is_not_fetched_again(fleet: Fleet) -> None:
    first, second = fleet.prompt(400, 700), fleet.prompt(400, 701)
    second = replace(second, content=[*first.content[:320], *second.content[:80]])
    fleet.by_ticket(first)
    lent = fleet.ticket(fleet.producers[0], second)
    consumer = fleet.consumers[0]
    answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, second, kv_transfer_params=lent))
    assert 79 <= fetched <= 80
    digests = fleet.digests(fleet.producers[0])
    blocks = Ticket.from_wire(lent["kvconnect"]).blocks[0]
    assert {digests[block] for block in blocks[320 // BLOCK : 399 // BLOCK]} <= set(fleet.digests(consumer).values())
    assert len(answer.texts) == 1


def test_many_at_once(fleet: Fleet) -> None:
    prompts = [fleet.prompt(20 + 37 * i, 500 + i, max_tokens=4) for i in range(32)]
    calls = [functools.partial(fleet.by_ticket, prompt) for prompt in prompts]
    _, fetched = fleet.fetched(fleet.consumers[0], lambda: fleet.together(calls))
    assert fetched >= sum(19 + 37 * i for i in range(32))


def test_tokens_are_those_of_one_engine_wherever_it_is_sure(
    fleet: Fleet, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not CASES[case].exact:
        pytest.skip("this fleet's engines do not even agree with themselves")
    # Salted, for no prefix cache is to know them.
    prompts = [
        fleet.prompt(17 + seed % 40 * 11, seed, max_tokens=TOKENS, salt=unique("tokens")) for seed in range(PROMPTS)
    ]
    (producer,), (consumer,) = fleet.producers, fleet.consumers
    over = [functools.partial(handed_over, fleet, prompt, producer, consumer) for prompt in prompts]
    got, fetched = fleet.fetched(consumer, lambda: fleet.together(over, AT_ONCE))
    assert fetched >= sum(len(prompt.content) - 1 for prompt in prompts)
    alone = [functools.partial(ask, fleet, consumer, replace(p, salt=unique("alone"))) for p in prompts]
    agreement = Agreement.of(zip(got, fleet.together(alone, AT_ONCE), strict=True))
    agreement.keep(case)
    with capsys.disabled():
        sys.stdout.write(f"\n{case}: {agreement}\n")
    agreement.check()


@pytest.mark.parametrize("connector", ["KvConnectCudaIpc", "KvConnectNccl"])
def test_a_producer_killed_under_load_costs_its_consumer_nothing_but_time(
    connector: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(f"gpu-killed-{connector}")
    with started(Case(connector, FLOAT32), folder, producers=2, lease_s=60.0) as fleet:
        doomed, heir = fleet.producers
        (consumer,) = fleet.consumers
        prompts = [fleet.prompt(300 + seed, seed, max_tokens=TOKENS) for seed in range(40)]
        tickets = [fleet.ticket(doomed, prompt) for prompt in prompts]
        fetching = [
            functools.partial(ask, fleet, consumer, prompt, kv_transfer_params=dict(ticket))
            for prompt, ticket in zip(prompts, tickets, strict=True)
        ]
        assert doomed.process is not None
        death = threading.Timer(0.05, os.killpg, (doomed.process.pid, signal.SIGKILL))
        death.start()
        got = fleet.together(fetching, AT_ONCE)
        death.join()
        alone = [ask(fleet, consumer, replace(prompt, salt=unique("alone"))) for prompt in prompts]
        assert not Agreement.of(zip(got, alone, strict=True)).wrong
        after = fleet.prompt(500, 90, max_tokens=TOKENS)
        _, fetched = fleet.fetched(consumer, lambda: handed_over(fleet, after, heir, consumer))
        assert fetched >= 499
