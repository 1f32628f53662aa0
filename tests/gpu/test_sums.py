"""Sums of blocks on a GPU: those of the same bytes in host memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvconnect import sums
from kvconnect.cuda import sums as on_device
from kvconnect.testing.layouts import noisy_memory, separate_layers, shared_region

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("groups", [0, 2], ids=["one layer a region", "one region"])
@pytest.mark.parametrize("piece", [16, 160, 65536])
def test_a_gpu_and_the_host_agree_on_the_sum_of_the_same_blocks(groups, piece):
    layout = shared_region(3, 16, 2, piece, groups, 16) if groups else separate_layers(3, 16, 2, piece)
    here, there = noisy_memory(layout, 1), noisy_memory(layout, 1, "cuda:0")
    for blocks in ([[]], [[5]], [[3, 1, 15, 2]], [list(range(16)), [7, 2]][: layout.num_groups]):
        assert on_device.of_blocks(there, blocks) == sums.of_blocks(here, blocks, sums.WORDS)
        assert sums.of_blocks(there, blocks, sums.WORDS) == sums.of_blocks(here, blocks, sums.WORDS)
    changed = noisy_memory(layout, 2, "cuda:0")
    assert sums.of_blocks(changed, [[5]], sums.WORDS) != sums.of_blocks(here, [[5]], sums.WORDS)


def test_threads_that_sum_at_the_same_time_get_each_its_own_sum():
    layout = separate_layers(3, 16, 2, 65536)
    here, there = noisy_memory(layout, 1), noisy_memory(layout, 1, "cuda:0")
    chosen = [[[number % 16, 15 - number % 7]] for number in range(100)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda blocks: on_device.of_blocks(there, blocks), chosen, timeout=60))
    assert found == [sums.of_blocks(here, blocks, sums.WORDS) for blocks in chosen]


def test_a_layout_of_odd_sizes_is_summed_up_by_way_of_the_host():
    layout = separate_layers(2, 8, 2, 13)
    here, there = noisy_memory(layout, 1), noisy_memory(layout, 1, "cuda:0")
    assert on_device.of_blocks(there, [[3, 1]]) is None
    assert sums.of_blocks(there, [[3, 1]], sums.WORDS) == sums.of_blocks(here, [[3, 1]], sums.WORDS)
