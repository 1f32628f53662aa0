"""The paged memory that both processes move blocks of, and how its bytes are checked."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory

LAYERS = 32
PIECE_BYTES = 32 * 1024
#: Bytes that one block id moves: one K/V-fused piece in every layer.
BLOCK_BYTES = LAYERS * PIECE_BYTES
#: Twice the largest selection, so that random ids leave gaps.
POOL_BLOCKS = 512
#: The largest tensor, and the largest selection of blocks.
LARGEST_BYTES = 256 * BLOCK_BYTES


@dataclass(frozen=True)
class Selection:
    """The blocks of one move: ``near[i]`` here corresponds to ``far[i]`` in the other process."""

    near: list[int]
    far: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes that move."""
        return len(self.near) * BLOCK_BYTES


def layout() -> PagedLayout:
    """Return the layout of the pool: 32 layers, each a region of its own."""
    layers = tuple(LayerLayout(f"layer.{i}", 0, i, 0, PIECE_BYTES, POOL_BLOCKS, PIECE_BYTES) for i in range(LAYERS))
    return PagedLayout(layers, (POOL_BLOCKS * PIECE_BYTES,) * LAYERS)


def draw(rng: np.random.Generator, blocks: int) -> Selection:
    """Draw ``blocks`` random ids for either side, without repetition."""
    return Selection(
        rng.choice(POOL_BLOCKS, blocks, replace=False).tolist(), rng.choice(POOL_BLOCKS, blocks, replace=False).tolist()
    )


class Pool:
    """Paged memory of 32 layers in this process."""

    def __init__(self) -> None:
        self.tensors = [torch.zeros(POOL_BLOCKS, PIECE_BYTES, dtype=torch.uint8) for _ in range(LAYERS)]
        self.memory = PagedMemory(layout(), [t.data_ptr() for t in self.tensors], "cpu", self.tensors)

    def fill(self, seed: int) -> None:
        """Write random bytes."""
        rng = np.random.default_rng(seed)
        for tensor in self.tensors:
            fill(tensor, rng)

    def flip(self, ids: list[int]) -> None:
        """Invert every bit of the blocks ``ids``: what was a copy is one no more."""
        for tensor in self.tensors:
            for i in ids:
                tensor[i].bitwise_not_()

    def digest(self, ids: list[int]) -> str:
        """Hash the blocks ``ids`` in canonical order."""
        state = hashlib.sha256()
        for address, nbytes in self.memory.iovec([ids]).tolist():
            state.update((ctypes.c_char * nbytes).from_address(address))
        return state.hexdigest()


def others(ids: list[int]) -> list[int]:
    """Return every block that is not in ``ids``."""
    return sorted(set(range(POOL_BLOCKS)) - set(ids))


def fill(tensor: torch.Tensor, rng: np.random.Generator) -> None:
    """Fill a contiguous uint8 tensor with random bytes."""
    words: npt.NDArray[np.uint8] = np.frombuffer(rng.bytes(tensor.numel()), dtype=np.uint8)
    tensor.view(-1).numpy()[:] = words


def digest(tensor: torch.Tensor) -> str:
    """Hash a contiguous tensor's bytes."""
    return hashlib.sha256(bytes_of(tensor.view(torch.uint8))).hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous uint8 tensor's memory."""
    return memoryview(tensor.view(-1).numpy())  # type: ignore[arg-type]  # numpy's stubs and Buffer
