"""A hand inside a running engine, for the negative control: it zeroes KV blocks.

vLLM adds this class to its workers (``--worker-extension-cls``) and lets a
development server call its methods (``VLLM_SERVER_DEV_MODE=1``,
``POST /collective_rpc``). So the connector under test needs no fault of its
own: the block is damaged in the prefilling engine's memory, after prefill and
before the decoding engine reads it.
"""

from __future__ import annotations

from typing import Any


class KVProbe:
    """Methods that a vLLM worker gains."""

    def zero_kv_block(self, block: str) -> dict[str, int]:
        """Zero one block of every layer; return the layers and bytes that were written.

        Args:
            block: the block's id in the engine's pool, as text, as the server passes it.

        """
        worker: Any = self
        number = int(block)
        blocks = int(worker.vllm_config.cache_config.num_gpu_blocks)
        if not 0 < number < blocks:
            raise ValueError(f"block {number} is not one of 1 to {blocks - 1}")
        written = 0
        tensors = worker.model_runner.kv_caches
        for tensor in tensors:
            # Releases before 0.26 put K and V first.
            part = tensor[number] if tensor.shape[0] == blocks else tensor[:, number]
            part.zero_()
            written += part.numel() * part.element_size()
        return {"layers": len(tensors), "bytes": written}
