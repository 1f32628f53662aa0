"""Hand-overs between two of vLLM's own schedulers, of the release that is installed, without models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.buffers.ticket import Ticket
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.demo import model
from kvconnect.testing.engine import BLOCKS, SHAPES, Engine

PROMPT = range(10, 110)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    """A producer and a consumer."""
    _plugin.register()
    folder = str(model.ensure())
    extra = {"group": request.node.name, "lease_s": 5.0, "content_lookup": False}
    engines = []
    for seed, role in enumerate(("kv_producer", "kv_consumer")):
        transfer: dict[str, Any] = {"kv_connector": "KvConnectTcp", "kv_role": role, "kv_connector_extra_config": extra}
        engines.append(Engine(folder, transfer | {"kv_load_failure_policy": "recompute"}, request.param, seed))
    yield engines[0], engines[1]
    for engine in engines:
        engine.close()


def ticket(producer: Engine, name: str) -> dict[str, Any]:
    """Prefill and return what names the KV."""
    answer, _ = producer.ask(name, PROMPT, dict(ASK_FOR_TICKET), max_tokens=1)
    params: dict[str, Any] = answer.kv_transfer_params
    return params


def test_the_consumer_computes_one_token_and_has_every_block(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    params = ticket(producer, "p")
    _, computed = consumer.ask("d", PROMPT, params)
    assert computed == 1
    here = [consumer.block(number) for number in range(1, BLOCKS)]
    for lent in Ticket.from_wire(params["kvconnect"]).blocks[0]:
        assert any(producer.block(lent).equal(block) for block in here)
    assert consumer.free_blocks() == BLOCKS - 1


def test_a_load_that_fails_is_computed(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    params = ticket(producer, "p")
    producer.worker.shutdown()
    answer, computed = consumer.ask("d", PROMPT, params)
    assert computed == len(PROMPT)
    assert str(answer.finish_reason) == "length"
    assert consumer.free_blocks() == BLOCKS - 1
