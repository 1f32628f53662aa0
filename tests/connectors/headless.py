"""An engine without a model: vLLM's own scheduler and its workers' steps around a connector, over CPU tensors.

What is of a release, whichever is installed, is its own: the scheduler, and the order in which a
worker's step calls the connector (`KVConnectorModelRunnerMixin`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

BLOCK, BLOCKS, LAYERS, HEADS, DIM = 16, 64, 4, 2, 32
#: Shapes of a layer's tensor: of releases with keys and values apart, first or second, and of later ones.
SHAPES = {
    "keys and values first": (2, BLOCKS, BLOCK, HEADS, DIM),
    "blocks first": (BLOCKS, 2, BLOCK, HEADS, DIM),
    "keys and values together": (BLOCKS, HEADS, BLOCK, 2 * DIM),
}
LIMIT_S = 20.0


class Engine:
    """One engine with a worker. Requests are steps of `step`, and each new token is the same."""

    def __init__(
        self, model: str, transfer: Mapping[str, Any], shape: tuple[int, ...], seed: int, *, caches: bool = True
    ) -> None:
        """``caches``: blocks that are free again stay what they are until they are reused."""
        init_none_hash(sha256)
        self.config = VllmConfig(
            model_config=ModelConfig(model=model, dtype="float32", max_model_len=512, skip_tokenizer_init=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, is_encoder_decoder=False
            ),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=caches),
            kv_transfer_config=KVTransferConfig(**transfer),
        )
        self.config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
        layers = [f"layers.{i}" for i in range(LAYERS)]
        kv = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)])
        noise = torch.Generator().manual_seed(seed)
        self.caches = {layer: torch.randn(shape, generator=noise) for layer in layers}
        with set_current_vllm_config(self.config):
            self.worker: Any = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, kv)
            self.worker.register_kv_caches(self.caches)
            self.scheduler = Scheduler(self.config, kv, StructuredOutputManager(self.config), BLOCK)
        self._ended: dict[str, Any] = {}

    def block(self, number: int) -> torch.Tensor:
        """Return one block's bytes in all layers."""
        by = [cache.movedim(1, 0) if cache.shape[0] == 2 else cache for cache in self.caches.values()]
        return torch.cat([cache[number].flatten() for cache in by])

    def ask(self, name: str, tokens: Sequence[int], params: Any = None, max_tokens: int = 3) -> tuple[Any, int]:
        """Serve a request to its end; return its last output and how many tokens its first step computed."""
        self.add(name, tokens, params, max_tokens)
        until, computed = time.monotonic() + LIMIT_S, 0
        while name not in self._ended:
            assert time.monotonic() < until, f"{name} is {self.scheduler.requests[name].status.name}"
            done = self.step().num_scheduled_tokens
            computed = computed or done.get(name, 0)
        return self._ended[name], computed

    def add(self, name: str, tokens: Sequence[int], params: Any = None, max_tokens: int = 3) -> None:
        """Take a request in."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, extra_args={"kv_transfer_params": params})
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request(name, list(tokens), sampling, None, block_hasher=hasher))

    def step(self) -> SchedulerOutput:
        """Take one step, as an engine's core does."""
        return self.carry_out(self.scheduler.schedule())

    def carry_out(self, planned: SchedulerOutput) -> SchedulerOutput:
        """Do what the scheduler has planned."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self.worker
        moved = KVConnectorModelRunnerMixin.kv_connector_no_forward(planned, self.config)
        self.computed(planned, moved.kv_connector_output)
        names = list(planned.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=moved.kv_connector_output,
        )
        for outputs in self.scheduler.update_from_output(planned, result).values():
            self._ended |= {o.request_id: o for o in outputs.outputs if o.finish_reason is not None}
        return planned

    def computed(self, planned: SchedulerOutput, moved: Any) -> None:
        """A step's tokens are computed and its loads heard of; the scheduler does not know yet."""

    def free_blocks(self) -> int:
        """Blocks that are nobody's; one of all is vLLM's own."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def close(self) -> None:
        """Shut both halves down."""
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        self.worker.shutdown()
        self.scheduler.shutdown()
