"""Hand-overs through a third party's buffer of three methods between vLLM's own schedulers, without models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.demo import model
from kvconnect.errors import ConfigError
from kvconnect.testing.engine import BLOCK, BLOCKS, LIMIT_S, SHAPES, Engine
from tests.buffers.engines import eventually
from tests.buffers.stores import install_sqlite
from tests.connectors.test_stores import FULL, PROMPT, copied, count, prefill

Make = Callable[..., Engine]


@pytest.fixture
def sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The third party's class."""
    return install_sqlite(monkeypatch, tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kv.db"


@pytest.fixture
def make(sqlite: Any, file: Path) -> Iterator[Make]:  # noqa: ARG001 - it is registered
    """Return ``make(role, seed, **options)``, which opens an engine over the table."""
    _plugin.register()
    folder = str(model.ensure())
    with contextlib.ExitStack() as stack:

        def make(role: str, seed: int, ranks: int = 1, **options: Any) -> Engine:
            buffer = {"name": "sqlite", "path": str(file), "chunk_bytes": 100_000, **options}
            transfer = {
                "kv_connector": "KvConnect",
                "kv_role": role,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"lease_s": 5.0, "buffer": buffer},
            }
            engine = Engine(folder, transfer, SHAPES["blocks first"], seed, ranks=ranks)
            stack.callback(engine.close)
            return engine

        yield make


def until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Step until something is so."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        engine.step()


def failed(engine: Engine) -> dict[str, int]:
    stats: dict[str, int] = engine.worker._worker._end.stats()
    return {name: n for name, n in stats.items() if name.startswith("load_failed_")}


def test_the_consumer_computes_one_token_and_has_every_block(make: Make) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    _, computed = consumer.ask("d", PROMPT)
    assert computed == 1
    assert copied(consumer, producer) == FULL
    assert consumer.free_blocks() == BLOCKS - 1


def test_each_of_two_workers_has_its_own_part(make: Make) -> None:
    producer, consumer = make("kv_producer", 1, ranks=2), make("kv_consumer", 2, ranks=2)
    prefill(producer)
    assert consumer.ask("d", PROMPT)[1] == 1
    for here, there in zip(consumer.memories, producer.memories, strict=True):
        blocks = [list(memory["layers.0"].flatten(1)) for memory in (here, there)]
        assert sum(any(one.equal(other) for other in blocks[1]) for one in blocks[0]) >= FULL


def test_an_entry_is_taken_once(make: Make) -> None:
    producer, first, second = make("kv_producer", 1), make("kv_consumer", 2), make("kv_consumer", 3)
    prefill(producer)
    assert first.ask("d", PROMPT)[1] == 1
    assert second.ask("d", PROMPT)[1] == len(PROMPT)
    assert count(second, "miss_absent") == 1


def test_of_two_requests_at_once_one_loads_and_one_computes(make: Make) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    for name in ("d1", "d2"):
        consumer.add(name, PROMPT)
    until(consumer, lambda: consumer.ended.keys() == {"d1", "d2"})
    assert not failed(consumer)
    assert count(consumer, "claimed") == 1
    assert consumer.free_blocks() == BLOCKS - 1


def test_an_aborted_load_gives_its_blocks_back(make: Make) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    consumer.add("d", PROMPT)
    until(consumer, lambda: consumer.loads("d"))
    consumer.abort("d")
    until(consumer, lambda: consumer.free_blocks() == BLOCKS - 1)
    assert consumer.ask("e", range(200, 230))[1] == 30


def test_what_is_aborted_before_its_load_is_there_for_another(make: Make) -> None:
    producer, first, second = make("kv_producer", 1), make("kv_consumer", 2), make("kv_consumer", 3)
    prefill(producer)
    first.add("d", PROMPT)
    eventually(lambda: count(first, "claimed"))
    first.abort("d")
    first.close()
    assert second.ask("d", PROMPT)[1] == 1


def test_a_table_that_is_damaged_is_computed_anew(make: Make, file: Path) -> None:
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    size = file.stat().st_size
    with file.open("r+b") as table:
        table.write(b"no table" * (size // 8))
    answer, computed = consumer.ask("d", PROMPT)
    assert computed == len(PROMPT)
    assert str(answer.finish_reason) == "length"
    assert consumer.free_blocks() == BLOCKS - 1
    prefill(producer, "again")
    assert count(producer, "not_stored_store_failed") == 1


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("what", ["raises", "returns junk", "forgets", "changes a byte"])
def test_an_authors_mistake_costs_a_computation(
    make: Make, sqlite: Any, monkeypatch: pytest.MonkeyPatch, after: int, what: str
) -> None:
    real, good = sqlite.drop_select, iter(range(after))

    def drop_select(self: Any, key: Any) -> Any:
        found = real(self, key)
        if next(good, None) is not None:
            return found
        if what == "raises":
            raise RuntimeError("a third party's mistake")
        if what == "changes a byte" and found:
            found[-1][-1] ^= 1
        return {"returns junk": ["junk"], "forgets": None}.get(what, found)

    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    monkeypatch.setattr(sqlite, "drop_select", drop_select)
    answer, computed = consumer.ask("d", PROMPT)
    assert computed == len(PROMPT)
    assert str(answer.finish_reason) == "length"
    assert bool(failed(consumer)) == (after > 0)
    assert consumer.free_blocks() == BLOCKS - 1
    monkeypatch.setattr(sqlite, "drop_select", real)
    prefill(producer, "again")
    assert consumer.ask("e", range(200, 200 + BLOCK))[1] == BLOCK


def test_a_producers_blocks_return_although_nothing_can_be_inserted(
    make: Make, sqlite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def insert(*_: Any) -> None:
        raise RuntimeError("a third party's mistake")

    monkeypatch.setattr(sqlite, "insert", insert)
    producer, consumer = make("kv_producer", 1), make("kv_consumer", 2)
    prefill(producer)
    assert count(producer, "not_stored_store_failed") == 1
    assert consumer.ask("d", PROMPT)[1] == len(PROMPT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "memory"}, "buffer 'memory' cannot serve an engine"),
        ({"mode": "share"}, r"buffer\.mode is 'share'"),
        ({"paht": "x"}, r"buffer\.paht is not a known option; did you mean 'path'"),
    ],
)
def test_an_engine_does_not_start_with_what_cannot_work(make: Make, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make("kv_producer", 1, **options)
