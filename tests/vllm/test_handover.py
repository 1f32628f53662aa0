"""Hand-overs between real vLLM engines, over each pipe. Outputs always equal one engine's."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping
from typing import Any

import pytest

from kvconnect.connectors import timeline
from kvconnect.demo import client as api
from kvconnect.demo.client import ASK, Answer, Prompt
from tests import dashboard
from tests.buffers.engines import eventually
from tests.vllm.conftest import CONNECTORS
from tests.vllm.fleet import BLOCK, CHUNK, TINY_BLOCKS, Fleet, unique

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

#: One token, less than a block, a block to the token, and what lies around them, up to several chunks.
LENGTHS = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK, CHUNK + 5, 3 * CHUNK + 100]
ROUTES = ["by_ticket", "by_label", "by_content"]


def same(fleet: Fleet, prompt: Prompt, answer: Answer) -> None:
    """Assert that an answer is one engine's."""
    assert answer.texts == fleet.reference(prompt).texts


@functools.cache
def seeds() -> list[int]:
    return [0]


def fresh(fleet: Fleet, tokens: int, **options: Any) -> Prompt:
    """Return a prompt that no engine has seen."""
    seeds()[0] += 1
    prompt = fleet.prompt(max(tokens, 2), seeds()[0], **options)
    ids: Any = prompt.content
    # The first token makes it new even where the text repeats itself.
    return Prompt([300 + seeds()[0], *ids[1:]][:tokens], **options)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_producer_and_one_consumer(fleet: Fleet, route: str, tokens: int) -> None:
    prompt = fresh(fleet, tokens)
    answer, fetched = fleet.fetched(fleet.consumers[0], lambda: getattr(fleet, route)(prompt))
    assert fetched >= tokens - 1  # vLLM may count the last token as computed: it samples from it
    same(fleet, prompt, answer)


def test_every_producer_serves_every_consumer(fleet: Fleet) -> None:
    for p in range(2):
        for d in range(2):
            prompt = fresh(fleet, 200)
            answer, fetched = fleet.fetched(fleet.consumers[d], lambda: fleet.by_ticket(prompt, p, d))  # noqa: B023
            assert fetched >= 199
            same(fleet, prompt, answer)


def test_64_requests_at_once_of_one_token_to_several_chunks(fleet: Fleet) -> None:
    lengths = [1 + (i * 97) % 1500 for i in range(64)]
    prompts = [fresh(fleet, n, max_tokens=8) for n in lengths]
    # All by consumer 0: the other one is too small for this many.
    calls = [functools.partial(fleet.by_ticket, prompt, i % 2, 0) for i, prompt in enumerate(prompts)]
    answers, fetched = fleet.fetched(fleet.consumers[0], lambda: fleet.together(calls))
    assert fetched >= sum(lengths) - 64
    for prompt, answer in zip(prompts, answers, strict=True):
        same(fleet, prompt, answer)


def test_a_partial_hit_in_the_consumers_own_cache_fetches_only_the_rest(fleet: Fleet) -> None:
    prompt = fresh(fleet, 12 * BLOCK)
    ids: Any = prompt.content
    fleet.ask(fleet.consumers[0], Prompt(ids[: 5 * BLOCK]))
    answer, fetched = fleet.fetched(fleet.consumers[0], lambda: fleet.by_ticket(prompt))
    assert 7 * BLOCK - 1 <= fetched <= 7 * BLOCK
    same(fleet, prompt, answer)


def test_a_full_hit_in_the_consumers_own_cache_frees_the_producers_blocks(fleet: Fleet) -> None:
    prompt = fresh(fleet, 8 * BLOCK + 1)
    fleet.ask(fleet.consumers[0], prompt)
    answer, fetched = fleet.fetched(fleet.consumers[0], lambda: fleet.by_ticket(prompt))
    assert fetched <= BLOCK
    same(fleet, prompt, answer)


def test_preemption_under_a_tiny_kv_cache(fleet: Fleet) -> None:
    tiny = fleet.consumers[1]
    # Any four of them are too many when they have generated all (21 blocks each), and loads leave room for five.
    tokens = TINY_BLOCKS // 9 * BLOCK - 3
    prompts = [fresh(fleet, tokens, max_tokens=400, more={"ignore_eos": True}) for _ in range(6)]
    before = fleet.metric(tiny, "vllm:num_preemptions_total")
    answers = fleet.together([functools.partial(fleet.by_ticket, prompt, 0, 1) for prompt in prompts])
    assert fleet.metric(tiny, "vllm:num_preemptions_total") > before
    for prompt, answer in zip(prompts, answers, strict=True):
        same(fleet, prompt, answer)


def test_a_prompt_that_no_producer_saw_is_computed_by_the_consumer(fleet: Fleet) -> None:
    prompt = fresh(fleet, 100)
    answer, fetched = fleet.fetched(fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], prompt))
    assert fetched == 0
    same(fleet, prompt, answer)


def test_a_list_of_prompts_under_one_ticket(fleet: Fleet) -> None:
    singles = [fresh(fleet, n) for n in (5, 100, 300)]
    prompt = Prompt([single.content for single in singles])  # type: ignore[arg-type]
    request_id = unique("list")
    params = fleet.ticket(fleet.producers[0], prompt, request_id=request_id)
    consumer = fleet.consumers[0]
    answer, fetched = fleet.fetched(
        consumer, lambda: fleet.ask(consumer, prompt, request_id=request_id, kv_transfer_params=params)
    )
    assert fetched >= 405 - 3
    assert answer.texts == tuple(fleet.reference(single).text for single in singles)


def test_two_choices_of_one_prompt_share_one_hand_over(fleet: Fleet) -> None:
    # vLLM forbids n > 1 with temperature 0; top_k = 1 is as greedy.
    greedy = {"temperature": 1.0, "top_k": 1}
    prompt = fresh(fleet, 200, more=greedy)
    params = fleet.ticket(fleet.producers[0], prompt)
    both = Prompt(prompt.content, more=greedy | {"n": 2})
    answer, fetched = fleet.fetched(
        fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], both, kv_transfer_params=params)
    )
    assert len(answer.texts) == 2
    assert fetched >= 199
    assert set(answer.texts) == set(fleet.reference(prompt).texts)


def test_a_ticket_for_another_prompt_brings_nothing(fleet: Fleet) -> None:
    other, prompt = fresh(fleet, 200), fresh(fleet, 200)
    params = fleet.ticket(fleet.producers[0], other)
    answer, fetched = fleet.fetched(
        fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=params)
    )
    assert fetched == 0
    same(fleet, prompt, answer)


def test_a_ticket_whose_blocks_were_tampered_with_never_brings_wrong_kv(fleet: Fleet) -> None:
    other, prompt = fresh(fleet, 200), fresh(fleet, 200)
    theirs = fleet.ticket(fleet.producers[0], other)["kvconnect"]
    params: Mapping[str, Any] = fleet.ticket(fleet.producers[0], prompt)
    forged = {**params, "kvconnect": {**params["kvconnect"], "blocks": theirs["blocks"]}}
    assert forged["kvconnect"]["blocks"] != params["kvconnect"]["blocks"]
    same(fleet, prompt, fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=forged))


def test_a_reused_request_id_never_brings_another_prompts_kv(fleet: Fleet) -> None:
    request_id = unique("reused")
    first, second = fresh(fleet, 150), fresh(fleet, 150)
    same(fleet, first, fleet.by_label(first, request_id=request_id))
    fleet.ask(fleet.producers[0], first, request_id=request_id, max_tokens=1)
    answer, fetched = fleet.fetched(
        fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], second, request_id=request_id)
    )
    assert fetched == 0
    same(fleet, second, answer)


def test_a_cache_salt_separates_equal_prompts(fleet: Fleet) -> None:
    prompt = fresh(fleet, 150)
    fleet.ask(fleet.producers[0], Prompt(prompt.content, salt=unique("salt")), max_tokens=1)
    _, fetched = fleet.fetched(fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], prompt))
    assert fetched == 0


def test_a_ticket_that_names_nobody_is_recomputed(fleet: Fleet) -> None:
    prompt = fresh(fleet, 150)
    params: Mapping[str, Any] = fleet.ticket(fleet.producers[0], prompt)
    nobody = {**params, "kvconnect": {**params["kvconnect"], "at": "127.0.0.1:9", "incarnation": "0" * 16}}
    same(fleet, prompt, fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=nobody))


def test_a_malformed_ticket_is_recomputed(fleet: Fleet) -> None:
    prompt = fresh(fleet, 150)
    for ticket in ({"v": 1}, {"v": 99, "at": 5}, "text", None):
        params = {**ASK, "do_remote_decode": False, "do_remote_prefill": True, "kvconnect": ticket}
        same(fleet, prompt, fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=params))


def test_a_zeroed_block_changes_the_output_so_equality_means_something(fleet: Fleet) -> None:
    from kvconnect.buffers.ticket import Ticket

    prompt = fresh(fleet, 200)
    params = fleet.ticket(fleet.producers[0], prompt)
    fleet.zero_block(fleet.producers[0], Ticket.from_wire(params["kvconnect"]).blocks[0][3])
    answer, fetched = fleet.fetched(
        fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=params)
    )
    assert fetched >= 199
    assert answer.texts != fleet.reference(prompt).texts
    # The damaged blocks are in both prefix caches now; nobody sends this prompt again.


def test_metrics_of_both_sides_answer_the_dashboard(fleet: Fleet) -> None:
    pipe = {name: pipe for pipe, name in CONNECTORS.items()}[fleet.plan.connector]
    mine = f'connector="{fleet.plan.connector}"'
    sides = [
        (fleet.consumers[0], f'vllm:kvconnect_transfers_total{{{mine},pipe="{pipe}"}}'),
        (fleet.producers[0], f'vllm:kvconnect_entries_total{{{mine},event="taken"}}'),
    ]
    before = [fleet.metric(*side) for side in sides]
    fleet.by_ticket(fresh(fleet, 100))
    for (engine, name), value in zip(sides, before, strict=True):
        eventually(lambda: fleet.metric(engine, name) > value, 20)  # noqa: B023
        assert dashboard.problems(fleet.http.get(engine.url + "/metrics").text) == []


def test_a_hand_over_is_part_of_its_clients_trace(fleet: Fleet) -> None:
    prompt = fresh(fleet, 100)
    params, trace_id, parent = fleet.ticket(fleet.producers[0], prompt), secrets.token_bytes(16), secrets.token_bytes(8)
    with api.open_client(120.0) as http:
        http.headers["traceparent"] = f"00-{trace_id.hex()}-{parent.hex()}-01"
        api.send(http, fleet.consumers[0].url, prompt, kv_transfer_params=params)
    assert fleet.collector is not None
    phases = {f"kvconnect.load.{phase}" for phase in (*timeline.ADMISSION, *timeline.MOVE)}
    names = {"llm_request", "kvconnect.load", *phases}
    spans = fleet.collector.trace(trace_id, names, 30)
    assert set(spans) >= names
    load = spans["kvconnect.load"]
    assert load.parent_span_id == spans["llm_request"].parent_span_id == parent
    assert {spans[name].parent_span_id for name in phases} == {load.span_id}
    request = spans["llm_request"]
    assert request.start_time_unix_nano <= load.start_time_unix_nano
    assert load.end_time_unix_nano <= request.end_time_unix_nano
