"""Engines under pressure, with vLLM's own scheduler and a small pool: nobody's blocks keep others waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.connectors import compat
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.demo import model
from tests.connectors.headless import BLOCKS, SHAPES, Engine

LEASE_S = 10.0
TOKENS = 100  # 7 of 63 blocks


@pytest.fixture
def producer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    _plugin.register()
    monkeypatch.setattr(compat, "worker_rank", lambda: 0)
    extra = {"group": request.node.name, "lease_s": LEASE_S}
    transfer: dict[str, Any] = {"kv_connector": "KvConnectTcp", "kv_role": "kv_producer"}
    engine = Engine(
        str(model.ensure()),
        transfer | {"kv_connector_extra_config": extra},
        SHAPES["blocks first"],
        seed=0,
        caches=False,
    )
    yield engine
    engine.close()


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
