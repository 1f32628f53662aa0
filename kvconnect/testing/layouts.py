"""Paged memories to test with: layouts of the same shape and different strides, filled with noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvconnect.blocks import heap_memory
from kvconnect.paging import BlockIds, LayerLayout, PagedLayout, PagedMemory


def separate_layers(layers: int, blocks: int, heads: int, piece_bytes: int, groups: int = 1) -> PagedLayout:
    """Each layer in a region of its own, its blocks one after another: ``[block, head, piece]``."""
    block = heads * piece_bytes
    found = tuple(
        LayerLayout(f"layer.{i}", i % groups, i, 0, block, blocks, piece_bytes, ((heads, piece_bytes),))
        for i in range(layers)
    )
    return PagedLayout(found, (blocks * block,) * layers)


def shared_region(layers: int, blocks: int, heads: int, piece_bytes: int, groups: int = 1) -> PagedLayout:
    """All layers interleaved in one region, with gaps: ``[block, head, layer, piece]`` (every piece on its own)."""
    piece = piece_bytes + 8
    stride = heads * layers * piece
    found = tuple(
        LayerLayout(f"layer.{i}", i % groups, 0, i * piece, stride, blocks, piece_bytes, ((heads, layers * piece),))
        for i in range(layers)
    )
    return PagedLayout(found, (blocks * stride,))


def noisy_memory(layout: PagedLayout, seed: int) -> PagedMemory:
    """Return heap memory for ``layout`` whose every byte is random and not zero."""
    memory = heap_memory(layout)
    noise = np.random.default_rng(seed)
    for region in regions(memory):
        region.numpy()[:] = noise.integers(1, 256, region.nbytes, dtype=np.uint8)
    return memory


def regions(memory: PagedMemory) -> list[Tensor]:
    """Return the regions of a heap memory, uint8 ``[nbytes]`` each."""
    found = memory.owner
    if not isinstance(found, list):
        raise TypeError("not a heap memory")
    return found


def naive_stream(memory: PagedMemory, blocks: BlockIds) -> Tensor:
    """Return the canonical stream of ``blocks``, taken byte range by byte range with plain loops."""
    found = [regions(memory)[r][a:b] for r, a, b in _spans(memory.layout, blocks)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8)


def naive_copy(dst: PagedMemory, dst_blocks: BlockIds, src: PagedMemory, src_blocks: BlockIds) -> None:
    """Copy blocks with plain loops."""
    spans = zip(_spans(dst.layout, dst_blocks), _spans(src.layout, src_blocks), strict=True)
    for (to, a, b), (of, c, d) in spans:
        regions(dst)[to][a:b] = regions(src)[of][c:d]


def clone(memory: PagedMemory) -> PagedMemory:
    """Return another heap memory with the same bytes."""
    copy = heap_memory(memory.layout)
    for to, of in zip(regions(copy), regions(memory), strict=True):
        to.copy_(of)
    return copy


def random_ids(seed: int, blocks: int, counts: Sequence[int]) -> list[list[int]]:
    """Return, per group, ``counts[group]`` different block ids below ``blocks``, in no order."""
    noise = np.random.default_rng(seed)
    return [noise.permutation(blocks)[:count].tolist() for count in counts]


def _spans(layout: PagedLayout, blocks: BlockIds) -> list[tuple[int, int, int]]:
    spans = []
    for group, ids in enumerate(blocks):
        for layer in layout.layers:
            if layer.group == group:
                spans += [span for block in ids for span in _block_spans(layer, block)]
    return spans


def _block_spans(layer: LayerLayout, block: int) -> list[tuple[int, int, int]]:
    starts = [layer.offset + block * layer.block_stride]
    for count, stride in layer.inner:
        starts = [start + i * stride for start in starts for i in range(count)]
    return [(layer.region, start, start + layer.piece_bytes) for start in starts]
