"""One engine that serves a batch of ordinary prompts whenever it is told to; see `test_ordinary_traffic`.

``python -m tests.vllm.traffic <model> <kv_transfer_config as JSON, or {}>``. Each line on
standard input is answered by a line with the seconds that the batch took.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

REQUESTS, TOKENS = 48, 12


class NoConnector(KVConnectorBase_V1, SupportsHMA):
    """A connector that does nothing: what vLLM's own calls to any connector cost."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None


def main() -> None:
    """Serve until standard input ends."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = json.loads(sys.argv[2])
    llm = LLM(
        model=sys.argv[1], enforce_eager=True, dtype="float32", block_size=32, max_model_len=2048,
        max_num_batched_tokens=512, max_num_seqs=64, kv_cache_memory_bytes=256 << 20,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    say("ready")
    for _ in sys.stdin:
        prompts = [f"{uuid.uuid4().hex} {'word ' * (5 + i * 5 % 90)}" for i in range(REQUESTS)]
        began = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        say(f"{time.perf_counter() - began:.6f}")


def say(text: str) -> None:
    """Write one line to whoever started this program."""
    sys.stdout.write(f"traffic: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
