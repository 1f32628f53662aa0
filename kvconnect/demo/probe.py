"""A hand inside a running engine: it zeroes KV blocks for the negative control, and looks at them.

vLLM adds this class to its workers (``--worker-extension-cls``) and lets a
development server call its methods (``VLLM_SERVER_DEV_MODE=1``,
``POST /collective_rpc``). So the connector under test needs no fault of its
own: the block is damaged in the prefilling engine's memory, after prefill and
before the decoding engine reads it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch


class KVProbe:
    """Methods that a vLLM worker gains."""

    def zero_kv_block(self, block: str) -> dict[str, int]:
        """Zero one block of every layer; return the layers and bytes that were written.

        Args:
            block: the block's id in the engine's pool, as text, as the server passes it.

        """
        parts = self._parts(int(block))
        for part in parts:
            part.zero_()
        return {"layers": len(parts), "bytes": sum(part.numel() * part.element_size() for part in parts)}

    def digest_kv_blocks(self) -> dict[str, str]:
        """Return a digest of every block's bytes in all layers, by block id."""
        found = {}
        for block in range(1, self._num_blocks()):
            digest = hashlib.blake2b(digest_size=16)
            for part in self._parts(block):
                digest.update(part.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
            found[str(block)] = digest.hexdigest()
        return found

    def _num_blocks(self) -> int:
        worker: Any = self
        return int(worker.vllm_config.cache_config.num_gpu_blocks)

    def _parts(self, block: int) -> list[torch.Tensor]:
        """Return one block of every layer, as views."""
        worker: Any = self
        blocks = self._num_blocks()
        if not 0 < block < blocks:
            raise ValueError(f"block {block} is not one of 1 to {blocks - 1}")
        # Releases before 0.26 put K and V first.
        tensors = worker.model_runner.kv_caches
        return [tensor[block] if tensor.shape[0] == blocks else tensor[:, block] for tensor in tensors]
