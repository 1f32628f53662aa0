"""What must agree for two engines' blocks to be exchangeable, as named fields.

The fields are compared one by one in the hello, so that a refusal can say which
differs; their hash is the namespace of every key.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from kvconnect.connectors import compat, groups

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def fingerprint(config: VllmConfig, kv: KVCacheConfig) -> dict[str, str | int]:
    """Return the fields by name."""
    model, cache = config.model_config, config.cache_config
    return {
        "model": model.model,
        "revision": model.revision or "",
        "dtype": str(model.dtype),
        "quantization": str(model.quantization or ""),
        "kv_cache_dtype": str(cache.cache_dtype),
        # Before the blocks, whose shapes and layers follow from these: a refusal names the first that differs.
        **compat.parallel_fields(config.parallel_config),
        "draft_model": compat.draft_model(config.speculative_config),
        "blocks": groups.block_shape(kv),
        "block_layout": compat.inner_layout(kv),
        "platform": _platform(),
    }


def _platform() -> str:
    """Device kind; on CPUs with the instruction set and release, for K is packed for them."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return str(current_platform.device_type)
    import torch

    isa = torch.backends.cpu.get_cpu_capability()
    return f"cpu {platform.machine()} {isa} vllm {compat.vllm_release()}"
