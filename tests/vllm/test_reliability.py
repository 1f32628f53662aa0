"""Requests that end before their time, between real engines: nothing is lost, leaked or told twice.

What lies between the engines stays whole here; see `test_reliability_wires` for the rest.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from kvconnect.demo.client import ASK, Answer, Prompt
from kvconnect.demo.engines import Server
from tests.vllm.clients import complaints, held, leave, poke, until
from tests.vllm.fleet import BLOCK, Fleet, unique

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

#: From before a request is read to after its answer; a load takes some milliseconds, a step tens.
MOMENTS_S = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.3)


@pytest.fixture(scope="module", autouse=True)
def nothing_lost(fleet: Fleet) -> Iterator[None]:
    """After all: every block is free within a lease, every load was reported once, and nobody crashed."""
    begins = {engine.name: engine.log.stat().st_size for engine in fleet.engines}
    prompt = new(fleet, 20 * BLOCK)
    params = fleet.ticket(fleet.producers[0], prompt)
    yield
    threading.Event().wait(fleet.plan.lease_s + 1)
    # The first one's ticket is older than its lease by now.
    consumer = fleet.consumers[0]
    answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, prompt, kv_transfer_params=params))
    assert fetched == 0
    same(fleet, prompt, answer)
    for p, d in ((0, 0), (0, -1)):
        poke(fleet, p, d)
    assert held(fleet, fleet.producers[0]) <= 1
    assert [held(fleet, engine) for engine in fleet.consumers] == [0] * len(fleet.consumers)
    assert fleet.settle() == []
    for engine in fleet.engines:
        assert complaints(engine, begins[engine.name]) == []


def new(fleet: Fleet, tokens: int, seed: int = 1, **options: Any) -> Prompt:
    """Return a prompt whose KV no engine has."""
    return fleet.prompt(tokens, seed, salt=unique("new"), **options)


def same(fleet: Fleet, prompt: Prompt, answer: Answer) -> None:
    """Assert that an answer is one engine's."""
    assert answer.texts == fleet.reference(prompt).texts


def serves(fleet: Fleet, d: int = 0) -> None:
    """Assert that the next request is fetched and right."""
    prompt = new(fleet, 100)
    answer, fetched = fleet.fetched(fleet.consumers[d], lambda: fleet.by_ticket(prompt, 0, d))
    assert fetched >= 99
    same(fleet, prompt, answer)


def soon_idle(fleet: Fleet, engine: Server) -> None:
    """Assert that an engine has ended all requests and holds no block, though nobody asks it for anything."""
    until(lambda: not fleet.busy(engine), 10.0, f"{engine.name} idle, every block free")


def reset(fleet: Fleet, engine: Server) -> bool:
    """Have an engine forget its own prefix cache and what it lends; ``False`` while any of it is in use."""
    response = fleet.http.post(engine.url + "/reset_prefix_cache", params={"reset_external": True})
    response.raise_for_status()
    return bool(response.json()["success"])


def test_clients_that_leave_a_consumer_at_any_moment_of_a_load(fleet: Fleet) -> None:
    consumer = fleet.consumers[0]
    calls = []
    for number, after_s in enumerate(MOMENTS_S):
        prompt = new(fleet, 900, number, max_tokens=300)
        params = fleet.ticket(fleet.producers[0], prompt)
        calls.append(functools.partial(leave, consumer, prompt, after_s, kv_transfer_params=params))
    assert not all(call() for call in calls)
    soon_idle(fleet, consumer)
    serves(fleet)


def test_clients_that_leave_a_producer_at_any_moment_of_its_prefill(fleet: Fleet) -> None:
    producer = fleet.producers[0]
    answered = [
        leave(producer, new(fleet, 1500, number), after_s, kv_transfer_params=ASK, max_tokens=1)
        for number, after_s in enumerate(MOMENTS_S)
    ]
    assert not all(answered)
    serves(fleet)


def test_clients_that_leave_both_engines_at_once(fleet: Fleet) -> None:
    for number, after_s in enumerate(MOMENTS_S[::2]):
        prompt, request_id = new(fleet, 400, number, max_tokens=200), unique("both")
        legs = (fleet.producers[0], fleet.consumers[0])
        fleet.together([functools.partial(leave, leg, prompt, after_s, request_id=request_id) for leg in legs])
    soon_idle(fleet, fleet.consumers[0])
    serves(fleet)


def test_a_request_that_the_consumers_api_refuses_leaves_its_ticket_good(fleet: Fleet) -> None:
    prompt = new(fleet, 300)
    params = fleet.ticket(fleet.producers[0], prompt)
    for wrong in ({"max_tokens": 100_000}, {"temperature": -1.0}, {"n": 0}):
        with pytest.raises(httpx.HTTPError, match="answered 400"):
            fleet.ask(fleet.consumers[0], replace(prompt, more=wrong), kv_transfer_params=params)
    # Whoever corrects the mistake in time still has the KV.
    answer, fetched = fleet.fetched(
        fleet.consumers[0], lambda: fleet.ask(fleet.consumers[0], prompt, kv_transfer_params=params)
    )
    assert fetched >= 299
    same(fleet, prompt, answer)


def test_a_request_that_leaves_the_queue_without_ever_having_blocks(fleet: Fleet) -> None:
    # The last consumer has room for one long sequence only.
    small = fleet.consumers[-1]
    hog = new(fleet, 60 * BLOCK, max_tokens=120, more={"ignore_eos": True})
    prompt = new(fleet, 40 * BLOCK, 2)
    params = fleet.ticket(fleet.producers[0], prompt)
    answer, gone = fleet.together(
        [
            functools.partial(fleet.ask, small, hog),
            functools.partial(_leave_once_waiting, fleet, small, prompt, params),
        ]
    )
    assert not gone
    same(fleet, hog, answer)
    soon_idle(fleet, small)
    serves(fleet, -1)


def _leave_once_waiting(fleet: Fleet, small: Server, prompt: Prompt, params: Any) -> bool:
    until(lambda: fleet.metric(small, "vllm:num_requests_running") == 1, 10.0, "the first one runs")
    return leave(small, prompt, 0.2, kv_transfer_params=params)


def test_a_reset_with_reset_external_takes_back_what_is_lent(fleet: Fleet) -> None:
    prompt = new(fleet, 200)
    producer, consumer = fleet.producers[0], fleet.consumers[0]
    params = fleet.ticket(producer, prompt)
    assert reset(fleet, producer)  # at once, not after a lease
    answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, prompt, kv_transfer_params=params))
    assert fetched == 0
    same(fleet, prompt, answer)
    serves(fleet)


def test_a_reset_in_the_middle_of_loads_costs_no_answer(fleet: Fleet) -> None:
    producer, consumer = fleet.producers[0], fleet.consumers[0]
    prompts = [new(fleet, 600, number) for number in range(6)]
    tickets = [fleet.ticket(producer, prompt) for prompt in prompts]
    resets = [functools.partial(reset, fleet, engine) for engine in (producer, consumer) * 3]
    asks = [
        functools.partial(fleet.ask, consumer, prompt, kv_transfer_params=ticket)
        for prompt, ticket in zip(prompts, tickets, strict=True)
    ]
    mixed: list[Any] = [call for pair in zip(asks, resets, strict=True) for call in pair]
    for prompt, answer in zip(prompts, fleet.together(mixed)[::2], strict=True):
        same(fleet, prompt, answer)
    serves(fleet)


def test_an_engine_that_slept_hands_over_again(fleet: Fleet) -> None:
    # vLLM's CPU workers keep their memory; the scheduler aborts, pauses and forgets as on any device.
    # A producer falls asleep once nothing of its is lent any more: here after a lease.
    producer, consumer = fleet.producers[0], fleet.consumers[0]
    for engine in (producer, consumer):
        prompt = new(fleet, 200)
        params = fleet.ticket(producer, prompt)
        fleet.http.post(engine.url + "/sleep", params={"level": 1}).raise_for_status()
        fleet.http.post(engine.url + "/wake_up").raise_for_status()
        same(fleet, prompt, fleet.ask(consumer, prompt, kv_transfer_params=params))
        serves(fleet)
