"""Every difference between supported vLLM releases. Nothing else knows a version.

Differences are found by looking (``getattr``, signatures), not by comparing
version numbers, wherever looking can tell.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import vllm

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

KVEvent = Literal["BlockStored", "BlockRemoved"]
#: Block 0 is vLLM's null block: a placeholder that is never read nor written.
NULL_BLOCK = 0


def vllm_release() -> str:
    """Return vLLM's version, for hellos and messages."""
    return str(vllm.__version__)


def share_vllm_logging() -> None:
    """Let ``kvconnect.*`` log lines appear where vLLM's do.

    vLLM configures only its own logger, so a plugin's lines would be lost. Nothing
    is touched if the application has configured ``kvconnect`` (or the root) itself.
    """
    ours, theirs = logging.getLogger("kvconnect"), logging.getLogger("vllm")
    if ours.handlers or logging.getLogger().handlers or not theirs.handlers:
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = False


def extra_config(transfer: KVTransferConfig) -> dict[str, Any]:
    """Return ``kv_connector_extra_config`` with vLLM's older fields folded in.

    Up to 0.31 ``kv_ip``, ``kv_rank`` and ``kv_parallel_size`` are fields of
    ``KVTransferConfig``; from 0.32 they are rejected there and belong into the extra config.
    """
    extra = dict(transfer.kv_connector_extra_config or {})
    rank = getattr(transfer, "kv_rank", None)
    if rank is not None:
        extra.setdefault("kv_rank", rank)
        extra.setdefault("kv_parallel_size", transfer.kv_parallel_size)
        extra.setdefault("kv_ip", transfer.kv_ip)
    if extra.get("kv_ip") is not None:
        extra.setdefault("kv_port", transfer.kv_port)
    return extra


def transfer_groups(config: KVCacheConfig) -> list[int]:
    """Return the KV-cache groups that take part in transfers (all of them before 0.29)."""
    chosen = getattr(config, "transfer_group_ids", None)
    return list(range(len(config.kv_cache_groups))) if chosen is None else list(chosen)


def block_dim(shape: tuple[int, ...], num_blocks: int) -> int:
    """Return the dimension of a registered KV tensor that counts blocks.

    0, but for ROCm's attention up to 0.28, which puts K and V first: ``(2, num_blocks, …)``.
    """
    if shape[0] % num_blocks == 0:
        return 0
    if len(shape) > 1 and shape[0] == 2 and shape[1] % num_blocks == 0:
        return 1
    raise ValueError(f"no dimension of {tuple(shape)} counts {num_blocks} blocks")


def may_wish_for_layout(asker: str) -> bool:
    """Whether a connector is free to name the layout of the KV cache that it would like.

    vLLM drops a wish that the attention backend cannot meet (0.29 and later); before, it took any name
    but two for a mistake. A MultiConnector still refuses to start when its children's wishes differ,
    and no child knows that it is one, nor of the others: only the ``asker``, a module's name, shows it.
    """
    from vllm.v1.attention.backends import utils

    return hasattr(utils, "resolve_kv_cache_layout") and not asker.endswith("multi_connector")


def block_bytes(config: KVCacheConfig) -> int:
    """Return the bytes of one block in all layers of one worker.

    Since 0.29 all tensors lie in one allocation, and each says how large that is; before, each has its own size.
    """
    sizes = [tensor.size for tensor in config.kv_cache_tensors]
    shared = all(hasattr(tensor, "layer_stride") for tensor in config.kv_cache_tensors)
    return int((max(sizes, default=0) if shared else sum(sizes)) // config.num_blocks)


def inner_layout(config: KVCacheConfig) -> str:
    """Name the order of heads, tokens and content inside a block; where layers and blocks lie does not matter."""
    layout = getattr(config, "kv_cache_layout", None)
    name = str(getattr(layout, "name", layout) or "")
    if name:
        return "".join(c for c in name if c in "HNC")
    from vllm import envs

    # Before 0.29 it is a setting of the process; without one, tokens come before heads.
    return f"legacy {envs.VLLM_KV_CACHE_LAYOUT or 'NHD'}"


def block_ids(blocks: KVCacheBlocks) -> tuple[list[int], ...]:
    """Return a request's block table, per group."""
    ids: tuple[list[int], ...] = blocks.get_block_ids()
    return ids


def make_results(received: set[str], failed: set[str]) -> Any:
    """Build vLLM's ``KVConnectorTransferResults`` (0.30+)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_sending=set(), finished_recving=received, failed_recving=failed)


def failed_requests(output: KVConnectorOutput) -> set[str] | None:
    """Return the requests whose loads failed, or ``None`` if they are told by block (before 0.30)."""
    failed: set[str] | None = getattr(output, "failed_recving", None)
    return failed


def reports_failed_requests() -> bool:
    """Whether failures are reported by request (0.30+) instead of by block."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    return hasattr(base, "KVConnectorTransferResults")


@functools.cache  # asked in every step
def asks_scheduler_for_stats() -> bool:
    """Whether vLLM asks the scheduler's half for its stats in a step in which no worker has any.

    0.23 does not. There is nothing to look at, but 0.24, which does, brought deferred frees as well.
    """
    return defers_freed_blocks()


def defers_freed_blocks() -> bool:
    """Whether a block that a running step may still write is handed out only after it (0.24+)."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "_drain_deferred_frees")


def worker_rank() -> int:
    """Return this worker's rank among the engine's workers: pipeline stage major, tensor rank minor."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return int(get_pp_group().rank_in_group * get_tp_group().world_size + get_tp_group().rank_in_group)


def publishes_kv_events(config: VllmConfig) -> bool:
    """Whether vLLM publishes KV events."""
    events = config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def spec_kind(spec: Any) -> str:
    """Return what vLLM's KV events call a KV-cache group's kind."""
    from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

    return str(get_kv_cache_spec_kind(spec).value)


def kv_event(name: KVEvent, **fields: Any) -> Any:
    """Build a KV event, without the fields that this release does not have: they came one by one until 0.29."""
    from vllm.distributed import kv_events

    event = getattr(kv_events, name)
    return event(**{field: value for field, value in fields.items() if field in event.__struct_fields__})


def block_hashes(request: Request, hash_block_size: int, block_size: int) -> Sequence[Any]:
    """Return the hashes of a request's whole blocks, which lie ``hash_block_size`` tokens apart in the request."""
    from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize

    hashes: Sequence[Any] = request.block_hashes
    return hashes if block_size == hash_block_size else BlockHashListWithBlockSize(hashes, hash_block_size, block_size)


def published_hash(block_hash: Any) -> bytes | int:
    """Return a block's hash as KV events have it: bytes, or an integer if vLLM is so configured."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    published: bytes | int = maybe_convert_block_hash(block_hash)
    return published


def published_extra_keys(request: Request, tokens: range) -> list[Any] | None:
    """Return what else has gone into the hashes of blocks, as KV events have it; ``tokens`` are their first ones.

    Since 0.31 hashes take it tagged with its source, events still without.
    """
    from vllm.v1.core import kv_cache_utils

    keys, media = [], 0
    for start in tokens:
        extra, media = kv_cache_utils.generate_block_hash_extra_keys(request, start, start + tokens.step, media)
        keys.append(extra)
    untagged = getattr(kv_cache_utils, "to_event_extra_keys", lambda tagged: tagged or None)
    published: list[Any] | None = untagged(keys)
    return published


class BlockPins:
    """Keeps blocks of vLLM's pool from being reused, by holding a reference to each.

    The reference count is what the pool itself uses for blocks that requests share.
    Compared with delaying a finished request (``delay=True``), a pin can be dropped
    at once by the scheduler alone, when a waiting request needs the block.
    Engine thread only.
    """

    def __init__(self, pool: BlockPool, before_reset: Callable[[], object]) -> None:
        """Pin blocks of ``pool``; ``before_reset`` lets go of what it can when the pool is reset.

        vLLM resets the pool *before* it asks the connector to reset, and gives up if any
        block is in use. Entries that nobody reads must not stand in the way, and there is no
        earlier hook, so the pool's own method is wrapped, on this one object.
        """
        self._pool = pool
        self.total = len(pool.blocks)
        reset = pool.reset_prefix_cache

        def reset_prefix_cache() -> bool:
            before_reset()
            return bool(reset())

        pool.reset_prefix_cache = reset_prefix_cache

    @property
    def free(self) -> int:
        """Blocks that a request could get now."""
        free: int = self._pool.get_num_free_blocks()
        return free

    def pin(self, ids: Iterable[int]) -> None:
        """Hold ``ids``; null blocks are skipped."""
        self._pool.touch([self._pool.blocks[i] for i in ids if i != NULL_BLOCK])

    def unpin(self, ids: Iterable[int]) -> None:
        """Let ``ids`` go; the last of a sequence is the first to be reused, as vLLM frees them."""
        self._pool.free_blocks([self._pool.blocks[i] for i in reversed(list(ids)) if i != NULL_BLOCK])


def parallel_fields(parallel: Any) -> Mapping[str, int]:
    """Return the parallel shape that two peers must share."""
    return {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1),
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1),
    }


#: Methods of speculative decoding that keep no KV of their own.
_WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})


def draft_model(speculative: Any) -> str:
    """Name the model whose KV layers stand beside the target's; empty if there are none.

    How many tokens it drafts does not matter to its KV.
    """
    if speculative is None or speculative.method in _WITHOUT_KV:
        return ""
    drafter = speculative.draft_model_config
    name = speculative.model if drafter is None else f"{drafter.model} {drafter.revision or ''}"
    return f"{speculative.method} {name}".strip()
