"""A small model made on this machine, so that nothing is downloaded.

The weights are random but fixed by a seed, and scaled so that greedy decoding
depends on the whole prompt: attention is neither flat nor one-hot. A KV block
that was lost or zeroed in transit therefore changes the output. The tokenizer
is a byte-level BPE trained on the documentation that ships with Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pydoc_data.topics
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Variant = Literal["llama", "mla", "sliding"]
VARIANTS: tuple[Variant, ...] = ("llama", "mla", "sliding")

#: Raise it when this module makes a different model from the same `Shape`.
RECIPE = 1
VOCABULARY = 4096
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """What the model looks like; part of its cache key.

    ``initializer_range`` is the standard deviation of all weights except those of
    the attention's queries and keys, which get ``attention_range``: it sets how
    sharply attention looks at single tokens.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    max_positions: int = 8192
    sliding_window: int = 128
    initializer_range: float = 0.2
    attention_range: float = 0.1
    seed: int = 20


def cache_root() -> Path:
    """Return the folder that models are kept in (``$XDG_CACHE_HOME/kvconnect/models``)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvconnect" / "models"


def ensure(variant: Variant = "llama", root: Path | None = None, shape: Shape | None = None) -> Path:
    """Return the folder of a ready model, making it first if it is not there.

    The folder's name carries a digest of everything that decides the model's
    content, so another version of this module never meets an old model. It
    appears whole or not at all, also when two processes make it at once.

    Raises:
        OSError: the folder cannot be written.

    """
    shape = shape or Shape()
    root = root or cache_root()
    target = root / f"{variant}-{_digest(variant, shape)}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _scratch(root) as scratch:
        _write_tokenizer(scratch, shape.max_positions)
        _write_weights(scratch, variant, shape)
        try:
            scratch.rename(target)
        except OSError:
            # A folder with files is never replaced: another process was faster, with the same content.
            if not target.is_dir():
                raise
    return target


def training_text() -> list[str]:
    """Return English text that every Python installation has: its language reference."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def _digest(variant: str, shape: Shape) -> str:
    text = "".join(training_text())
    what = json.dumps([RECIPE, variant, asdict(shape), VOCABULARY, CHAT_TEMPLATE, text], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_tokenizer(folder: Path, max_positions: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    begin, end = SPECIAL[:2]
    fast = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end, model_max_length=max_positions
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _write_weights(folder: Path, variant: Variant, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    model = _RECIPES[variant](shape)
    generator = torch.Generator().manual_seed(shape.seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim < 2:  # norms keep their ones (or zeros, as the architecture has it)
                continue
            sharp = any(part in name for part in ("q_proj", "k_proj", "q_a_proj", "q_b_proj"))
            std = shape.attention_range if sharp else shape.initializer_range
            weight.normal_(0.0, std, generator=generator)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # Not `model.save_pretrained`: it prints a progress bar. No generation_config.json
    # either, since it could bring sampling defaults along.
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


def _transformers() -> Any:
    """Import the library without its types, which are partial."""
    return importlib.import_module("transformers")


def _common(shape: Shape) -> dict[str, Any]:
    import torch

    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "initializer_range": shape.initializer_range,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "dtype": torch.float32,
    }


def _llama(shape: Shape) -> Any:
    hf = _transformers()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_common(shape)))


def _mla(shape: Shape) -> Any:
    """Multi-head latent attention, as in DeepSeek-V2: one compressed vector a token instead of K and V."""
    hf = _transformers()
    common = _common(shape)
    common["num_key_value_heads"] = shape.heads
    # vLLM's CPU kernel is compiled for the latent size of the released models only.
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
    dense = {"first_k_dense_replace": shape.layers, "n_routed_experts": 2, "num_experts_per_tok": 1}
    common.update(latent, q_lora_rank=None, head_dim=64, moe_intermediate_size=64, n_shared_experts=1, **dense)
    return hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**common))


def _sliding(shape: Shape) -> Any:
    """Layers in turn with a sliding window and with full attention: two KV-cache groups."""
    hf = _transformers()
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(shape.layers)]
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_common(shape),
            sliding_window=shape.sliding_window,
            layer_types=kinds,
            query_pre_attn_scalar=shape.head_dim,
        )
    )


_RECIPES: dict[Variant, Callable[[Shape], Any]] = {"llama": _llama, "mla": _mla, "sliding": _sliding}
