"""A Redis server that dies, hangs or comes back in the middle of a transfer: both engines go on, and compute.

"In the middle" is no matter of luck: a wire holds the bytes of one direction when five chunks' worth of them
have passed. Four at most are under way at a time, so that one has arrived by then, and the server itself is asked.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.testing.checked_engine import CheckedEngine
from kvconnect.testing.connector_laws import ASK, Deployment, prompt
from kvconnect.testing.engine import describe_model
from tests.buffers.engines import eventually
from tests.buffers.wired_redis import WiredRedis

#: A prompt has seven blocks of 32 KiB.
CHUNK, CHUNKS = 1 << 14, 14
#: The longest wait for the server.
TIMEOUT_S = 1.0


@dataclass
class Site:
    """A producer, a consumer, and their store."""

    engines: Deployment
    redis: WiredRedis

    @property
    def producer(self) -> CheckedEngine:
        return self.engines.producer

    @property
    def consumer(self) -> CheckedEngine:
        return self.engines.consumer

    def outcome(self, first: int) -> str:
        """Hand a prompt over, and return what became of it."""
        return self.end(*self.engines.hand_over(first))

    def loads_again(self, first: int) -> None:
        """Hand prompts over until one is loaded: a server that was known to hang is asked now and then."""
        more = itertools.count(first)
        eventually(lambda: self.outcome(next(more)) == "loaded", 20)

    def end(self, *names: str) -> str:
        """Wait until requests have ended, all alike, and both engines have all their blocks; return how."""
        self.engines.finish(*names)
        self.engines.rest()
        (outcome,) = {self.consumer.outcomes[name] for name in names}
        return outcome

    def write_halfway(self, first: int) -> None:
        """Have a prompt's chunks on their way to the server, some of them there."""
        self.redis.server.client.flushall()
        self.redis.wire.after(5 * CHUNK, "hold", asks=True)
        self.engines.offer(first)
        self.producer.until(self.redis.wire.struck.is_set, "chunks on their way to the server")
        assert 0 < self.redis.chunks < CHUNKS * len(self.producer.workers)

    def read_halfway(self, *firsts: int) -> list[str]:
        """Have prompts' chunks on their way from the server, some of them arrived; return the requests' names."""
        for first in firsts:
            self.engines.offer(first)
            self.engines.rest()
        self.redis.server.client.config_resetstat()
        claimed = counts(self.consumer)["claimed"]
        for first in firsts:
            self.consumer.add(f"d{first}", prompt(first))
        # Nobody reads before a step has started the loads.
        eventually(lambda: counts(self.consumer)["claimed"] == claimed + len(firsts))
        self.redis.wire.after(5 * CHUNK, "hold")
        self.consumer.until(self.redis.wire.struck.is_set, "chunks on their way from the server")
        assert 4 < self.redis.gets < CHUNKS * len(self.consumer.workers)
        return [f"d{first}" for first in firsts]


Make = Callable[..., Site]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return ``make(ranks, **options)``, which opens a site that has handed a prompt over."""
    _plugin.register()
    with contextlib.ExitStack() as stack:

        def make(ranks: int = 1, **options: Any) -> Site:
            redis = stack.enter_context(WiredRedis())
            buffer = {"name": "redis", "url": redis.url, "timeout_s": TIMEOUT_S, "chunk_bytes": CHUNK, **options}
            extra = {"lease_s": 2.0, "lookup_timeout_s": 2 * TIMEOUT_S, "buffer": buffer}
            engines = Deployment.open(describe_model(tmp_path), "KvConnectRedis", extra, ranks)
            site = Site(stack.enter_context(contextlib.closing(engines)), redis)
            assert site.outcome(1) == "loaded"
            return site

        yield make


def counts(engine: CheckedEngine) -> Counter[str]:
    """What an engine's ends have counted, all workers together."""
    ends = [engine.scheduler.connector._scheduler._end, *(worker._worker._end for worker in engine.workers)]
    found: Counter[str] = Counter()
    for end in ends:
        found.update(end.stats())
    return found


@dataclass(frozen=True)
class Fault:
    """What becomes of the server, how that ends, and how many workers each engine has."""

    strike: Callable[[WiredRedis], None]
    mend: Callable[[WiredRedis], None]
    ranks: int = 1


FAULTS = {
    "killed": Fault(WiredRedis.dies, lambda redis: redis.server.start()),
    "killed within a chunk": Fault(WiredRedis.dies_within_a_chunk, lambda redis: redis.server.start()),
    "killed, two workers": Fault(WiredRedis.dies, lambda redis: redis.server.start(), ranks=2),
    "hangs": Fault(WiredRedis.hangs, lambda redis: redis.server.go_on()),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_server_that_fails_while_a_prompt_is_written_costs_that_prompt(make: Make, fault: Fault) -> None:
    site = make(fault.ranks)
    site.write_halfway(2)
    fault.strike(site.redis)
    site.engines.rest()
    counted = counts(site.producer)
    assert (counted["writes"], counted["stored"], counted["not_stored_store_failed"]) == (fault.ranks, 1, 1)
    # When the first worker has failed, the others are told to stop.
    assert 1 <= counted["write_failed_broken"] <= fault.ranks
    assert site.outcome(3) == "computed"
    fault.mend(site.redis)
    site.loads_again(4)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_server_that_fails_while_a_prompt_is_read_costs_computing_it(make: Make, fault: Fault) -> None:
    site = make(fault.ranks)
    names = site.read_halfway(2)
    fault.strike(site.redis)
    assert site.end(*names) == "computed"
    counted = counts(site.consumer)
    assert (counted["claimed"], counted["loads"], counted["load_failed_broken"]) == (2, fault.ranks, fault.ranks)
    assert site.outcome(3) == "computed"
    fault.mend(site.redis)
    site.loads_again(4)


def test_every_request_whose_prompt_is_being_read_is_computed(make: Make) -> None:
    site = make()
    names = site.read_halfway(2, 3, 4)
    site.redis.dies()
    assert site.end(*names) == "computed"
    assert counts(site.consumer)["load_failed_broken"] == 3
    site.redis.server.start()
    site.loads_again(5)


def _is_cut(redis: WiredRedis) -> None:
    redis.wire.cut()
    redis.wire.let_go()


def _pauses(redis: WiredRedis) -> None:
    redis.hangs()
    threading.Event().wait(TIMEOUT_S / 4)
    redis.server.go_on()


@pytest.mark.parametrize("strike", [_is_cut, _pauses], ids=["connections are reset", "the server pauses"])
def test_what_is_over_soon_costs_nothing(make: Make, strike: Callable[[WiredRedis], None]) -> None:
    site = make()
    site.write_halfway(2)
    strike(site.redis)
    site.engines.rest()
    names = site.read_halfway(3)
    strike(site.redis)
    assert site.end(*names) == "loaded"
    site.consumer.add("d2", prompt(2))
    assert site.end("d2") == "loaded"


@pytest.mark.parametrize("mode", ["take", "share"])
def test_a_server_that_comes_back_empty_at_once_never_has_half_a_prompt(make: Make, mode: str) -> None:
    site = make(mode=mode)
    site.write_halfway(2)
    site.redis.comes_back_empty()
    site.engines.rest()
    eventually(lambda: counts(site.producer)["not_stored_store_failed"] == 1)
    site.producer.ask("again", prompt(2), dict(ASK), max_tokens=1)
    site.engines.rest()
    site.consumer.add("d2", prompt(2))
    assert site.end("d2") == "loaded", "half a prompt is in the way of a whole one"
    names = site.read_halfway(3)
    site.redis.comes_back_empty()
    assert site.end(*names) == "computed"
    assert counts(site.consumer)["load_failed_load"] == 1
    assert site.outcome(4) == "loaded"
