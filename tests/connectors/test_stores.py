"""Hand-overs through a store between vLLM's own schedulers, without models: P and D know nothing of each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.buffers.store_manifest import Manifest
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.demo import model
from kvconnect.testing.engine import BLOCK, BLOCKS, SHAPES, Engine
from tests.buffers.redis_server import RedisServer

PROMPT = range(10, 110)
FULL = len(PROMPT) // BLOCK + 1

Make = Callable[..., Engine]


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Return ``make(role, seed, **options)``, which opens an engine over a directory, or another store if asked."""
    _plugin.register()
    folder = str(model.ensure())
    connector, place = "KvConnectFilesystem", {"name": "filesystem", "path": str(tmp_path / "kv")}
    with contextlib.ExitStack() as stack:
        if getattr(request, "param", "") == "redis":
            connector, place = "KvConnectRedis", {"name": "redis", "url": stack.enter_context(RedisServer()).url}

        def make(role: str, seed: int, shape: Any = SHAPES["blocks first"], **options: Any) -> Engine:
            buffer = {**place, "chunk_bytes": 100_000, **options}
            extra = {"lease_s": 5.0, "buffer": buffer}
            transfer = {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": extra}
            engine = Engine(folder, transfer | {"kv_load_failure_policy": "recompute"}, shape, seed)
            stack.callback(engine.close)
            return engine

        yield make


def prefill(producer: Engine, name: str = "p", prompt: Sequence[int] = PROMPT) -> None:
    """Compute a prompt, and step on, as idle engines do, until its blocks are the engine's again."""
    producer.ask(name, prompt, dict(ASK_FOR_TICKET), max_tokens=1)
    for _ in range(2000):
        if producer.free_blocks() == BLOCKS - 1:
            return
        producer.step()
        threading.Event().wait(0.005)
    raise AssertionError(f"{BLOCKS - 1 - producer.free_blocks()} blocks did not return")


def copied(consumer: Engine, producer: Engine) -> int:
    """Return how many of the consumer's blocks are the producer's, too."""
    there = [producer.block(number) for number in range(1, BLOCKS)]
    return sum(any(consumer.block(number).equal(other) for other in there) for number in range(1, BLOCKS))


def count(engine: Engine, name: str) -> int:
    found: int = engine.scheduler.connector._scheduler._end.stats().get(name, 0)
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_consumer_computes_one_token_and_has_every_block(make: Make, shape: tuple[int, ...]) -> None:
    producer, consumer = make("kv_producer", 1, shape), make("kv_consumer", 2, shape)
    prefill(producer)
    _, computed = consumer.ask("d", PROMPT)
    assert computed == 1
    assert copied(consumer, producer) == FULL
    assert consumer.free_blocks() == BLOCKS - 1


@pytest.mark.parametrize("make", ["filesystem", "redis"], indirect=True)
def test_an_entry_is_taken_once(make: Make) -> None:
    producer, first, second = make("kv_producer", 1), make("kv_consumer", 2), make("kv_consumer", 3)
    prefill(producer)
    assert first.ask("d", PROMPT)[1] == 1
    assert second.ask("d", PROMPT)[1] == len(PROMPT)
    assert count(second, "miss_absent") == 1


@pytest.mark.parametrize("make", ["filesystem", "redis"], indirect=True)
def test_a_shared_entry_serves_every_engine(make: Make) -> None:
    share = {"mode": "share"}
    producer = make("kv_producer", 1, **share)
    prefill(producer)
    for seed in (2, 3):
        assert make("kv_consumer", seed, **share).ask("d", PROMPT)[1] == 1


# -- prompts that begin alike -----------------------------------------------------------

SHARE = {"mode": "share", "segment_tokens": 30}
STEP = 32  # 30 tokens, to the end of a block


def like(tokens: int, length: int = 120) -> list[int]:
    """Return a prompt that has ``tokens`` tokens in common with `PROMPT`."""
    return [*PROMPT[:tokens], *range(1000, 1000 + length - tokens)]


@pytest.mark.parametrize("make", ["filesystem", "redis"], indirect=True)
def test_prompts_share_the_segments_that_they_begin_with(make: Make) -> None:
    producer, consumer = make("kv_producer", 1, **SHARE), make("kv_consumer", 2, **SHARE)
    prefill(producer)
    assert count(producer, "stored") == 4
    # The first segment comes from the store, then it is in the consumer's own cache.
    for common, found in [(15, 0), (40, STEP), (70, 2 * STEP)]:
        assert consumer.ask(f"{common} in common", like(common))[1] == 120 - found
        assert consumer.free_blocks() == BLOCKS - 1
    assert count(consumer, "miss_absent") == 1
    assert copied(consumer, producer) == 2 * STEP // BLOCK


def test_a_whole_prompt_in_segments_is_handed_over_to_its_last_token(make: Make) -> None:
    producer, consumer = make("kv_producer", 1, **SHARE), make("kv_consumer", 2, **SHARE)
    prefill(producer)
    assert consumer.ask("d", PROMPT)[1] == 1
    assert copied(consumer, producer) == FULL


def test_what_prompts_have_in_common_is_stored_once(make: Make, tmp_path: Path) -> None:
    producer = make("kv_producer", 1, **SHARE)
    prefill(producer)
    before = len(list((tmp_path / "kv").iterdir()))
    prefill(producer, "like", like(70))
    assert count(producer, "not_stored_present") == 2
    assert len(list((tmp_path / "kv").iterdir())) == before + 2


def test_what_follows_a_segment_that_is_gone_is_of_no_use_until_it_is_stored_again(make: Make) -> None:
    producer, consumer = make("kv_producer", 1, **SHARE), make("kv_consumer", 2, **SHARE)
    prefill(producer)
    store = producer.scheduler.connector._scheduler._end._store
    second = sorted(store.entries(), key=lambda entry: entry.nbytes)  # the last, of 4 tokens, is the smallest
    names = {Manifest.unpack(store.find(entry.name).manifest).start: entry.name for entry in second}
    assert store.drop(names[STEP])
    assert consumer.ask("d", PROMPT)[1] == len(PROMPT) - STEP
    other = make("kv_consumer", 3, **SHARE)
    prefill(producer, "again")
    assert other.ask("d", PROMPT)[1] == 1


def test_engines_that_cut_differently_share_nothing_and_mix_nothing_up(make: Make) -> None:
    producer, whole = make("kv_producer", 1, **SHARE), make("kv_consumer", 2, mode="share", segment_tokens=0)
    others = make("kv_consumer", 3, mode="share", segment_tokens=64)
    prefill(producer)
    for consumer in (whole, others):
        assert consumer.ask("d", PROMPT)[1] == len(PROMPT)
        assert count(consumer, "miss_absent") == 1


def test_what_a_consumers_own_cache_has_is_not_read(make: Make) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    consumer.ask("own", PROMPT[:50])
    prefill(producer)
    assert consumer.ask("d", PROMPT)[1] == 1


def test_damage_is_computed_anew_and_counted(make: Make, tmp_path: Path) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    (part,) = (tmp_path / "kv").glob("*/0")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    answer, computed = consumer.ask("d", PROMPT)
    assert computed == len(PROMPT)
    assert str(answer.finish_reason) == "length"
    assert consumer.worker._worker._end.stats()["load_failed_integrity"] == 1
    assert consumer.free_blocks() == BLOCKS - 1


def test_a_store_that_is_gone_is_a_miss_and_a_prompt_that_is_not_stored(make: Make, tmp_path: Path) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    (tmp_path / "kv").rename(tmp_path / "other")
    (tmp_path / "other").rmdir()
    prefill(producer)
    assert consumer.ask("d", PROMPT)[1] == len(PROMPT)


def test_a_ticket_waits_for_what_is_still_on_its_way(make: Make) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    answer, _ = producer.ask("p", PROMPT, dict(ASK_FOR_TICKET), max_tokens=1)
    assert answer.kv_transfer_params["kvconnect"]["coming"] is True
    consumer.add("d", PROMPT, answer.kv_transfer_params)
    producer.step()  # its workers are introduced, so that they are asked to write
    assert consumer.ask("d2", range(200, 210))[1] == 10
    for _ in range(2000):
        if (computed := consumer.step().num_scheduled_tokens.get("d")) is not None:
            break
        producer.step()
        threading.Event().wait(0.005)
    assert computed == 1
