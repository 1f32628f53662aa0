"""What a connector owes vLLM's scheduler, each a plain function over two engines without a model.

Beside what each law asks, vLLM's own scheduler asserts at every step, and `CheckedEngine.wrong` has to
stay empty. A law ends when both engines have every block back. It raises `AssertionError`.

Requests are handed over as vLLM's NixlConnector does it: the producer's answer has
``kv_transfer_params``, and the consumer's request brings them. A connector that finds KV by
content may return none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvconnect.testing.checked_engine import CheckedEngine
from kvconnect.testing.engine import BLOCK, BLOCKS

#: What a router asks of the producer.
ASK = {"do_remote_decode": True}
#: Seven blocks of 63, the last one in part.
TOKENS = 6 * BLOCK + 4


@dataclass
class Deployment:
    """A producer and a consumer; whoever opened it closes it."""

    producer: CheckedEngine
    consumer: CheckedEngine

    @classmethod
    def open(
        cls, model: str, connector: str, extra_config: Mapping[str, Any] | None = None, ranks: int = 1
    ) -> Deployment:
        """Build both engines.

        Args:
            model: as for `kvconnect.testing.engine.Engine`.
            connector: its name in vLLM's factory.
            extra_config: ``kv_connector_extra_config`` of both. What is lent and not fetched has to come
                back within seconds.
            ranks: tensor-parallel workers of each.

        """
        common = {
            "kv_connector": connector,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": dict(extra_config or {}),
        }
        producer = CheckedEngine(model, common | {"kv_role": "kv_producer"}, ranks=ranks)
        try:
            return cls(producer, CheckedEngine(model, common | {"kv_role": "kv_consumer"}, ranks=ranks))
        except BaseException:  # whatever it is, no engine is left behind
            producer.close()
            raise

    def hand_over(self, *firsts: int, max_tokens: int = 3) -> list[str]:
        """Prefill the prompts that begin with ``firsts`` and give them to the consumer; return their names there."""
        offered = {first: self.offer(first) for first in firsts}
        for first, params in offered.items():
            self.consumer.add(f"d{first}", prompt(first), params, max_tokens)
        return [f"d{first}" for first in firsts]

    def offer(self, first: int) -> Any:
        """Prefill a prompt; return what names its KV."""
        answer, _ = self.producer.ask(f"p{first}", prompt(first), dict(ASK), max_tokens=1)
        return answer.kv_transfer_params

    def finish(self, *names: str) -> None:
        """Have the consumer serve requests to their end."""
        self.consumer.until(lambda: self.consumer.ended.keys() >= set(names), f"end of {', '.join(names)}")

    def rest(self) -> None:
        """Step both until all blocks are free and nothing is under way; fail if anything went wrong meanwhile."""
        for engine in (self.consumer, self.producer):
            engine.until(lambda engine=engine: engine.free_blocks() == BLOCKS - 1, "return of every block")  # type: ignore[misc]
            assert not engine.loading, f"loads never ended: {engine.loading}"
            assert not engine.wrong, "; ".join(engine.wrong)

    def close(self) -> None:
        """Shut both down."""
        for engine in (self.consumer, self.producer):
            engine.close()


Law = Callable[[Deployment], None]


def prompt(first: int) -> range:
    """Return one prompt of many; no two share a block."""
    return range(first * 500, first * 500 + TOKENS)


def a_load_brings_every_block(engines: Deployment) -> None:
    """The consumer decodes from what the producer computed, and computes one token of the prompt."""
    (name,) = engines.hand_over(1)
    engines.finish(name)
    assert engines.consumer.outcomes[name] == "loaded", "the consumer computed what was there to be loaded"
    engines.rest()


def several_loads_run_at_once(engines: Deployment) -> None:
    """Each request gets its own blocks."""
    names = engines.hand_over(1, 2, 3, 4)
    engines.finish(*names)
    assert {engines.consumer.outcomes[name] for name in names} == {"loaded"}, engines.consumer.outcomes
    engines.rest()


def what_was_not_offered_is_computed(engines: Deployment) -> None:
    """A request that no producer saw is no load, and no error."""
    engines.consumer.add("d1", prompt(1))
    engines.finish("d1")
    assert engines.consumer.outcomes["d1"] == "computed", engines.consumer.outcomes
    engines.rest()


def a_load_that_fails_is_computed(engines: Deployment) -> None:
    """The producer's last worker is gone: no request decodes from half a load, and none is lost."""
    params = engines.offer(1)
    engines.producer.workers[-1].shutdown()
    engines.consumer.add("d1", prompt(1), params)
    engines.finish("d1")
    assert engines.consumer.outcomes["d1"] != "error", "a load that failed was not computed anew"
    engines.rest()


def an_aborted_load_gives_its_blocks_back(engines: Deployment) -> None:
    """Its client leaves while it waits for its KV; the load is heard of nevertheless, once."""
    (name,) = engines.hand_over(1)
    engines.consumer.until(lambda: engines.consumer.loads(name), "load")
    engines.consumer.abort(name)
    engines.rest()
    engines.finish(*engines.hand_over(2))
    assert engines.consumer.outcomes["d2"] == "loaded", "nothing is loaded after an abort"
    engines.rest()


def a_request_aborted_before_its_load_leaves_nothing(engines: Deployment) -> None:
    """Before the consumer took a step; what was lent for it comes back."""
    (name,) = engines.hand_over(1)
    engines.consumer.abort(name)
    engines.rest()


def a_preempted_request_comes_back(engines: Deployment) -> None:
    """Its blocks are another's meanwhile; it loads or computes anew."""
    names = engines.hand_over(1, 2, max_tokens=20)
    consumer = engines.consumer
    consumer.until(lambda: consumer.outcomes.keys() >= set(names), "first tokens")
    consumer.preempt()
    engines.finish(*names)
    engines.rest()


#: Every law about whole lives of requests.
LAWS: tuple[Law, ...] = (
    a_load_brings_every_block,
    several_loads_run_at_once,
    what_was_not_offered_is_computed,
    a_load_that_fails_is_computed,
    an_aborted_load_gives_its_blocks_back,
    a_request_aborted_before_its_load_leaves_nothing,
    a_preempted_request_comes_back,
)
