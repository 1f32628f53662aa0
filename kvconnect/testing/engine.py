"""An engine without a model: vLLM's own scheduler and its workers' steps around a connector, over CPU tensors.

What is of a release, whichever is installed, is its own: the scheduler with all that it asserts, the
order in which a worker's step calls the connector (`KVConnectorModelRunnerMixin`), and how the answers
of several workers become one (`KVOutputAggregator`). This module, `kvconnect.testing.checked_engine`
and the laws over it are the only ones of `kvconnect.testing` that import vLLM.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

BLOCK, BLOCKS, LAYERS, HEADS, DIM = 16, 64, 4, 2, 32
#: Shapes of a layer's tensor: of releases with keys and values apart, first or second, and of later ones.
SHAPES = {
    "keys and values first": (2, BLOCKS, BLOCK, HEADS, DIM),
    "blocks first": (BLOCKS, 2, BLOCK, HEADS, DIM),
    "keys and values together": (BLOCKS, HEADS, BLOCK, 2 * DIM),
}
LIMIT_S = 20.0


_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HEADS * DIM,
    "intermediate_size": 2 * HEADS * DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def describe_model(folder: Path) -> str:
    """Write the configuration of a model into ``folder``, which is all that an engine here reads; return its path."""
    (folder / "config.json").write_text(json.dumps(_MODEL), encoding="ascii")
    return str(folder)


class Engine:
    """One engine, whose requests are steps of `step`; each new token is the same.

    Args:
        model: folder of a model's configuration, `describe_model`'s or a real one's.
        transfer: fields of vLLM's ``KVTransferConfig``.
        shape: of a layer's tensor, one of `SHAPES`.
        seed: of what the KV memory holds at first.
        caches: blocks that are free again stay what they are until they are reused.
        ranks: tensor-parallel workers; all of them are in this process.
        events: where it publishes KV events (ZeroMQ's address), if it does.

    """

    def __init__(
        self,
        model: str,
        transfer: Mapping[str, Any],
        shape: tuple[int, ...],
        seed: int,
        *,
        caches: bool = True,
        ranks: int = 1,
        events: str | None = None,
    ) -> None:
        init_none_hash(sha256)
        self.config = VllmConfig(
            model_config=ModelConfig(model=model, dtype="float32", max_model_len=512, skip_tokenizer_init=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, is_encoder_decoder=False
            ),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=caches),
            parallel_config=ParallelConfig(tensor_parallel_size=ranks),
            kv_transfer_config=KVTransferConfig(**transfer),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, endpoint=events) if events else None,
        )
        self.config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
        layers = [f"layers.{i}" for i in range(LAYERS)]
        kv = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)])
        noise = torch.Generator().manual_seed(seed)
        #: Each worker's KV memory, by layer.
        self.memories = [{layer: torch.randn(shape, generator=noise) for layer in layers} for _ in range(ranks)]
        with set_current_vllm_config(self.config):
            self.workers = [self._worker(rank, kv) for rank in range(ranks)]
            self.scheduler = Scheduler(self.config, kv, StructuredOutputManager(self.config), BLOCK, log_stats=True)
        self._aggregator = KVOutputAggregator.from_connector(self.scheduler.connector, ranks)
        #: How each request that ended did: vLLM's output of its last step.
        self.ended: dict[str, Any] = {}
        #: What the connector has told vLLM's metrics, of each step that it told something in.
        self.stats: list[dict[str, Any]] = []

    def _worker(self, rank: int, kv: KVCacheConfig) -> Any:
        with _as_rank(rank, len(self.memories)):
            worker: Any = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, kv)
            worker.register_kv_caches(self.memories[rank])
        return worker

    @property
    def worker(self) -> Any:
        """The first worker's half of the connector."""
        return self.workers[0]

    def block(self, number: int) -> torch.Tensor:
        """Return one block's bytes in all layers, of the first worker."""
        by = [cache.movedim(1, 0) if cache.shape[0] == 2 else cache for cache in self.memories[0].values()]
        return torch.cat([cache[number].flatten() for cache in by])

    def ask(
        self, name: str, tokens: Sequence[int], params: Any = None, max_tokens: int = 3, trace: Any = None
    ) -> tuple[Any, int]:
        """Serve a request to its end; return its last output and how many tokens its first step computed."""
        self.add(name, tokens, params, max_tokens, trace)
        until, computed = time.monotonic() + LIMIT_S, 0
        while name not in self.ended:
            assert time.monotonic() < until, f"{name} is {self.scheduler.requests[name].status.name}"
            done = self.step().num_scheduled_tokens
            computed = computed or done.get(name, 0)
        return self.ended[name], computed

    def add(self, name: str, tokens: Sequence[int], params: Any = None, max_tokens: int = 3, trace: Any = None) -> None:
        """Take a request in; ``trace`` are its W3C headers, if somebody traces it."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, extra_args={"kv_transfer_params": params})
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(name, list(tokens), sampling, None, block_hasher=hasher, trace_headers=trace)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        """Give a request up, as when its client leaves."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def preempt(self) -> None:
        """Take the blocks of all running requests away, as vLLM does where memory runs out."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def loads(self, name: str) -> bool:
        """Say whether a request waits for its KV."""
        request = self.scheduler.requests.get(name)
        return request is not None and request.status is RequestStatus.WAITING_FOR_REMOTE_KVS

    def step(self) -> Any:
        """Take one step, as an engine's core does; return what the scheduler planned."""
        return self.carry_out(self.scheduler.schedule())

    def carry_out(self, planned: Any) -> Any:
        """Do what the scheduler has planned."""
        names = list(planned.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        outputs = [
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
                kv_connector_output=self._moved(rank, planned),
            )
            for rank in range(len(self.workers))
        ]
        # vLLM asks the aggregator only where there is more than one worker.
        result = outputs[0] if len(outputs) == 1 else self._aggregator.aggregate(outputs)
        self.computed(planned, result.kv_connector_output)
        for answers in self.scheduler.update_from_output(planned, result).values():
            self.ended |= {o.request_id: o for o in answers.outputs if o.finish_reason is not None}
            if answers.scheduler_stats is not None and answers.scheduler_stats.kv_connector_stats:
                self.stats.append(answers.scheduler_stats.kv_connector_stats)
        return planned

    def _moved(self, rank: int, planned: Any) -> Any:
        kv_transfer_state._KV_CONNECTOR_AGENT = self.workers[rank]  # noqa: SLF001 - where a worker has it
        with _as_rank(rank, len(self.workers)):
            return KVConnectorModelRunnerMixin.kv_connector_no_forward(planned, self.config).kv_connector_output

    def computed(self, planned: Any, moved: Any) -> None:
        """A step's tokens are computed and its loads heard of; the scheduler does not know yet."""

    def free_blocks(self) -> int:
        """Blocks that are nobody's; one of all is vLLM's own."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def close(self) -> None:
        """Shut both halves down."""
        kv_transfer_state._KV_CONNECTOR_AGENT = None  # noqa: SLF001 - likewise
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


@contextmanager
def _as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Be one of an engine's tensor-parallel workers, as far as vLLM's own questions go."""
    kept = parallel_state._TP, parallel_state._PP  # noqa: SLF001 - set by what starts workers
    parallel_state._TP = SimpleNamespace(rank_in_group=rank, world_size=ranks)  # noqa: SLF001 - likewise
    parallel_state._PP = SimpleNamespace(rank_in_group=0, world_size=1)  # noqa: SLF001 - likewise
    try:
        yield
    finally:
        parallel_state._TP, parallel_state._PP = kept  # noqa: SLF001 - likewise
