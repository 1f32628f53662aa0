"""`KvConnector`: the only class that vLLM sees, a thin facade over two halves."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvconnect.connectors import compat, setup, siblings
from kvconnect.connectors.metrics import PromMetrics, Stats
from kvconnect.connectors.plan import Plan
from kvconnect.connectors.scheduler import SchedulerHalf
from kvconnect.connectors.worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class KvConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's connector interface, forwarded to `SchedulerHalf` or `WorkerHalf`.

    Loads are asynchronous and move whole opaque blocks, so the per-layer hooks have
    nothing to do and CUDA graphs stay whole.
    """

    #: The pipe that a subclass stands for; ``None`` leaves it to the configuration.
    pipe: ClassVar[str | None] = None
    #: The buffer that a subclass stands for, likewise.
    buffer: ClassVar[str | None] = None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Build this process's half. Never waits: workers are built before the scheduler."""
        super().__init__(vllm_config, role, kv_cache_config)
        compat.share_vllm_logging()
        engine = setup.engine(vllm_config, kv_cache_config, self.pipe, self.buffer)
        rank = compat.worker_rank() if role is KVConnectorRole.WORKER else siblings.SCHEDULER
        siblings.enter(self, siblings.Post.of(engine.settings, rank))
        self._scheduler = SchedulerHalf(engine) if role is KVConnectorRole.SCHEDULER else None
        self._worker = WorkerHalf(engine, rank) if role is KVConnectorRole.WORKER else None

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Wish for a layout, where that is all it is: vLLM's name for this says more than it means."""
        asker = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001 - see `compat.may_wish_for_layout`
        return setup.layout_wish(vllm_config, cls.pipe) if compat.may_wish_for_layout(asker) else None

    @property
    def _s(self) -> SchedulerHalf:
        if self._scheduler is None:
            raise RuntimeError("a scheduler hook was called on a worker's connector")
        return self._scheduler

    @property
    def _w(self) -> WorkerHalf:
        if self._worker is None:
            raise RuntimeError("a worker hook was called on a scheduler's connector")
        return self._worker

    # -- scheduler ----------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """See `SchedulerHalf.bind_pool`."""
        self._s.bind_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """See `SchedulerHalf.arrived`."""
        self._s.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See `SchedulerHalf.matched_tokens`."""
        return self._s.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See `SchedulerHalf.allocated`."""
        self._s.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `SchedulerHalf.build_plan`."""
        return self._s.build_plan(running=len(scheduler_output.num_scheduled_tokens))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `SchedulerHalf.worker_output`."""
        self._s.worker_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerHalf.finished`."""
        return self._s.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: Sequence[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerHalf.finished`."""
        return self._s.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """See `SchedulerHalf.wants_steps`."""
        return self._s.wants_steps()

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """A hand-over restores the request's own blocks, in every group that takes part."""
        return tuple(compat.transfer_groups(self._kv_cache_config))

    def take_events(self) -> Iterable[Any]:
        """See `SchedulerHalf.take_events`."""
        return self._s.take_events()

    def reset_cache(self) -> bool | None:
        """See `SchedulerHalf.reset`."""
        return self._s.reset()

    # -- worker -------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See `WorkerHalf.register`."""
        self._w.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See `WorkerHalf.start`."""
        self._w.start(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is not scheduled before its load is over."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are lent whole when the request has finished."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Report loads that are over (before 0.30)."""
        received, _ = self._w.take_results(self._plan())
        return None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Report loads that are over and which of them failed (0.30 and later)."""
        received, failed = self._w.take_results(self._plan())
        return compat.make_results(received, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See `WorkerHalf.take_bad_blocks`."""
        return self._w.take_bad_blocks()

    def build_connector_worker_meta(self) -> Any:
        """See `WorkerHalf.news`."""
        return self._w.news(self._plan())

    # -- both ---------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Stats | None:
        """Return what this process's half has observed since the last call."""
        return self._w.stats() if self._scheduler is None else self._scheduler.stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        """Rebuild what another process has observed; what is added to it does not change ``data``."""
        return Stats({name: dict(series) for name, series in (data or {}).items()})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """Register the metrics, in the process that serves HTTP."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues, cls.__name__)

    def shutdown(self) -> None:
        """End all transfers and stop all threads of this process's half."""
        siblings.leave(self)
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()

    def _plan(self) -> Plan:
        plan = self._connector_metadata
        return plan if isinstance(plan, Plan) else Plan()
