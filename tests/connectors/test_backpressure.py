"""Engines under pressure, with vLLM's own scheduler and a small pool: nobody's blocks keep others waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.connectors.groups import Group
from kvconnect.connectors.headroom import Headroom
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.demo import model
from kvconnect.testing.engine import BLOCK, BLOCKS, SHAPES, Engine

LEASE_S = 10.0
TOKENS = 100  # 7 of 63 blocks


def engine(request: pytest.FixtureRequest, role: str) -> Engine:
    extra = {"group": request.node.name, "lease_s": LEASE_S, "content_lookup": False}
    transfer: dict[str, Any] = {"kv_connector": "KvConnectTcp", "kv_role": role, "kv_connector_extra_config": extra}
    transfer |= {"kv_load_failure_policy": "recompute"}
    return Engine(str(model.ensure()), transfer, SHAPES["blocks first"], seed=0, caches=False)


@pytest.fixture
def producer(request: pytest.FixtureRequest) -> Iterator[Engine]:
    _plugin.register()
    made = engine(request, "kv_producer")
    yield made
    made.close()


@pytest.fixture
def consumer(request: pytest.FixtureRequest, producer: Engine) -> Iterator[Engine]:  # noqa: ARG001 - it registers
    made = engine(request, "kv_consumer")
    yield made
    made.close()


def test_takers_that_vanish_do_not_keep_new_requests_waiting_for_their_leases(producer: Engine) -> None:
    began, longest = time.monotonic(), 0.0
    for number in range(30):
        since = time.monotonic()
        prompt = range(number * 1000, number * 1000 + TOKENS)
        answer, _ = producer.ask(f"p{number}", prompt, dict(ASK_FOR_TICKET), max_tokens=1)
        assert answer.kv_transfer_params
        longest = max(longest, time.monotonic() - since)
    # Nine fill the pool. By leases alone the tenth waits for one, and the thirty for three.
    assert longest < LEASE_S / 2
    assert time.monotonic() - began < LEASE_S
    while producer.free_blocks() < BLOCKS - 1:
        assert time.monotonic() < began + 3 * LEASE_S
        producer.step()


def test_loads_take_no_block_that_decoding_requests_are_about_to_need(
    producer: Engine, consumer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets = {}
    for number in range(1, 4):
        prompt = range(number * 1000, number * 1000 + 11 * BLOCK)
        answer, _ = producer.ask(f"p{number}", prompt, dict(ASK_FOR_TICKET), max_tokens=1)
        tickets[f"l{number}"] = prompt, answer.kv_transfer_params
    mover: Any = consumer.worker._worker._end
    held: list[Callable[[], object]] = []
    read = mover.read
    monkeypatch.setattr(mover, "read", lambda *arguments: held.append(lambda: read(*arguments)))
    decoding = ["a", "b", "c"]
    for name in decoding:  # 21 of 63 blocks now, 42 at their end
        consumer.add(name, range(TOKENS), max_tokens=120)
    while len(consumer.step().num_scheduled_tokens) < len(decoding):
        pass
    for name, (prompt, params) in tickets.items():
        consumer.add(name, prompt, params)
    until, started = time.monotonic() + 40, 0
    while not consumer.ended.keys() >= set(decoding):
        assert time.monotonic() < until
        planned = consumer.step()
        if not held:  # steps without a model are quicker than the question for the first ticket
            threading.Event().wait(0.02)
        assert not (planned.num_scheduled_tokens and planned.kv_connector_metadata.patient)
        running = [consumer.scheduler.requests[name] for name in decoding if name in consumer.scheduler.requests]
        assert not any(request.num_preemptions for request in running)
        started = len(held) if len(running) == len(decoding) else started
    assert started == 1, "only a load that leaves enough may start"
    monkeypatch.undo()
    for start in held:
        start()
    computed: dict[str, int] = {}
    while not consumer.ended.keys() >= set(tickets):
        assert time.monotonic() < until
        for name, tokens in consumer.step().num_scheduled_tokens.items():
            computed.setdefault(name, tokens)
    assert computed == dict.fromkeys(tickets, 1), "all are loaded in the end"


def test_loads_under_way_hold_no_more_than_their_capacity() -> None:
    headroom = Headroom((Group(0, BLOCK, None, ("layer",)),), capacity=10)
    headroom.bind(lambda: 1000)
    assert headroom.admits("large", 20 * BLOCK), "a load alone may always start, lest it never does"
    headroom.started("large", 20 * BLOCK)
    assert not headroom.admits("first", 8 * BLOCK)
    headroom.ended("large")
    assert not headroom.admits("second", BLOCK), "later ones do not overtake"
    assert headroom.admits("first", 8 * BLOCK)
    headroom.started("first", 8 * BLOCK)
    assert headroom.admits("second", 2 * BLOCK)
    headroom.started("second", 2 * BLOCK)
    assert not headroom.admits("third", BLOCK)
    headroom.ended("first")
    assert headroom.admits("third", BLOCK)
