"""KV events of what a store has, from vLLM's own publisher: what they tell is so."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvconnect import _plugin
from kvconnect.buffers.store_manifest import Manifest
from kvconnect.connectors import events
from kvconnect.connectors.groups import Group
from kvconnect.connectors.identity import keys_of
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.demo import model
from kvconnect.testing.engine import BLOCK, BLOCKS, SHAPES, Engine
from tests.buffers.wired_redis import WiredRedis
from tests.subscriber import IDLE_STEPS, Subscriber

pytestmark = IDLE_STEPS

PROMPT = list(range(10, 110))
STEP = 32
#: Tokens of `PROMPT`'s whole segments, and how many blocks that is.
WHOLE = len(PROMPT) // STEP * STEP
STORED, BLOCKS_OF = WHOLE // BLOCK, STEP // BLOCK
LEASE_S = 1.0


def ask(name: str, prompt: Sequence[int], **fields: Any) -> Request:
    """Return a request whose prompt is to be handed over; ``fields`` are more of vLLM's own."""
    sampling = SamplingParams(max_tokens=1, temperature=0, extra_args={"kv_transfer_params": dict(ASK_FOR_TICKET)})
    return Request(name, list(prompt), sampling, None, block_hasher=get_request_block_hasher(BLOCK, sha256), **fields)


@dataclass
class Site:
    """An engine, whoever listens to it, and their store."""

    engine: Engine
    ear: Subscriber
    redis: WiredRedis | None

    def serve(self, name: str, prompt: Sequence[int] = PROMPT, **fields: Any) -> None:
        """Compute a prompt, and then do as an idle engine does: step only as long as vLLM finds a reason to."""
        self.engine.scheduler.add_request(ask(name, prompt, **fields))
        self.rest()

    def held_while_writing(self, name: str) -> WiredRedis:
        """Compute a prompt until the wire to Redis, which is returned, holds what is written of it."""
        assert self.redis is not None
        self.redis.wire.after(1 << 15, "hold", asks=True)
        self.engine.add(name, PROMPT, max_tokens=1)
        self.ear.until(self.redis.wire.struck.is_set, self.engine.step)
        return self.redis

    def hello(self, turn: int) -> None:
        """Have vLLM publish something: a prompt of one block, which is no segment, and which no other begins with."""
        self.serve(f"hello {turn}", [5000 + turn] * (BLOCK + 1))

    def rest(self) -> None:
        for _ in range(4000):
            if not self.engine.scheduler.has_requests():
                return
            self.engine.step()
            threading.Event().wait(0.002)
        raise AssertionError("the engine does not come to rest")

    def stored(self) -> dict[Any, Any]:
        """Return the blocks that the store has, by what was heard."""
        return self.ear.where().get(events.MEDIUM, {})

    def hears(self, blocks: int) -> None:
        """Wait until so many blocks are said to be there, though the engine has nothing to do any more."""
        self.ear.until(lambda: len(self.stored()) == blocks)

    def hears_idly(self, blocks: int) -> None:
        """Likewise, of an engine that steps now and then."""
        self.ear.until(lambda: len(self.stored()) == blocks, self.engine.step)

    def nothing_more(self) -> None:
        """See that nothing more is told, long after the engine has looked into the store again."""
        before = list(self.ear.events)
        for _ in range(10):
            threading.Event().wait(LEASE_S / 10)
            self.engine.step()
        self.ear.listen(0.2)
        assert [e for e in self.ear.events[len(before) :] if getattr(e, "medium", None) == events.MEDIUM] == []

    def segments(self) -> dict[int, str]:
        """Return the names of what is in the store, by the first token of each: of one prompt."""
        store = self.end._store
        return {Manifest.unpack(store.find(entry.name).manifest).start: entry.name for entry in store.entries()}

    def count(self, name: str) -> int:
        found: int = self.end.stats().get(name, 0)
        return found

    @property
    def end(self) -> Any:
        return self.engine.scheduler.connector._scheduler._end


Open = Callable[..., Site]


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Return ``opened(seed, ranks, publishes, **options)``: an engine over a directory, or another store if asked."""
    _plugin.register()
    folder = str(model.ensure())
    connector, place = "KvConnectFilesystem", {"name": "filesystem", "path": str(tmp_path / "kv")}
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(WiredRedis()) if getattr(request, "param", "") == "redis" else None
        if redis is not None:
            connector, place = "KvConnectRedis", {"name": "redis", "url": redis.url, "timeout_s": 1.0}

        def opened(seed: int = 1, ranks: int = 1, *, publishes: bool = True, **options: Any) -> Site:
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="kv"))
            endpoint = f"ipc://{sockets}/events"
            buffer = {**place, "chunk_bytes": 1 << 14, "mode": "share", "segment_tokens": STEP - 2, **options}
            extra = {"lease_s": LEASE_S, "buffer": buffer}
            transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
            ear = stack.enter_context(Subscriber(endpoint))
            engine = Engine(
                folder, transfer, SHAPES["blocks first"], seed, ranks=ranks, events=endpoint if publishes else None
            )
            stack.callback(engine.close)
            site = Site(engine, ear, redis)
            if publishes:
                turns = itertools.count()
                ear.connected(lambda: site.hello(next(turns)))
            return site

        yield opened


EVERY = pytest.mark.parametrize("opened", ["filesystem", "redis"], indirect=True)


@EVERY
def test_what_was_stored_is_announced_as_vllm_announces_its_own_blocks(opened: Open) -> None:
    site = opened()
    site.serve("p")
    site.hears(STORED)
    # vLLM's own events of the same prompt: the same hashes, tokens and keys. The end of the prompt is not in them.
    own, told = site.ear.where()["GPU"], site.stored()
    assert {block: own[block] for block in told} == told
    assert len(own) == len(PROMPT) // BLOCK
    assert [token for tokens, *_ in told.values() for token in tokens] == PROMPT[:WHOLE]
    for event in site.ear.of(BlockStored):
        assert getattr(event, "ownership", "kvconnect").startswith("kvconnect")  # since 0.29
        assert event.block_size == BLOCK
    site.nothing_more()


def test_adapters_and_salts_are_told_apart_as_by_vllm(opened: Open) -> None:
    site = opened()
    lora = LoRARequest("an adapter", 3, "/nowhere")
    site.serve("plain")
    site.serve("salted", cache_salt="salt")
    site.serve("adapted", lora_request=lora)
    site.hears(3 * STORED)
    own, told = site.ear.where()["GPU"], site.stored()
    assert {block: own[block] for block in told} == told
    assert {(extra, common[:2]) for _, _, extra, common in told.values()} == {
        (None, (None, None)),
        (("salt",), (None, None)),
        (("an adapter",), (3, "an adapter")),
    }


@pytest.mark.parametrize("opened", ["redis"], indirect=True)
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_announced_before_every_worker_has_written_it(opened: Open, ranks: int) -> None:
    site = opened(ranks=ranks)
    redis = site.held_while_writing("p")
    site.ear.listen(0.3)
    assert site.stored() == {}
    redis.wire.let_go()
    site.rest()
    site.hears(STORED)


@pytest.mark.parametrize("opened", ["redis"], indirect=True)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_could_not_be_written_is_not_announced(opened: Open, ranks: int) -> None:
    site = opened(ranks=ranks)
    redis = site.held_while_writing("p")
    redis.dies()
    site.rest()
    site.ear.listen(0.3)
    assert site.count("not_stored_store_failed") > 0
    assert site.stored() == {}
    redis.server.start()
    site.serve("again")
    site.hears_idly(STORED)


def test_what_another_engine_has_stored_is_announced_when_it_is_found_instead_of_written(opened: Open) -> None:
    first, second = opened(1), opened(2)
    first.serve("p")
    first.hears(STORED)
    second.nothing_more()
    before = second.count("not_stored_present")
    second.serve("p", [*PROMPT[:STEP], *PROMPT])
    second.hears((len(PROMPT) + STEP) // STEP * BLOCKS_OF)
    assert second.count("not_stored_present") == before + 1
    assert set(first.stored()) & set(second.stored()) == set(list(first.stored())[:BLOCKS_OF])
    first.nothing_more()


def test_what_is_there_is_announced_once(opened: Open) -> None:
    site = opened()
    for turn in range(3):
        site.serve(f"p{turn}")
        site.hears(STORED)
        site.nothing_more()
    assert len(site.ear.of(BlockStored)) == WHOLE // STEP


@EVERY
def test_what_somebody_drops_is_announced_as_gone_and_announced_again_when_it_is_back(opened: Open) -> None:
    site, other = opened(1), opened(2)
    site.serve("p")
    site.hears(STORED)
    blocks = list(site.stored())
    assert other.end._store.drop(site.segments()[STEP])
    site.hears_idly(STORED - BLOCKS_OF)
    assert list(site.stored()) == blocks[:BLOCKS_OF] + blocks[2 * BLOCKS_OF :]
    site.serve("again")
    site.hears(STORED)
    assert set(site.stored()) == set(blocks)


def test_what_is_too_old_is_announced_as_gone(opened: Open, tmp_path: Path) -> None:
    site = opened(max_age_s=2.0)
    site.serve("p")
    site.hears(STORED)
    site.hears_idly(0)
    assert list((tmp_path / "kv").iterdir()) == []


def test_what_is_evicted_is_announced_as_gone(opened: Open) -> None:
    site = opened()
    site.serve("p")
    site.hears(STORED)
    segment = max(entry.nbytes for entry in site.end._store.entries())
    # Each prompt has three of them, and a fourth that is smaller: what is added evicts half of what is there.
    small = opened(2, capacity_bytes=5 * segment)
    for first in range(1000, 1500, 100):
        small.serve(f"p{first}", range(first, first + len(PROMPT)))

    def fits() -> bool:
        sizes = [entry.nbytes for entry in small.end._store.entries()]
        return sum(sizes) <= 5 * segment and len(small.stored()) == BLOCKS_OF * sizes.count(segment) > 0

    small.ear.until(lambda: small.ear.of(BlockRemoved) and fits(), small.engine.step)
    site.hears_idly(0)


def test_what_serves_one_request_only_is_not_announced(opened: Open) -> None:
    for seed, options in enumerate([{"mode": "take"}, {"segment_tokens": 0}], 1):
        site = opened(seed, **options)
        before = site.count("stored")
        site.serve("p", range(1000 * seed, 1000 * seed + 100))
        site.nothing_more()
        assert site.count("stored") == before + 1
        assert site.stored() == {}


def test_a_request_that_is_aborted_or_preempted_is_told_of_only_if_its_prompt_was_stored(opened: Open) -> None:
    site = opened()
    long = list(range(2000, 2300))  # takes three steps
    site.engine.scheduler.add_request(ask("aborted", long))
    site.engine.step()
    site.engine.abort("aborted")
    site.rest()
    site.nothing_more()
    assert site.stored() == {}
    site.engine.scheduler.add_request(ask("preempted", long))
    site.engine.step()
    site.engine.preempt()
    site.rest()
    site.hears(len(long) // STEP * BLOCKS_OF)


def test_a_reset_takes_back_what_was_announced_and_what_is_on_its_way(opened: Open) -> None:
    site = opened()
    site.serve("p")
    site.hears(STORED)
    site.engine.add("on its way", range(1000, 1100), max_tokens=1)
    site.ear.until(lambda: "on its way" in site.engine.ended, site.engine.step)
    site.ear.until(site.engine.scheduler.reset_prefix_cache, site.engine.step)
    site.hears_idly(0)
    removed = {block for event in site.ear.of(BlockRemoved) for block in event.block_hashes}
    assert len(removed) >= STORED
    site.rest()
    site.nothing_more()
    assert site.stored() == {}
    site.serve("p")
    site.hears(STORED)


def test_without_kv_events_nothing_is_remembered(opened: Open) -> None:
    site = opened(publishes=False)
    site.serve("p")
    site.ear.until(lambda: site.count("stored") == WHOLE // STEP + 1)
    assert site.end._occupancy.sightings._there == {}
    assert list(site.engine.scheduler.connector.take_events()) == []
    assert site.engine.free_blocks() == BLOCKS - 1


def test_in_whatever_order_segments_are_confirmed_they_are_announced_in_that_of_the_prompt() -> None:
    init_none_hash(sha256)
    request = ask("p", PROMPT)

    def told(*news: tuple[int, bool]) -> list[tuple[type, int]]:
        """Return kind and segment of each event; a store's threads would leave the order to chance."""
        end: Any = SimpleNamespace(news=lambda: [(notes[i], there) for i, there in news])
        announced = events.Announcements(end, [Group(0, BLOCK, None, ())], STEP, "kvconnect.test")
        announced.bind(BLOCK)
        notes = list(announced.notes(request, keys_of(request, "namespace", STEP)).values())
        first = [note.hashes[0][1] for note in notes]
        return [(type(event), first.index(event.block_hashes)) for event in announced.take()]

    for order in itertools.permutations(range(WHOLE // STEP)):
        assert told(*((i, True) for i in order)) == [(BlockStored, 0), (BlockStored, 1), (BlockStored, 2)]
    assert told((2, True), (1, True), (1, False), (0, True)) == [(BlockStored, 0)]
    assert told((1, True), (0, True), (0, False)) == [(BlockStored, 0), (BlockStored, 1), (BlockRemoved, 0)]


def test_the_medium_is_vllms_own_word() -> None:
    from vllm.distributed import kv_events

    assert getattr(kv_events, "MEDIUM_STORAGE", "STORAGE") == events.MEDIUM
