"""The connector's half in the scheduler process: what to offer and what to fetch.

Called from the engine's only scheduling thread; nothing here waits for the network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvconnect.connectors import compat, events
from kvconnect.connectors.fetching import Fetching
from kvconnect.connectors.lending import Lending, Limits
from kvconnect.connectors.metrics import Stats
from kvconnect.connectors.plan import Load, Plan, WorkerNews
from kvconnect.connectors.registration import Registration

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvconnect.buffers.base import SchedulerEnd
    from kvconnect.connectors.setup import Engine

log = logging.getLogger(__name__)

#: Steps that an idle engine takes for the sake of introductions, lest one that fails spins for ever.
_ASK_AT_MOST = 100


class SchedulerHalf:
    """Joins `Lending` (producers) and `Fetching` (consumers) to vLLM's scheduler hooks.

    An engine whose model cannot be handed over (``engine.refusal``) has neither and
    computes everything itself.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._end: SchedulerEnd | None = None
        self._lending: Lending | None = None
        self._announcements: events.Announcements | None = None
        self._fetching: Fetching | None = None
        self._workers: dict[int, Any] = {}
        self._asked = 0
        # Data-parallel ranks have one API server.
        registers = engine.config.router_discovery is not None and engine.leads
        self._registration = Registration(engine.settings) if registers else None
        if engine.refusal:
            log.warning("kvconnect hands over no KV: %s; every request is computed locally", engine.refusal)
            return
        self._end = engine.buffer.scheduler_end(engine.settings)
        config = engine.config
        if engine.settings.produces:
            limits = Limits(
                engine.step_blocks, config.unasked_share, engine.lent_blocks, config.lend_policy, config.lease_s / 4
            )
            self._announcements = events.announcements(engine, self._end)
            self._lending = Lending(self._end, engine.namespace, engine.groups, limits, self._announcements)
        if engine.settings.consumes:
            if not engine.recomputes:
                log.info(
                    "a load that fails will fail its request; set kv_load_failure_policy='recompute' to compute it"
                )
            self._fetching = Fetching(
                self._end,
                engine.namespace,
                engine.groups,
                content_lookup=config.content_lookup,
                capacity=engine.loading_blocks,
            )

    @property
    def _introduced(self) -> bool:
        """Whether every worker has described itself."""
        return len(self._workers) == self._engine.settings.num_parts

    def bind_pool(self, pool: BlockPool) -> None:
        """Learn vLLM's block pool."""
        if self._announcements is not None:
            self._announcements.bind(pool.hash_block_size)
        if self._lending is not None:
            self._lending.bind(compat.BlockPins(pool, self._lending.let_go))
        if self._fetching is not None:
            self._fetching.headroom.bind(pool.get_num_free_blocks)

    # -- requests ---------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """``on_new_request``."""
        if self._fetching is not None:
            self._fetching.arrived(request)

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """``get_num_new_matched_tokens``: how much can be fetched, always asynchronously."""
        if self._lending is not None:
            self._lending.admit(self._engine.blocks_for(request.num_tokens))
        if self._fetching is None:
            return 0, False
        tokens = self._fetching.external_tokens(request, local_tokens)
        return tokens, bool(tokens)

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """``update_state_after_alloc``."""
        if self._fetching is not None:
            self._fetching.allocated(request, compat.block_ids(blocks), tokens)

    def finished(self, request: Request, table: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """``request_finished_all_groups``: never delays the blocks, for lent ones are pinned."""
        if self._fetching is not None:
            self._fetching.finished(request.request_id)
        return False, None if self._lending is None else self._lending.finished(request, table)

    # -- steps --------------------------------------------------------------------

    def build_plan(self, *, running: int) -> Plan:
        """``build_connector_meta``: this step's orders; it computes something for ``running`` requests."""
        if self._lending is not None:
            self._lending.after_step()
        loads: tuple[Load, ...] = ()
        if self._fetching is not None:
            self._fetching.headroom.decoding = running
            loads = self._fetching.take_loads()
        introduce = self._end is not None and not self._introduced
        self._asked += introduce
        return Plan(loads, introduce, patient=not running and self._engine.steps_alone)

    def worker_output(self, output: KVConnectorOutput) -> None:
        """``update_connector_output``: loads that are over, and the workers' introductions."""
        if self._fetching is not None and output.finished_recving:
            self._fetching.loaded(output.finished_recving, compat.failed_requests(output))
        news = output.kv_connector_worker_meta
        if isinstance(news, WorkerNews) and self._end is not None:
            self._workers.update(news.descriptions)
            if self._introduced:
                self._end.introduce([self._workers[rank] for rank in sorted(self._workers)])

    def wants_steps(self) -> bool:
        """``has_pending_push_work``: keep an idle producer stepping.

        While takers are expected to release, so that their blocks return; and right after
        the start, until its workers have introduced themselves: who asks before the first
        request would wait for them. And until KV events of what was just stored are taken,
        and metrics have heard how the last entry ended.
        """
        if self._lending is None or self._end is None:
            return False
        self._lending.take_back()
        introduces = not self._introduced and self._asked < _ASK_AT_MOST
        return self._end.awaits_takers() or introduces or self._lending.has_news()

    # -- what vLLM's metrics hear -----------------------------------------------------

    def stats(self) -> Stats | None:
        """``get_kv_connector_stats``: what was observed since the last call."""
        stats = Stats() if self._fetching is None else self._fetching.stats.take()
        if self._lending is not None:
            self._lending.observe(stats)
        return None if stats.is_empty() else stats

    def take_events(self) -> Iterable[Any]:
        """``take_events``: KV events since the last call, of what the store has and has no more."""
        return () if self._announcements is None else self._announcements.take()

    # -- the rest -------------------------------------------------------------------

    def reset(self) -> bool:
        """``reset_cache``: forget every entry that no taker is reading."""
        if self._end is None:
            return True
        if self._lending is not None:
            return self._lending.let_go()
        return self._end.clear()

    def close(self) -> None:
        """``shutdown``."""
        if self._registration is not None:
            self._registration.close()
        if self._end is not None:
            self._end.close()
