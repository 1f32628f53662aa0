"""What the kernel that sums blocks up is given: tiles that name each word's place in the canonical stream."""

import ctypes

import numpy as np
import pytest

from kvconnect import sums
from kvconnect.cuda.tiles import FROM, NBYTES, TO, Packed, Paged, is_aligned, table
from kvconnect.testing.layouts import noisy_memory, separate_layers, shared_region


def as_the_kernel_does(memory, blocks, tile_bytes=64):
    total = 0
    for group, ids in enumerate(blocks):
        start = memory.layout.nbytes(blocks[:group])
        tiles = table(Paged.of(memory), Packed(memory.layout), group, tile_bytes)
        assert is_aligned(tiles)
        for tile in tiles.tolist():
            for ordinal, number in enumerate(ids):
                data = ctypes.string_at(tile[FROM] + number * tile[FROM + 1], tile[NBYTES])
                place = start + tile[TO] + ordinal * tile[TO + 1] + len(ids) * tile[TO + 2]
                total += sums.mixed(np.frombuffer(data, dtype=np.uint64), place // 8)
    return total & ((1 << 64) - 1)


@pytest.mark.parametrize("layout", [separate_layers(3, 16, 2, 160), shared_region(3, 16, 2, 160, 2, 16)])
def test_tiles_in_any_order_have_the_sum_of_the_stream(layout):
    memory = noisy_memory(layout, 1)
    for blocks in ([[]], [[5]], [[3, 1, 15, 2]], [[1, 4], [3, 8]][: layout.num_groups]):
        assert as_the_kernel_does(memory, blocks) == sums.of_blocks(memory, blocks, sums.WORDS)
