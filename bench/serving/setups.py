"""What all contenders of one run have in common: the model, its engines' options, and where they stand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvconnect.demo import model as demo_model
from kvconnect.demo.engines import EngineOptions

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
#: CUDA graphs of whole decode steps, for the batches that occur here, and no compiler, which would take
#: longer than the measurement: a hand-over meets D in decode steps only.
_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 64]}


@dataclass(frozen=True)
class Setup:
    """Engines and their place.

    Args:
        options: what P and D are started with.
        mode: ``eager`` or ``CUDA graphs``, for the rows.
        place: ``two GPUs``, ``one GPU`` or ``CPU``, for the rows.
        devices: of P and D; ``None`` is the CPU.
        kv_cache_bytes: of P's and D's pools. P's holds every prompt of the load at once, and D's does not,
            so that P finds them in its prefix cache and D never does.
        kv_bytes_per_token: of all layers together.
        tokens: the token ids that prompts are drawn from, lowest and one past the highest.

    """

    options: EngineOptions
    mode: str
    place: str
    devices: tuple[int | None, int | None]
    kv_cache_bytes: tuple[int, int]
    kv_bytes_per_token: int
    tokens: tuple[int, int]


def llama_8b(folder: Path, *, graphs: bool, one_gpu: bool) -> Setup:
    """Return the setup that `h200x2-vllm.json` is measured with; the model's configuration goes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    options = EngineOptions(
        str(folder),
        max_model_len=16_640,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        # What is checked to be free at the start; both fit on one device. The pools have sizes of their own.
        gpu_memory_utilization=0.4,
        eager=not graphs,
        extra=(
            *("--load-format", "dummy", "--dtype", "bfloat16", "--block-size", "16", "--skip-tokenizer-init"),
            *(("--compilation-config", json.dumps(_GRAPHS)) if graphs else ()),
        ),
    )
    return Setup(
        options,
        mode="CUDA graphs" if graphs else "eager",
        place="one GPU" if one_gpu else "two GPUs",
        devices=(0, 0) if one_gpu else (0, 1),
        kv_cache_bytes=(44_000_000_000, 26_000_000_000),
        kv_bytes_per_token=32 * 2 * 8 * 128 * 2,  # layers, K and V, heads, dimensions, bytes of bfloat16
        tokens=(1_000, 100_000),
    )


def tiny() -> Setup:
    """Return a setup for CPUs, to try the benchmark itself: a model of four layers."""
    shape = demo_model.Shape()
    per_token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 4  # float32
    options = EngineOptions(
        str(demo_model.ensure()),
        max_num_seqs=16,
        extra=("--skip-tokenizer-init",),
    )
    return Setup(
        options,
        mode="eager",
        place="CPU",
        devices=(None, None),
        kv_cache_bytes=(12_000 * per_token, 5_000 * per_token),
        kv_bytes_per_token=per_token,
        tokens=(10, demo_model.VOCABULARY),
    )
