"""Hand-overs between real vLLM engines through a store: they know nothing of each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvconnect.demo.client import Prompt
from tests.buffers.redis_server import RedisServer
from tests.vllm.clients import complaints
from tests.vllm.conftest import running
from tests.vllm.fleet import BLOCK, CHUNK, Fleet, Plan, unique

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SEGMENT = 2 * BLOCK
SHARED = {"mode": "share", "segment_tokens": SEGMENT}


@pytest.fixture(scope="module", params=["filesystem", pytest.param("redis", marks=pytest.mark.slow)])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Fleet, RedisServer | None]]:
    """A producer and a consumer over one store; the server, if it is one."""
    folder = tmp_path_factory.mktemp(f"fleet-{request.param}")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer()) if request.param == "redis" else None
        # Taken from the one, shared by the other.
        place = {"url": server.url, "timeout_s": 3.0} if server else {"path": str(folder / "kv"), **SHARED}
        # Without groups that meet, peers or ports: what comes, comes from the store.
        groups = {name: {"group": unique("alone")} for name in ("P0", "D0")}
        connector = "KvConnectRedis" if server else "KvConnectFilesystem"
        # Cores that others use, too: what is still on its way is waited for.
        extra = {"lookup_timeout_s": 30.0, "buffer": {"name": request.param, "chunk_bytes": 1 << 16, **place}}
        plan = Plan(connector, producers=1, consumers=1, tiny=False, extra_config=extra, extra_of=groups)
        fleet = stack.enter_context(running(plan, folder))
        yield fleet, server


def test_what_the_consumer_has_from_the_store_is_what_it_would_compute(
    stored: tuple[Fleet, RedisServer | None],
) -> None:
    fleet, server = stored
    (producer,), (consumer,) = fleet.producers, fleet.consumers
    for seed, tokens in enumerate([1, BLOCK, BLOCK + 1, CHUNK + 5, 3 * CHUNK + 100]):
        prompt = fleet.prompt(max(tokens, 2), seed)
        answer, fetched = fleet.fetched(consumer, lambda: fleet.by_ticket(prompt))  # noqa: B023
        assert fetched >= tokens - 1
        assert answer.texts == fleet.reference(prompt).texts
    # Two children of one request share what was taken once.
    greedy = {"temperature": 1.0, "top_k": 1}
    prompt = fleet.prompt(200, 50, more=greedy)
    params = fleet.ticket(producer, prompt)
    both = Prompt(prompt.content, more=greedy | {"n": 2})
    answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, both, kv_transfer_params=params))
    assert fetched >= 199
    assert set(answer.texts) == set(fleet.reference(prompt).texts)
    if server is None:
        # Of a prompt that only begins like one that is stored, that beginning; the rest is computed on top of it.
        known, other = (fleet.prompt(3 * CHUNK, seed).content for seed in (70, 71))
        fleet.by_ticket(Prompt(known))
        assert fleet.forget(consumer), "what it has itself it would not fetch"
        like = Prompt([*known[: 3 * SEGMENT + 5], *other[3 * SEGMENT + 5 :]])
        answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, like))
        assert fetched == 3 * SEGMENT
        assert answer.texts == fleet.reference(like).texts
    else:
        server.kill()
        prompt = fleet.prompt(300, 60)
        assert fleet.by_ticket(prompt).texts == fleet.reference(prompt).texts
    assert fleet.settle() == []
    assert [line for engine in fleet.engines for line in complaints(engine)] == []
