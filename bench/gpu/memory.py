"""The paged KV of Llama-3.1-8B in two layouts, and how its bytes are filled and compared on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory

LAYERS = 32
#: 16 tokens × 8 heads × 128 × 2 bytes: K, or V, of one layer.
PIECE_BYTES = 32 << 10
PIECES = 2 * LAYERS
BLOCK_BYTES = PIECES * PIECE_BYTES
#: More than twice the largest selection, so that random ids leave gaps.
POOL_BLOCKS = 1200
_WORDS = PIECE_BYTES // 8
#: Each layer a region of its own, all K before all V: every piece is on its own.
LAYERWISE = "default"
#: vLLM's BLHNC: all layers of a block together, 2 MiB in one run.
BLOCKWISE = "BLHNC"

Int64Array = npt.NDArray[np.int64]


def layerwise(blocks: int) -> PagedLayout:
    """Return the default layout: 32 regions ``[2, block, piece]``."""
    plane = blocks * PIECE_BYTES
    layers = tuple(
        LayerLayout(f"layer.{i}", 0, i, 0, PIECE_BYTES, blocks, PIECE_BYTES, ((2, plane),)) for i in range(LAYERS)
    )
    return PagedLayout(layers, (2 * plane,) * LAYERS)


def blockwise(blocks: int) -> PagedLayout:
    """Return the block-outermost layout: one region ``[block, layer, 2, piece]``."""
    layers = tuple(
        LayerLayout(f"layer.{i}", 0, 0, i * 2 * PIECE_BYTES, BLOCK_BYTES, blocks, PIECE_BYTES, ((2, PIECE_BYTES),))
        for i in range(LAYERS)
    )
    return PagedLayout(layers, (blocks * BLOCK_BYTES,))


LAYOUTS: dict[str, Callable[[int], PagedLayout]] = {LAYERWISE: layerwise, BLOCKWISE: blockwise}


@dataclass(frozen=True)
class Selection:
    """The blocks of one move: ``far[i]`` of P is to be copied onto ``near[i]`` of D."""

    near: list[int]
    far: list[int]


def draw(rng: np.random.Generator, blocks: int, pool: int = POOL_BLOCKS) -> Selection:
    """Draw random ids for either side, without repetition."""
    return Selection(*(rng.choice(pool, blocks, replace=False).tolist() for _ in range(2)))


def leading(blocks: int) -> Selection:
    """Return the first blocks on both sides: what a contiguous copy moves in the block-outermost layout."""
    return Selection(list(range(blocks)), list(range(blocks)))


def piece_addresses(layout: PagedLayout, bases: list[int], blocks: int) -> Int64Array:
    """Return ``int64[PIECES, blocks]``: where each piece of each block lies."""
    found = []
    for layer in layout.layers:
        starts = bases[layer.region] + layer.offset + np.arange(blocks, dtype=np.int64) * layer.block_stride
        found += [starts + offset for offset in layer.piece_offsets()]
    return np.stack(found)


class Pool:
    """Paged memory on one device (``"cpu"`` too, for tests)."""

    def __init__(self, layout: str, device: str, blocks: int = POOL_BLOCKS) -> None:
        self.blocks = blocks
        self.layout = LAYOUTS[layout](blocks)
        self.regions = [torch.empty(n, dtype=torch.uint8, device=device) for n in self.layout.region_bytes]
        self.bases = [region.data_ptr() for region in self.regions]
        self.memory = PagedMemory(self.layout, self.bases, device, self.regions)
        self._views = self._pieces()
        # Any two of equal bytes have equal sums; any two that differ have, but for one in 2**64.
        generator = torch.Generator().manual_seed(20260)
        self._weights = _odd(_WORDS, generator).to(device)
        self._factors = _odd(PIECES, generator).tolist()

    def fill(self, seed: int) -> None:
        """Write random bytes."""
        for i, region in enumerate(self.regions):
            generator = torch.Generator(region.device).manual_seed(seed * 1000 + i)
            region.view(torch.int64).random_(generator=generator)

    def flip(self, ids: list[int]) -> None:
        """Invert every bit of the blocks ``ids``: what was a copy is one no more."""
        index = torch.tensor(ids, device=self.regions[0].device)
        for view in self._views:
            view[index] = ~view[index]

    def signatures(self) -> Int64Array:
        """Return ``int64[blocks]``, a weighted sum over each block's bytes in canonical order, modulo 2**64."""
        total = torch.zeros(self.blocks, dtype=torch.int64, device=self.regions[0].device)
        for view, factor in zip(self._views, self._factors, strict=True):
            total += (view * self._weights).sum(-1) * factor
        found: Int64Array = total.cpu().numpy()
        return found

    def stream(self, ids: Sequence[int]) -> npt.NDArray[np.uint64]:
        """Return the canonical stream of the blocks ``ids`` as words in host memory."""
        index = torch.tensor(ids, device=self.regions[0].device)
        held = torch.stack([view[index] for view in self._views]).view(LAYERS, -1, len(ids), _WORDS)
        found: npt.NDArray[np.int64] = held.transpose(1, 2).flatten().cpu().numpy()
        return found.view(np.uint64)

    def _pieces(self) -> list[Tensor]:
        """Return ``int64[blocks, words]`` views of each piece of all blocks, in canonical order."""
        found = []
        for layer in self.layout.layers:
            words = self.regions[layer.region].view(torch.int64)
            for offset in layer.piece_offsets().tolist():
                start = (layer.offset + offset) // 8
                found.append(torch.as_strided(words, (self.blocks, _WORDS), (layer.block_stride // 8, 1), start))
        return found


def mismatch(before: Int64Array, after: Int64Array, source: Int64Array, chosen: Selection) -> str | None:
    """Say what a move from ``source`` got wrong at the receiver, or ``None`` if nothing."""
    wrong = int((after[chosen.near] != source[chosen.far]).sum())
    rest = np.ones(len(before), dtype=bool)
    rest[chosen.near] = False
    touched = int((before[rest] != after[rest]).sum())
    if wrong or touched:
        return f"{wrong} of {len(chosen.near)} blocks have wrong bytes, {touched} that nobody chose changed"
    return None


def _odd(count: int, generator: torch.Generator) -> Tensor:
    return torch.empty(count, dtype=torch.int64).random_(generator=generator) | 1
