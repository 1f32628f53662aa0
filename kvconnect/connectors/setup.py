"""What one engine's halves are built from: vLLM's configuration, read once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvconnect import registry
from kvconnect.buffers.base import EndSettings, LookupBuffer
from kvconnect.config import Config, chosen
from kvconnect.connectors import compat, fingerprint, groups
from kvconnect.errors import ConfigError, UnavailableBackendError, UnknownBackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Engine:
    """The engine as both halves see it.

    Args:
        config: the parsed extra configuration.
        settings: what the buffer's ends need.
        buffer: the lookup buffer's class.
        namespace: of all keys: hash of the fingerprint.
        groups: KV-cache groups that take part.
        num_blocks: blocks of the pool.
        lent_blocks: the most of them that may be lent, or ``None``.
        loading_blocks: the most of them that loads under way may hold, or ``None``.
        step_blocks: the most blocks one scheduling step can ask for on behalf of running requests.
        refusal: why this model's KV cannot be handed over, or ``None``.
        recomputes: whether vLLM computes a request whose load failed itself, rather than fail it.
        steps_alone: whether nobody waits for this engine's empty steps: no later pipeline stage, no
            other data-parallel rank.
        leads: whether it is the first of its data-parallel ranks.
        kv_events: whether vLLM publishes KV events.

    """

    config: Config
    settings: EndSettings
    buffer: type[LookupBuffer]
    namespace: str
    groups: tuple[groups.Group, ...]
    num_blocks: int
    lent_blocks: int | None
    loading_blocks: int | None
    step_blocks: int
    refusal: str | None
    recomputes: bool
    steps_alone: bool
    leads: bool
    kv_events: bool

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` tokens takes, all groups together."""
        return sum(-(-tokens // group.block_size) for group in self.groups)


def engine(
    vllm_config: VllmConfig, kv: KVCacheConfig, pipe_preset: str | None, buffer_preset: str | None = None
) -> Engine:
    """Read vLLM's configuration.

    Args:
        vllm_config: vLLM's.
        kv: the KV-cache configuration, of this worker or of the scheduler.
        pipe_preset: the pipe that the connector's class stands for, or ``None`` for `Config.pipe`.
        buffer_preset: likewise, or ``None`` for `Config.buffer`.

    Raises:
        ConfigError: a value is wrong, or the backend is unknown or cannot run here.

    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        raise ConfigError("kv_transfer_config is not set")
    extra = compat.extra_config(transfer)
    config = Config.parse(extra)
    pipe = chosen("pipe", extra, config, pipe_preset)
    _require(pipe.name, pipe_preset)
    config = dataclasses.replace(config, buffer=chosen("buffer", extra, config, buffer_preset))
    marks = fingerprint.fingerprint(vllm_config, kv)
    parallel = vllm_config.parallel_config
    config = _own_port(config, parallel.data_parallel_index)
    settings = EndSettings(
        engine_id=str(transfer.engine_id),
        fingerprint=marks,
        num_parts=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        produces=transfer.is_kv_producer,
        consumes=transfer.is_kv_consumer,
        options=config,
        pipe=pipe,
    )
    refusal = groups.refusal(kv) or _context_parallel(marks)
    if transfer.is_kv_consumer:
        refusal = refusal or groups.fatal_failure(kv)
    members = () if refusal else groups.groups_of(kv)
    scheduler = vllm_config.scheduler_config
    smallest = min((group.block_size for group in members), default=1)
    step_blocks = len(members) * (scheduler.max_num_batched_tokens // smallest + scheduler.max_num_seqs)
    return Engine(
        config=config,
        settings=settings,
        buffer=registry.buffer(config.buffer.name),
        namespace=namespace(marks),
        groups=members,
        num_blocks=kv.num_blocks,
        lent_blocks=_whole_blocks(config.lend_capacity_bytes, compat.block_bytes(kv)),
        loading_blocks=_whole_blocks(config.load_capacity_bytes, compat.block_bytes(kv)),
        step_blocks=step_blocks,
        refusal=refusal,
        recomputes=transfer.kv_load_failure_policy == "recompute",
        steps_alone=parallel.pipeline_parallel_size == parallel.data_parallel_size == 1,
        leads=parallel.data_parallel_index == 0,
        kv_events=compat.publishes_kv_events(vllm_config),
    )


def layout_wish(vllm_config: VllmConfig, preset: str | None) -> str | None:
    """Name the layout of the KV cache that is faster for the pipe, or ``None`` if all are alike to it."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return None
    try:
        extra = compat.extra_config(transfer)
        pipe = registry.pipe(chosen("pipe", extra, Config.parse(extra), preset).name)
    except ConfigError:
        return None  # whoever builds the connector hears of it
    return "BLHNC" if pipe.traits.likes_long_runs else None


def namespace(marks: Mapping[str, str | int]) -> str:
    """Hash a fingerprint into the namespace of keys."""
    text = json.dumps(dict(marks), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _own_port(config: Config, data_parallel_index: int) -> Config:
    """Give each data-parallel engine a port of its own: they share the configuration, not the scheduler."""
    if config.port:
        return dataclasses.replace(config, port=config.port + data_parallel_index)
    if data_parallel_index and config.kv_port:
        # Behind the ports of all ranks, which `kv_port + rank` gives to the first engine of each.
        ranks = config.kv_parallel_size or 1
        own = config.kv_port + (config.kv_rank or 0) + data_parallel_index * ranks
        return dataclasses.replace(config, port=own)
    return config


def _require(pipe: str, preset: str | None) -> None:
    """Fail at start-up, with the reason and the cure, if the pipe cannot run here."""
    if pipe == "auto":
        return
    try:
        registry.pipe(pipe)
    except UnknownBackendError as error:
        if preset is None:
            raise
        raise UnavailableBackendError(
            "pipe",
            preset,
            f"no installed distribution provides it; registered are {', '.join(error.registered)}",
            "upgrade kvconnect, or use kv_connector='KvConnect'",
        ) from error


def _whole_blocks(nbytes: int | None, block_bytes: int) -> int | None:
    return nbytes // block_bytes if nbytes is not None and block_bytes else None


def _context_parallel(marks: Mapping[str, str | int]) -> str | None:
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if marks[field] != 1:
            return f"{field} is {marks[field]}; context parallelism splits blocks over ranks and is not handed over"
    return None
