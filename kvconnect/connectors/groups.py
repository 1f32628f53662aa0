"""vLLM's KV-cache groups as plain values, and the model kinds that cannot be handed over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvconnect.connectors import compat

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvconnect.connectors.plan import Blocks


@dataclass(frozen=True, slots=True)
class Group:
    """One KV-cache group that takes part in transfers.

    Args:
        index: its place in vLLM's block tables.
        block_size: tokens a block.
        window: sliding-window length in tokens, or ``None`` for full attention.
        layers: names of its layers.
        kind: vLLM's name for its kind of attention, as KV events have it.

    """

    index: int
    block_size: int
    window: int | None
    layers: tuple[str, ...]
    kind: str = ""

    def needed(self, tokens: int) -> range:
        """Positions in the block table that decoding after ``tokens`` tokens reads."""
        skipped = 0 if self.window is None else max(0, tokens - self.window + 1)
        return range(skipped // self.block_size, -(-tokens // self.block_size))


def groups_of(config: KVCacheConfig) -> tuple[Group, ...]:
    """Return the groups that take part in transfers."""
    found = []
    for index in compat.transfer_groups(config):
        group = config.kv_cache_groups[index]
        window = next((w for w in map(_window, _specs(group.kv_cache_spec)) if w is not None), None)
        spec = group.kv_cache_spec
        found.append(Group(index, spec.block_size, window, tuple(group.layer_names), compat.spec_kind(spec)))
    return tuple(found)


def refusal(config: KVCacheConfig) -> str | None:
    """Return why this model's KV cannot be handed over, or ``None`` if it can.

    Anything but attention whose cache is addressed by block and position (full, MLA,
    sliding window) is refused: recurrent state and encoder caches are not blocks of tokens.
    """
    if not compat.transfer_groups(config):
        return "the model has no KV cache that takes part in transfers"
    for index in compat.transfer_groups(config):
        for spec in _specs(config.kv_cache_groups[index].kv_cache_spec):
            if type(spec).__name__ not in _SUPPORTED:
                return f"KV-cache group {index} is of kind {type(spec).__name__}, which cannot be handed over"
    return None


def fatal_failure(config: KVCacheConfig) -> str | None:
    """Return why a consumer must not fetch this model's KV, or ``None``: some releases do not survive a failed load.

    They name failed blocks without their group, and stop where there are several groups.
    """
    several = len(config.kv_cache_groups)
    if several == 1 or compat.reports_failed_requests():
        return None
    return f"the model has {several} KV-cache groups, of which this vLLM cannot take back a load that failed; 0.30 can"


_SUPPORTED = frozenset(
    {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "SlidingWindowMLASpec", "SinkFullAttentionSpec"}
)


def block_shape(config: KVCacheConfig) -> str:
    """Describe what a block is, group by group: kind, tokens, bytes and layers."""
    parts = []
    for index in compat.transfer_groups(config):
        group = config.kv_cache_groups[index]
        kinds = "+".join(sorted({_describe(spec) for spec in _specs(group.kv_cache_spec)}))
        parts.append(f"{kinds} x{len(group.layer_names)}")
    return "; ".join(parts)


def _describe(spec: Any) -> str:
    window = _window(spec)
    tail = f" window {window}" if window is not None else ""
    return f"{type(spec).__name__}({spec.block_size} tokens, {spec.page_size_bytes} B, {spec.dtype}{tail})"


def _window(spec: Any) -> int | None:
    """Window only of groups whose tables vLLM thins out: a full-attention spec keeps all blocks."""
    return getattr(spec, "sliding_window", None) if type(spec).__name__.startswith("SlidingWindow") else None


def _specs(spec: Any) -> Iterable[Any]:
    """Return the layer specs inside a group's spec (one, or several of one page size)."""
    inner = getattr(spec, "kv_cache_specs", None)
    return [spec] if inner is None else inner.values()


def usable_tokens(groups: Sequence[Group], tokens: int) -> int:
    """Return how many of a prompt's tokens a consumer should take over.

    All of them; vLLM then goes back one and computes the last again, to sample from it.
    With a sliding window it would already have thinned out the block in which that
    token's window begins, so there the last token is left to be computed in the first place.
    """
    return tokens if all(group.window is None for group in groups) else tokens - 1


def select(groups: Sequence[Group], table: Sequence[Sequence[int]], tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the part of a block table that covers ``tokens``, for the given groups."""
    return tuple(tuple(table[g.index][: -(-tokens // g.block_size)]) for g in groups)


def segment_tokens(groups: Sequence[Group], wanted: int) -> int:
    """Return how many tokens a prompt is cut at, ``wanted`` or a little more; 0: it stays whole.

    A cut falls between blocks in every group. A prompt is not cut where a window slides: what is left of
    its blocks at the end of the prompt does not serve another that only begins like it.
    """
    if not wanted or any(group.window is not None for group in groups):
        return 0
    step = math.lcm(*(group.block_size for group in groups))
    return -(-wanted // step) * step


def cut(groups: Sequence[Group], blocks: Sequence[Sequence[int]], lengths: Iterable[int]) -> list[Blocks]:
    """Cut the `select`-ed blocks of a prompt at ``lengths``, the last of which is the prompt's."""
    parts, done = [], [0] * len(groups)
    for length in lengths:
        ends = [-(-length // group.block_size) for group in groups]
        parts.append(tuple(tuple(ids[a:b]) for ids, a, b in zip(blocks, done, ends, strict=True)))
        done = ends
    return parts
