"""Hand-overs between real vLLM engines through a store: they know nothing of each other."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm.distributed.kv_events import BlockStored

from kvconnect.demo.client import Prompt
from kvconnect.demo.engines import Server
from tests.buffers.wired_redis import WiredRedis
from tests.subscriber import IDLE_STEPS, Subscriber
from tests.vllm.clients import complaints, until
from tests.vllm.conftest import running
from tests.vllm.fleet import BLOCK, CHUNK, Fleet, Plan, unique

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SEGMENT = 2 * BLOCK
SHARED = {"mode": "share", "segment_tokens": SEGMENT}
#: Bytes of what is moved at a time, and tokens of prompts that have many of them.
STORE_CHUNK, LONG = 1 << 16, 3 * CHUNK + 100
Stored = tuple[Fleet, WiredRedis | None]
REDIS = pytest.param("redis", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def ear() -> Iterator[Subscriber]:
    """Hears the KV events of all engines."""
    with Subscriber() as ear:
        yield ear


@pytest.fixture(scope="module", params=["filesystem", REDIS])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ear: Subscriber
) -> Iterator[Stored]:
    """A producer and a consumer over one store; the server, if it is one."""
    folder = tmp_path_factory.mktemp(f"fleet-{request.param}")
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(WiredRedis()) if request.param == "redis" else None
        # Taken from the one, shared by the other.
        place = {"url": redis.url} if redis else {"path": str(folder / "kv"), **SHARED}
        # Without groups that meet, peers or ports: what comes, comes from the store.
        groups = {name: {"group": unique("alone")} for name in ("P0", "D0")}
        connector = "KvConnectRedis" if redis else "KvConnectFilesystem"
        # Cores that others use, too: what is still on its way is waited for.
        extra = {"lookup_timeout_s": 30.0, "buffer": {"name": request.param, "chunk_bytes": STORE_CHUNK, **place}}
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": ear.endpoint}
        told = ("--kv-events-config", json.dumps(events))
        plan = Plan(
            connector, producers=1, consumers=1, tiny=False, extra_config=extra, extra_of=groups, arguments=told
        )
        fleet = stack.enter_context(running(plan, folder))
        yield fleet, redis


def test_what_the_consumer_has_from_the_store_is_what_it_would_compute(stored: Stored) -> None:
    fleet, _ = stored
    (producer,), (consumer,) = fleet.producers, fleet.consumers
    for seed, tokens in enumerate([1, BLOCK, BLOCK + 1, CHUNK + 5, LONG]):
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
    assert fleet.settle() == []
    assert [line for engine in fleet.engines for line in complaints(engine)] == []


@pytest.mark.parametrize("stored", ["filesystem"], indirect=True)
def test_of_a_prompt_that_begins_like_another_the_beginning_comes_from_the_store(stored: Stored) -> None:
    fleet, _ = stored
    (consumer,) = fleet.consumers
    known, other = (fleet.prompt(3 * CHUNK, seed).content for seed in (70, 71))
    fleet.by_ticket(Prompt(known))
    assert fleet.forget(consumer), "what it has itself it would not fetch"
    like = Prompt([*known[: 3 * SEGMENT + 5], *other[3 * SEGMENT + 5 :]])
    answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, like))
    assert fetched == 3 * SEGMENT
    assert answer.texts == fleet.reference(like).texts
    assert fleet.settle() == []
    assert [line for engine in fleet.engines for line in complaints(engine)] == []


@IDLE_STEPS
@pytest.mark.parametrize("stored", ["filesystem"], indirect=True)
def test_before_it_rests_a_producer_says_what_the_store_has(stored: Stored, ear: Subscriber) -> None:
    fleet, _ = stored
    (producer,) = fleet.producers
    hellos = itertools.count(900)
    ear.connected(lambda: fleet.ask(producer, fleet.prompt(BLOCK + 1, next(hellos)), max_tokens=1))
    tokens = fleet.prompt(3 * CHUNK, 72).content
    fleet.ticket(producer, Prompt(tokens))

    def told() -> bool:
        stored = [token for event in ear.of(BlockStored) for token in event.token_ids]
        return stored == list(tokens)

    ear.until(told)
    where = ear.where()
    own = where["GPU"]
    assert {block: own[block] for block in where["STORAGE"]} == where["STORAGE"]


def refused(engine: Server) -> list[str]:
    """Return what an engine's log says of transfers that broke."""
    lines = engine.log.read_text(errors="replace").splitlines()
    return [line for line in lines if re.search(r"could not (load the KV|store a prompt).*: BrokenError: ", line)]


def recover(fleet: Fleet, mend: Callable[[], None]) -> None:
    """Mend the store, and wait until prompts come from it: after it has hung, it is asked now and then."""
    mend()

    def loads() -> bool:
        prompt = fleet.prompt(BLOCK + 1, 5, salt=unique("again"))
        return fleet.fetched(fleet.consumers[0], lambda: fleet.by_ticket(prompt))[1] > 0

    until(loads, 60, "the store's answers")


@pytest.mark.parametrize(
    ("strike", "mend"),
    [
        (WiredRedis.dies, lambda redis: redis.server.start()),
        (WiredRedis.dies_within_a_chunk, lambda redis: redis.server.start()),
        (WiredRedis.hangs, lambda redis: redis.server.go_on()),
    ],
    ids=["killed", "killed within a chunk", "hangs"],
)
@pytest.mark.parametrize("stored", [REDIS], indirect=True)
def test_a_server_that_fails_in_the_middle_of_a_transfer_costs_computing(
    stored: Stored, strike: Callable[[WiredRedis], None], mend: Callable[[WiredRedis], None]
) -> None:
    fleet, redis = stored
    assert redis is not None
    (producer,), (consumer,) = fleet.producers, fleet.consumers
    # Others than any other case has: what is in an engine's own cache is not fetched.
    prompts = [fleet.prompt(LONG, 100, salt=unique("struck")) for _ in range(5)]
    right = fleet.reference(prompts[0]).texts
    before = len(refused(producer))

    # While P's worker writes.
    redis.server.client.flushall()
    redis.wire.after(5 * STORE_CHUNK, "hold", asks=True)
    params = fleet.ticket(producer, prompts[0])
    assert redis.wire.struck.wait(60)
    assert redis.chunks > 0
    assert redis.entries("offered") == 0
    strike(redis)
    until(lambda: len(refused(producer)) == before + 1, 60, "the end of the write")
    answer, fetched = fleet.fetched(consumer, lambda: fleet.ask(consumer, prompts[0], kv_transfer_params=params))
    assert (answer.texts, fetched) == (right, 0)
    recover(fleet, lambda: mend(redis))

    # While D's worker reads.
    redis.server.client.flushall()
    params = fleet.ticket(producer, prompts[1])
    until(lambda: redis.entries("offered") == 1, 60, "an entry")
    redis.server.client.config_resetstat()
    redis.wire.after(5 * STORE_CHUNK, "hold")
    name = unique("struck")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fleet.ask, consumer, prompts[1], request_id=name, kv_transfer_params=params)
        assert redis.wire.struck.wait(60)
        assert redis.gets > 4
        assert (redis.entries("taken"), asked.done()) == (1, False)
        strike(redis)
        assert asked.result(90).texts == right
    assert [line for line in refused(consumer) if name in line]
    # Without a server, and with one again.
    answer, fetched = fleet.fetched(consumer, lambda: fleet.by_ticket(prompts[2]))
    assert (answer.texts, fetched) == (right, 0)
    recover(fleet, lambda: mend(redis))
    answer, fetched = fleet.fetched(consumer, lambda: fleet.by_ticket(prompts[3]))
    assert answer.texts == right
    assert fetched >= LONG - 1
    assert fleet.settle() == []
    assert [line for engine in fleet.engines for line in complaints(engine)] == []
