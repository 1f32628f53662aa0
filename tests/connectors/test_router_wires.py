"""What routers send to both legs, as it was recorded, between engines with vLLM's own scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.demo import model
from kvconnect.testing.engine import SHAPES, Engine

PROMPT = range(100, 150)
Params = dict[str, Any] | None
ADDRESSES = "___prefill_addr_127.0.0.1:18100___decode_addr_127.0.0.1:18200_0f48c9d2a7b34e5f8a1b2c3d4e5f6071"


class Wire(NamedTuple):
    """One router: ids of its two requests as the engines see them, and their ``kv_transfer_params``."""

    prefill_id: str
    decode_id: str
    prefill: Params
    decode: Callable[[dict[str, Any]], Params]


def served(name: str, random: str) -> str:
    """Return the id that vLLM's server gives a request with this X-Request-Id."""
    return f"cmpl-{name}-0-{random}"


def verbatim(ticket: dict[str, Any]) -> Params:
    return ticket


def nothing(_: dict[str, Any]) -> Params:
    return None


def rewritten(ticket: dict[str, Any]) -> Params:
    return ticket | {"remote_host": "127.0.0.1", "remote_port": 1}


def with_more(ticket: dict[str, Any]) -> Params:
    return ticket | {"transfer_id": "xfer-1", "kvconnect": ticket["kvconnect"] | {"later": {"than": ["us"]}}}


def in_fractions(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: in_fractions(each) for name, each in value.items()}
    if isinstance(value, list):
        return [in_fractions(each) for each in value]
    return float(value) if type(value) is int else value


ASK = dict(ASK_FOR_TICKET)
ONE, OTHER = "a35607e1", "a9b48eb9"
WIRES = {
    "vllm-router": Wire(served(ADDRESSES, ONE), served(ADDRESSES, OTHER), ASK, verbatim),
    "vllm-router, workers over gRPC": Wire(served(ADDRESSES, ONE), served(ADDRESSES, OTHER), ASK, in_fractions),
    "production-stack orchestrated": Wire(served("client-id-1", ONE), served("client-id-1", OTHER), ASK, rewritten),
    "production-stack disaggregated_prefill": Wire(
        served("client-id-1", ONE), served("client-id-1", OTHER), None, nothing
    ),
    "disagg_prefill_proxy_server": Wire(served(ADDRESSES, ONE), served(ADDRESSES, OTHER), None, nothing),
    "disagg_proxy_demo": Wire(served("1f0e", ONE), served("77aa", OTHER), None, nothing),
    "smg": Wire(served("1f0e", ONE), served("77aa", OTHER), None, verbatim),
    "toy_proxy_server": Wire(served("5d8f", ONE), served("5d8f", OTHER), ASK, verbatim),
    "llm-d sidecar": Wire(f"chatcmpl-5d8f-{ONE}", f"chatcmpl-5d8f-{OTHER}", ASK, with_more),
}


@pytest.fixture
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    _plugin.register()
    made = []
    for seed, role in enumerate(("kv_producer", "kv_consumer")):
        extra = {"group": request.node.name[:60], "lease_s": 5.0, "lookup_timeout_s": 10.0}
        transfer = {"kv_connector": "KvConnectTcp", "kv_role": role, "kv_connector_extra_config": extra}
        transfer |= {"kv_load_failure_policy": "recompute"}
        made.append(Engine(str(model.ensure()), transfer, SHAPES["blocks first"], seed, caches=False))
    yield made[0], made[1]
    for engine in reversed(made):
        engine.close()


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_a_router_hands_over_though_it_knows_nothing_of_us(engines: tuple[Engine, Engine], wire: Wire) -> None:
    producer, consumer = engines
    answer, _ = producer.ask(wire.prefill_id, PROMPT, wire.prefill, max_tokens=1)
    # Through JSON, as all of it goes.
    ticket = json.loads(json.dumps(answer.kv_transfer_params))
    _, computed = consumer.ask(wire.decode_id, PROMPT, wire.decode(ticket))
    assert computed == 1


def test_a_ticket_has_no_fractions_and_nothing_that_json_would_change(engines: tuple[Engine, Engine]) -> None:
    answer, _ = engines[0].ask(served("x", ONE), PROMPT, ASK, max_tokens=1)

    def check(value: Any) -> None:
        assert not isinstance(value, float)
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(each)

    check(answer.kv_transfer_params)
    assert json.loads(json.dumps(answer.kv_transfer_params)) == answer.kv_transfer_params
    assert answer.kv_transfer_params["do_remote_prefill"] is True
    assert "transfer_mode" not in answer.kv_transfer_params, "vllm-router would send both requests at once"


def test_a_ticket_for_another_prompt_is_of_no_use(engines: tuple[Engine, Engine]) -> None:
    producer, consumer = engines
    answer, _ = producer.ask(served("x", ONE), PROMPT, ASK, max_tokens=1)
    _, computed = consumer.ask(served("y", OTHER), range(200, 250), answer.kv_transfer_params)
    assert computed == 50
