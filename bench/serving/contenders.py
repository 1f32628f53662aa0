"""Who is compared: how P and D are configured for each connector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvconnect.demo import engines
from kvconnect.demo.deployment import write_logging_config
from kvconnect.demo.engines import EngineOptions, Server

#: The shape of Llama-3.1-8B; weights are dummies, since nothing here depends on what is said.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
#: Bytes of KV a token: 32 layers, K and V, 8 heads of 128 bfloat16.
KV_BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2


@dataclass(frozen=True)
class Contender:
    """A connector on both engines; without ``hands_over`` only D runs, and is given nothing."""

    name: str
    connector: str
    hands_over: bool = True
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("DecodeBenchConnector", "DecodeBenchConnector", hands_over=False),
        Contender("cuda_ipc", "KvConnectCudaIpc"),
        Contender("nccl", "KvConnectNccl"),
        Contender("nixl", "KvConnectNixl"),
        Contender("shm", "KvConnectShm"),
        Contender("NixlConnector", "NixlConnector"),
        Contender("NixlConnector BLHNC", "NixlConnector", env={"VLLM_KV_CACHE_LAYOUT": "BLHNC"}),
        Contender("cuda_ipc BLHNC", "KvConnectCudaIpc", env={"VLLM_KV_CACHE_LAYOUT": "BLHNC"}),
    )
}


def write_model(folder: Path) -> str:
    """Write the configuration of `LLAMA_8B` and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    return str(folder)


def pair(contender: Contender, model: str, folder: Path, *, graphs: bool) -> list[Server]:
    """Describe the engines, P on device 0 and D on device 1; only D if nothing is handed over."""
    options = EngineOptions(
        model,
        max_model_len=16_640,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        gpu_memory_utilization=0.5,
        eager=not graphs,
        extra=("--load-format", "dummy", "--dtype", "bfloat16", "--block-size", "16", "--skip-tokenizer-init"),
    )
    servers = []
    for number, (name, role) in enumerate((("P", "kv_producer"), ("D", "kv_consumer"))):
        if name == "P" and not contender.hands_over:
            continue
        servers.append(_engine(contender, options, name, role, number, folder))
    return servers


def _engine(contender: Contender, options: EngineOptions, name: str, role: str, device: int, folder: Path) -> Server:
    own = contender.connector.startswith("KvConnect")
    extra = {"group": folder.name, "log_transfers": True} if own else {}
    transfer: dict[str, Any] = {
        "kv_connector": contender.connector,
        # Others know no roles: either engine may do both.
        "kv_role": role if own else "kv_both",
        "kv_connector_extra_config": extra | dict(contender.extra_config),
    }
    env = {"VLLM_LOGGING_CONFIG_PATH": str(write_logging_config(folder)), **contender.env}
    if contender.connector == "NixlConnector":
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(engines.free_port())
    return engines.engine(name, options, folder, kv_transfer=transfer, device=device, env=env)
