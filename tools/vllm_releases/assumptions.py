"""What kvconnect assumes about vLLM, as data: the only list.

``used`` says where in ``kvconnect/`` it is relied upon; ``without`` what happens
there in a release that lacks it. An assumption without a ``without`` is needed.
"""

from __future__ import annotations

from tools.vllm_releases.kinds import (
    CONNECTOR_BASE,
    Assumption,
    BlocksCounted,
    Call,
    Called,
    Hook,
    Members,
    Name,
    NothingElseIsAbstract,
    OneOf,
    Says,
)

_BLOCK_HASHES = "vllm.v1.core.kv_cache_utils"
_BACKENDS = "vllm.v1.attention.backends"
_EVENTS = "vllm.distributed.kv_events"
_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
_INTERFACE = "vllm.v1.kv_cache_interface"
_METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
_POOL = "vllm.v1.core.block_pool"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

#: Methods of `KvConnector` that vLLM calls.
HOOKS: tuple[Assumption, ...] = (
    Hook(name="__init__"),
    Hook(name="get_required_kvcache_layout"),
    Hook(name="bind_gpu_block_pool"),
    Hook(name="on_new_request"),
    Hook(name="get_num_new_matched_tokens"),
    Hook(name="update_state_after_alloc"),
    Hook(name="build_connector_meta"),
    Hook(name="update_connector_output"),
    Hook(name="request_finished"),
    Hook(name="request_finished_all_groups"),
    Hook(name="has_pending_push_work", without="blocks that takers have released return when the engine steps next"),
    Hook(name="get_loaded_kv_cache_group_ids", without="nobody asks which groups were loaded"),
    Hook(name="take_events"),
    Hook(name="reset_cache"),
    Hook(name="register_kv_caches"),
    Hook(name="start_load_kv"),
    Hook(name="wait_for_layer_load"),
    Hook(name="save_kv_layer"),
    Hook(name="wait_for_save"),
    Hook(name="get_finished"),
    Hook(name="get_transfer_results", without="`get_finished` and `get_block_ids_with_load_errors` report"),
    Hook(name="get_block_ids_with_load_errors"),
    Hook(name="build_connector_worker_meta"),
    Hook(name="get_kv_connector_stats"),
    Hook(name="build_kv_connector_stats"),
    Hook(name="build_prom_metrics"),
    Hook(name="shutdown"),
    NothingElseIsAbstract(),
    Called(names=("get_required_kvcache_layout",)),
    Called(names=("on_new_request",)),
    Called(names=("get_num_new_matched_tokens",)),
    Called(names=("update_state_after_alloc",)),
    Called(names=("build_connector_meta",)),
    Called(names=("update_connector_output",)),
    Called(names=("request_finished", "request_finished_all_groups")),
    Called(
        names=("has_pending_push_work",), without="blocks that takers have released return when the engine steps next"
    ),
    Called(names=("get_loaded_kv_cache_group_ids",), without="nobody asks which groups were loaded"),
    Called(names=("take_events",)),
    Called(names=("reset_cache",)),
    Called(names=("register_kv_caches",)),
    Called(names=("start_load_kv",)),
    Called(names=("get_finished", "get_transfer_results")),
    Called(names=("get_block_ids_with_load_errors",)),
    Called(names=("build_connector_worker_meta",)),
    Called(names=("get_kv_connector_stats",)),
    OneOf(
        parts=(
            Says(
                module=_SCHEDULER,
                within="Scheduler.__init__",
                any_of=("connector.bind_gpu_block_pool(self.kv_cache_manager.block_pool)",),
                meaning="the scheduler gives the connector its block pool",
                used=("connectors/scheduler.py",),
            ),
            Says(
                module=CONNECTOR_BASE,
                within="KVConnectorBase_V1.bind_kv_cache_manager",
                any_of=("self.bind_gpu_block_pool(kv_cache_manager.block_pool)",),
                meaning="the base class does",
                used=("connectors/scheduler.py",),
            ),
        ),
        used=("connectors/scheduler.py",),
    ),
)

#: How a connector is found and built.
LOADING: tuple[Assumption, ...] = (
    Name(module="vllm", name="__version__", used=("connectors/compat.py",)),
    Says(
        module="vllm.plugins",
        within="load_general_plugins",
        any_of=("DEFAULT_PLUGINS_GROUP", "'vllm.general_plugins'"),
        meaning="plugins are entry points of `vllm.general_plugins`",
        used=("_plugin.py",),
    ),
    Name(module=_FACTORY, name="KVConnectorFactory", used=("_plugin.py",)),
    Call(module=_FACTORY, cls="KVConnectorFactory", method="register_connector", arguments=3, used=("_plugin.py",)),
    Says(
        module=_FACTORY,
        within="KVConnectorFactory.register_connector",
        any_of=("raise ValueError",),
        meaning="a name that is taken is a `ValueError`",
        used=("_plugin.py",),
    ),
    Says(
        module=_FACTORY,
        within="KVConnectorFactory.register_connector",
        any_of=("importlib.import_module(module_path)",),
        meaning="the loader keeps `module_path` and `class_name`",
        used=("_plugin.py",),
    ),
    Members(module=_FACTORY, cls="KVConnectorFactory", names=("_registry",), used=("_plugin.py",)),
    Says(
        module=_FACTORY,
        within="KVConnectorFactory.create_connector",
        any_of=("connector_cls(config, role, kv_cache_config)", "connector_cls(vllm_config, role, kv_cache_config)"),
        meaning="connectors are built from configuration, role and KV-cache configuration",
        used=("connectors/base.py",),
    ),
    Members(
        module=CONNECTOR_BASE,
        cls="KVConnectorBase_V1",
        names=("_connector_metadata", "_kv_cache_config"),
        used=("connectors/base.py",),
    ),
    Name(module=CONNECTOR_BASE, name="SupportsHMA", used=("connectors/base.py",)),
    Members(module=CONNECTOR_BASE, cls="KVConnectorRole", names=("SCHEDULER", "WORKER"), used=("connectors/base.py",)),
    Name(module=CONNECTOR_BASE, name="KVConnectorMetadata", used=("connectors/plan.py", "connectors/base.py")),
    Call(
        module=CONNECTOR_BASE,
        cls="KVConnectorWorkerMetadata",
        method="aggregate",
        arguments=1,
        used=("connectors/plan.py",),
    ),
    Members(
        module=CONNECTOR_BASE,
        cls="KVConnectorTransferResults",
        names=("finished_sending", "finished_recving", "failed_recving"),
        used=("connectors/compat.py",),
        without="failed loads are reported by block; a consumer whose model has several groups computes everything",
    ),
)

#: What is read from vLLM's configuration.
CONFIGURATION: tuple[Assumption, ...] = (
    Members(
        module="vllm.config",
        cls="VllmConfig",
        names=(
            "kv_transfer_config",
            "parallel_config",
            "scheduler_config",
            "model_config",
            "cache_config",
            "speculative_config",
        ),
        used=("connectors/setup.py", "connectors/fingerprint.py"),
    ),
    Members(
        module="vllm.config",
        cls="KVTransferConfig",
        names=(
            "kv_connector_extra_config",
            "kv_port",
            "engine_id",
            "is_kv_producer",
            "is_kv_consumer",
            "kv_load_failure_policy",
        ),
        used=("connectors/compat.py", "connectors/setup.py"),
    ),
    Members(
        module="vllm.config",
        cls="KVTransferConfig",
        names=("kv_ip", "kv_rank", "kv_parallel_size"),
        used=("connectors/compat.py",),
        without="they belong into `kv_connector_extra_config`",
    ),
    Members(
        module="vllm.config",
        cls="ParallelConfig",
        names=("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_index"),
        used=("connectors/setup.py", "connectors/compat.py"),
    ),
    Members(
        module="vllm.config",
        cls="ParallelConfig",
        names=("decode_context_parallel_size", "prefill_context_parallel_size"),
        used=("connectors/compat.py",),
        without="the missing one counts as 1",
    ),
    Members(
        module="vllm.config",
        cls="SchedulerConfig",
        names=("max_num_batched_tokens", "max_num_seqs"),
        used=("connectors/setup.py",),
    ),
    Members(
        module="vllm.config",
        cls="ModelConfig",
        names=("model", "revision", "dtype", "quantization"),
        used=("connectors/fingerprint.py",),
    ),
    Members(module="vllm.config", cls="CacheConfig", names=("cache_dtype",), used=("connectors/fingerprint.py",)),
    Members(
        module="vllm.config",
        cls="SpeculativeConfig",
        names=("method", "model", "draft_model_config"),
        used=("connectors/compat.py",),
    ),
    Name(module="vllm.platforms", name="current_platform", used=("connectors/fingerprint.py",)),
    Members(
        module="vllm.platforms.interface", cls="Platform", names=("device_type",), used=("connectors/fingerprint.py",)
    ),
    Name(module="vllm.distributed.parallel_state", name="get_pp_group", used=("connectors/compat.py",)),
    Name(module="vllm.distributed.parallel_state", name="get_tp_group", used=("connectors/compat.py",)),
    Members(
        module="vllm.distributed.parallel_state",
        cls="GroupCoordinator",
        names=("rank_in_group", "world_size"),
        used=("connectors/compat.py",),
    ),
)

#: What a request, its blocks and a step look like.
SCHEDULING: tuple[Assumption, ...] = (
    Members(
        module="vllm.v1.request",
        cls="Request",
        names=(
            "request_id",
            "kv_transfer_params",
            "prompt_token_ids",
            "lora_request",
            "mm_features",
            "cache_salt",
            "pooling_params",
            "status",
            "num_tokens",
            "num_prompt_tokens",
            "num_computed_tokens",
        ),
        used=(
            "connectors/identity.py",
            "connectors/fetching.py",
            "connectors/lending.py",
            "connectors/scheduler.py",
        ),
    ),
    Members(
        module="vllm.v1.request",
        cls="Request",
        names=("prompt_embeds", "resumable"),
        used=("connectors/identity.py", "connectors/fetching.py"),
        without="there are no such requests",
    ),
    Members(
        module="vllm.v1.request",
        cls="Request",
        names=("skip_reading_prefix_cache",),
        used=("connectors/fetching.py",),
        without="there are no such requests",
    ),
    Members(
        module="vllm.v1.request",
        cls="RequestStatus",
        names=("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"),
        used=("connectors/lending.py",),
    ),
    Members(
        module="vllm.v1.request",
        cls="RequestStatus",
        names=("FINISHED_REPETITION",),
        used=("connectors/lending.py",),
        without="no request ends like this",
    ),
    Members(
        module="vllm.lora.request",
        cls="LoRARequest",
        names=("lora_name", "lora_path"),
        used=("connectors/identity.py",),
    ),
    Members(
        module="vllm.multimodal.inputs",
        cls="MultiModalFeatureSpec",
        names=("identifier", "mm_position"),
        used=("connectors/identity.py",),
    ),
    Members(
        module="vllm.multimodal.inputs",
        cls="PlaceholderRange",
        names=("offset", "length"),
        used=("connectors/identity.py",),
    ),
    Members(
        module="vllm.v1.core.sched.output",
        cls="SchedulerOutput",
        names=("num_scheduled_tokens",),
        used=("connectors/base.py",),
    ),
    Members(
        module="vllm.v1.outputs",
        cls="KVConnectorOutput",
        names=("finished_recving", "kv_connector_worker_meta"),
        used=("connectors/scheduler.py",),
    ),
    Call(
        module="vllm.v1.core.kv_cache_manager",
        cls="KVCacheBlocks",
        method="get_block_ids",
        used=("connectors/compat.py",),
    ),
    Members(module=_POOL, cls="BlockPool", names=("blocks",), used=("connectors/compat.py",)),
    Call(module=_POOL, cls="BlockPool", method="get_num_free_blocks", used=("connectors/compat.py",)),
    Call(module=_POOL, cls="BlockPool", method="touch", arguments=1, used=("connectors/compat.py",)),
    Says(
        module=_POOL,
        within="BlockPool.touch",
        any_of=("for block in blocks:\n        if",),
        meaning="`touch` takes a flat sequence of blocks",
        used=("connectors/compat.py",),
    ),
    Call(module=_POOL, cls="BlockPool", method="free_blocks", arguments=1, used=("connectors/compat.py",)),
    Call(module=_POOL, cls="BlockPool", method="reset_prefix_cache", used=("connectors/compat.py",)),
    Says(
        module=_POOL,
        within="BlockPool.__init__",
        any_of=("self.null_block = self.free_block_queue.popleft()",),
        meaning="the first block, 0, is the null block",
        used=("connectors/compat.py",),
    ),
    Members(
        module=_SCHEDULER,
        cls="Scheduler",
        names=("_drain_deferred_frees",),
        used=("connectors/compat.py",),
        without="on CUDA, loads wait for an event of the compute stream (`connectors/fence.py`)",
    ),
)

#: What the KV cache looks like.
KV_CACHE: tuple[Assumption, ...] = (
    Members(
        module=_INTERFACE,
        cls="KVCacheConfig",
        names=("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
        used=("connectors/compat.py", "connectors/setup.py"),
    ),
    Members(
        module=_INTERFACE,
        cls="KVCacheConfig",
        names=("transfer_group_ids",),
        used=("connectors/compat.py",),
        without="every group takes part",
    ),
    Members(module=_INTERFACE, cls="KVCacheTensor", names=("size",), used=("connectors/compat.py",)),
    Members(
        module=_INTERFACE,
        cls="KVCacheTensor",
        names=("layer_stride",),
        used=("connectors/compat.py",),
        without="`size` is the tensor's own, not that of the allocation which all share",
    ),
    Members(
        module=_INTERFACE,
        cls="KVCacheGroupSpec",
        names=("layer_names", "kv_cache_spec"),
        used=("connectors/groups.py",),
    ),
    Members(
        module=_INTERFACE,
        cls="FullAttentionSpec",
        names=("block_size", "page_size_bytes", "dtype"),
        used=("connectors/groups.py",),
    ),
    Members(module=_INTERFACE, cls="SlidingWindowSpec", names=("sliding_window",), used=("connectors/groups.py",)),
    Members(
        module=_INTERFACE, cls="UniformTypeKVCacheSpecs", names=("kv_cache_specs",), used=("connectors/groups.py",)
    ),
    Name(module=_INTERFACE, name="MLAAttentionSpec", used=("connectors/groups.py",)),
    Name(
        module=_INTERFACE,
        name="SlidingWindowMLASpec",
        used=("connectors/groups.py",),
        without="no model has such a group",
    ),
    Name(
        module=_INTERFACE,
        name="SinkFullAttentionSpec",
        used=("connectors/groups.py",),
        without="no model has such a group",
    ),
    OneOf(
        parts=(
            Members(
                module=_INTERFACE,
                cls="KVCacheConfig",
                names=("kv_cache_layout",),
                used=("connectors/compat.py",),
            ),
            Name(module="vllm.envs", name="VLLM_KV_CACHE_LAYOUT", used=("connectors/compat.py",)),
        ),
        used=("connectors/compat.py",),
    ),
    Name(
        module=f"{_BACKENDS}.utils",
        name="resolve_kv_cache_layout",
        used=("connectors/compat.py",),
        without="the connector wishes for no layout",
    ),
    Members(
        module="vllm.v1.kv_cache_layout",
        cls="KVCacheLayout",
        names=("BLHNC",),
        used=("connectors/setup.py",),
        without="the connector wishes for no layout",
    ),
    Members(
        module="vllm.distributed.kv_transfer.kv_connector.v1.multi_connector",
        cls="MultiConnector",
        names=("get_required_kvcache_layout",),
        used=("connectors/base.py", "connectors/compat.py"),
    ),
    *(
        OneOf(
            parts=(
                BlocksCounted(module=f"{_BACKENDS}.{module}", cls=cls, used=("connectors/compat.py",)),
                Says(
                    module=_INTERFACE,
                    within="compute_layer_kv_cache_shape_bytes",
                    any_of=("return (num_blocks * blocks_per_page,", "return (num_blocks,"),
                    meaning="one shape for all backends, blocks first",
                    used=("connectors/compat.py",),
                ),
            ),
            used=("connectors/compat.py", "connectors/geometry.py"),
        )
        for module, cls in (
            ("cpu_attn", "CPUAttentionBackend"),
            ("flash_attn", "FlashAttentionBackend"),
            ("flashinfer", "FlashInferBackend"),
            ("rocm_attn", "RocmAttentionBackend"),
            ("triton_attn", "TritonAttentionBackend"),
        )
    ),
)

#: What is told to vLLM's metrics, and how it traces.
OBSERVABILITY: tuple[Assumption, ...] = (
    Members(
        module=_METRICS,
        cls="KVConnectorStats",
        names=("reset", "aggregate", "reduce", "is_empty"),
        used=("connectors/metrics.py",),
    ),
    Call(
        module=_METRICS, cls="KVConnectorPromMetrics", method="__init__", arguments=4, used=("connectors/metrics.py",)
    ),
    Says(
        module=_SCHEDULER,
        within="Scheduler.update_from_output",
        any_of=("scheduler_kv_connector_stats = self.connector.get_kv_connector_stats()",),
        meaning="the scheduler's half is asked for its stats though no worker has any",
        used=("connectors/compat.py",),
        without="its worker answers, too",
    ),
    Says(
        module="vllm.v1.metrics.prometheus",
        within="unregister_vllm_metrics",
        any_of=("startswith('vllm:')", "'vllm' in collector._name"),
        meaning="metrics whose names begin with `vllm:` are made anew for each engine of a process",
        used=("connectors/metrics.py",),
    ),
    Members(module="vllm.v1.request", cls="Request", names=("trace_headers",), used=("connectors/fetching.py",)),
)

#: How KV events are built, and what they have in common with those of vLLM's own blocks.
KV_EVENTS: tuple[Assumption, ...] = (
    Members(module="vllm.config", cls="VllmConfig", names=("kv_events_config",), used=("connectors/compat.py",)),
    Members(
        module="vllm.config", cls="KVEventsConfig", names=("enable_kv_cache_events",), used=("connectors/compat.py",)
    ),
    Members(
        module=_EVENTS,
        cls="BlockStored",
        names=(
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
        ),
        used=("connectors/events.py",),
    ),
    Members(
        module=_EVENTS,
        cls="BlockRemoved",
        names=("block_hashes", "medium", "group_idx"),
        used=("connectors/events.py",),
    ),
    Members(
        module=_EVENTS,
        cls="BlockStored",
        names=("ownership",),
        used=("connectors/events.py",),
        without="KV events do not name the store, only that it is one",
    ),
    Says(
        module=_EVENTS,
        within="KVCacheEvent",
        any_of=("msgspec.Struct",),
        meaning="events know their fields (`__struct_fields__`)",
        used=("connectors/compat.py",),
    ),
    Members(
        module="vllm.v1.request",
        cls="Request",
        names=("block_hashes", "all_token_ids"),
        used=("connectors/compat.py", "connectors/events.py"),
    ),
    Says(
        module="vllm.v1.engine.core",
        within="EngineCore.__init__",
        any_of=("enable_prefix_caching or kv_connector is not None",),
        meaning="requests have block hashes wherever there is a connector",
        used=("connectors/events.py",),
    ),
    Members(module="vllm.lora.request", cls="LoRARequest", names=("adapter_id",), used=("connectors/events.py",)),
    Members(module=_POOL, cls="BlockPool", names=("hash_block_size",), used=("connectors/scheduler.py",)),
    Name(module=_INTERFACE, name="get_kv_cache_spec_kind", used=("connectors/compat.py",)),
    Name(module=_BLOCK_HASHES, name="BlockHashListWithBlockSize", used=("connectors/compat.py",)),
    Name(module=_BLOCK_HASHES, name="maybe_convert_block_hash", used=("connectors/compat.py",)),
    Name(module=_BLOCK_HASHES, name="generate_block_hash_extra_keys", used=("connectors/compat.py",)),
    Name(
        module=_BLOCK_HASHES,
        name="to_event_extra_keys",
        used=("connectors/compat.py",),
        without="extra keys are published as they are hashed",
    ),
)

SECTIONS: dict[str, tuple[Assumption, ...]] = {
    "Methods that vLLM calls": HOOKS,
    "Finding and building a connector": LOADING,
    "Configuration": CONFIGURATION,
    "Requests, steps and blocks": SCHEDULING,
    "The KV cache": KV_CACHE,
    "Metrics and traces": OBSERVABILITY,
    "KV events": KV_EVENTS,
}

ASSUMPTIONS: tuple[Assumption, ...] = tuple(a for section in SECTIONS.values() for a in section)

#: Classes whose members are compared from release to release, whether kvconnect uses them or not.
WATCHED: tuple[tuple[str, str], ...] = (
    (CONNECTOR_BASE, "KVConnectorBase_V1"),
    (CONNECTOR_BASE, "SupportsHMA"),
    ("vllm.config", "KVTransferConfig"),
    (_INTERFACE, "KVCacheConfig"),
    (_INTERFACE, "KVCacheTensor"),
    (_INTERFACE, "KVCacheGroupSpec"),
    (_POOL, "BlockPool"),
    ("vllm.v1.outputs", "KVConnectorOutput"),
)
