"""Paged memories to test with: layouts of the same shape and different strides, filled with noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvconnect.blocks import heap_memory
from kvconnect.paging import BlockIds, LayerLayout, PagedLayout, PagedMemory
from kvconnect.testing.devices import complete, is_cuda

#: Noise repeats after these many bytes: a prime, so that no two blocks of a memory are alike.
_NOISE_BYTES = 16_777_213
#: Memories are compared by parts of this size, which is what comparing takes on the device.
_PART_BYTES = 256 << 20


def separate_layers(layers: int, blocks: int, heads: int, piece_bytes: int, groups: int = 1) -> PagedLayout:
    """Each layer in a region of its own, its blocks one after another: ``[block, head, piece]``."""
    block = heads * piece_bytes
    found = tuple(
        LayerLayout(f"layer.{i}", i % groups, i, 0, block, blocks, piece_bytes, ((heads, piece_bytes),))
        for i in range(layers)
    )
    return PagedLayout(found, (blocks * block,) * layers)


def shared_region(
    layers: int, blocks: int, heads: int, piece_bytes: int, groups: int = 1, gap_bytes: int = 8
) -> PagedLayout:
    """All layers interleaved in one region, with gaps: ``[block, head, layer, piece]`` (every piece on its own)."""
    piece = piece_bytes + gap_bytes
    stride = heads * layers * piece
    found = tuple(
        LayerLayout(f"layer.{i}", i % groups, 0, i * piece, stride, blocks, piece_bytes, ((heads, layers * piece),))
        for i in range(layers)
    )
    return PagedLayout(found, (blocks * stride,))


def blank_memory(layout: PagedLayout, device: str = "cpu") -> PagedMemory:
    """Return zeroed memory for ``layout``; on CUDA each region is a tensor of torch's own allocator."""
    if not is_cuda(device):
        return heap_memory(layout)
    found = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for nbytes in layout.region_bytes]
    complete(device)
    return PagedMemory(layout, [region.data_ptr() for region in found], device, found)


def noisy_memory(layout: PagedLayout, seed: int, device: str = "cpu") -> PagedMemory:
    """Return memory for ``layout`` whose every byte is random and not zero, the same ones on every device."""
    memory = blank_memory(layout, device)
    noise = np.random.default_rng(seed)
    for region in regions(memory):
        drawn = noise.integers(1, 256, min(region.nbytes, _NOISE_BYTES), dtype=np.uint8)
        pattern = torch.from_numpy(drawn).to(device)
        for start in range(0, region.nbytes, _NOISE_BYTES):
            region[start : start + _NOISE_BYTES] = pattern[: region.nbytes - start]
    complete(device)
    return memory


def regions(memory: PagedMemory) -> list[Tensor]:
    """Return the regions of a memory made here, uint8 ``[nbytes]`` each, on its device."""
    found = memory.owner
    if not isinstance(found, list):
        raise TypeError("not a memory made for tests")
    return found


def naive_stream(memory: PagedMemory, blocks: BlockIds) -> Tensor:
    """Return the canonical stream of ``blocks`` on the CPU, taken byte range by byte range with plain loops."""
    found = [regions(memory)[r][a:b].cpu() for r, a, b in spans(memory.layout, blocks)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8)


def naive_copy(dst: PagedMemory, dst_blocks: BlockIds, src: PagedMemory, src_blocks: BlockIds) -> None:
    """Copy blocks with plain loops."""
    pairs = zip(spans(dst.layout, dst_blocks), spans(src.layout, src_blocks), strict=True)
    for (to, a, b), (of, c, d) in pairs:
        regions(dst)[to][a:b] = regions(src)[of][c:d]


def clone(memory: PagedMemory, device: str = "cpu") -> PagedMemory:
    """Return another memory with the same bytes, on the CPU unless told otherwise."""
    found = [region.to(device, copy=True) for region in regions(memory)]
    return PagedMemory(memory.layout, [region.data_ptr() for region in found], device, found)


def differences(got: PagedMemory, wanted: PagedMemory) -> list[str]:
    """Say, one line for each region of ``got`` that is not as ``wanted``, how many bytes differ and where."""
    found = []
    for i, (ours, theirs) in enumerate(zip(regions(got), regions(wanted), strict=True)):
        wrong = [
            # On the device, part by part: some memories take long to bring to the CPU.
            start + _unequal(ours[start : start + _PART_BYTES], theirs[start : start + _PART_BYTES])
            for start in range(0, ours.nbytes, _PART_BYTES)
        ]
        if count := sum(len(each) for each in wrong):
            found.append(f"region {i}: {count} bytes differ, first at {int(torch.cat(wrong)[0])}")
    return found


def _unequal(one: Tensor, other: Tensor) -> Tensor:
    return torch.nonzero(one != other.to(one.device)).flatten().cpu()


def random_ids(seed: int, blocks: int, counts: Sequence[int]) -> list[list[int]]:
    """Return, per group, ``counts[group]`` different block ids below ``blocks``, in no order."""
    noise = np.random.default_rng(seed)
    return [noise.permutation(blocks)[:count].tolist() for count in counts]


def spans(layout: PagedLayout, blocks: BlockIds) -> list[tuple[int, int, int]]:
    """Return the canonical stream of ``blocks`` as ``(region, start, stop)``, piece by piece."""
    found = []
    for group, ids in enumerate(blocks):
        for layer in layout.layers:
            if layer.group == group:
                found += [span for block in ids for span in _block_spans(layer, block)]
    return found


def _block_spans(layer: LayerLayout, block: int) -> list[tuple[int, int, int]]:
    starts = [layer.offset + block * layer.block_stride]
    for count, stride in layer.inner:
        starts = [start + i * stride for start in starts for i in range(count)]
    return [(layer.region, start, start + layer.piece_bytes) for start in starts]
