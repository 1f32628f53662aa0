"""Gather and scatter of paged blocks on the CPU."""

from __future__ import annotations

import pytest
import torch

from kvconnect.blocks import check_pair, gather, gather_stream, heap_memory, scatter, scatter_stream
from kvconnect.errors import HandshakeError, LoadError, TensorRejectedError
from kvconnect.paging import PagedMemory
from kvconnect.testing.layouts import naive_stream, noisy_memory, regions, separate_layers, shared_region

HERE = separate_layers(3, 8, 2, 24, groups=2)
THERE = shared_region(3, 8, 2, 24, groups=2)
BLOCKS = [[5, 0, 3], [1, 7]]


@pytest.mark.parametrize("layout", [HERE, THERE])
def test_gather_takes_the_canonical_stream(layout):
    memory = noisy_memory(layout, 1)
    assert gather_stream(memory, BLOCKS).equal(naive_stream(memory, BLOCKS))


def test_a_stream_moves_between_layouts_of_one_shape():
    source, target = noisy_memory(HERE, 1), heap_memory(THERE)
    scatter_stream(gather_stream(source, BLOCKS), target, BLOCKS)
    assert naive_stream(target, BLOCKS).equal(naive_stream(source, BLOCKS))
    untouched = [[1, 2, 4, 6, 7], [0, 2, 3, 4, 5, 6]]
    assert not naive_stream(target, untouched).any()


def test_only_the_bytes_of_the_tensor_count():
    target = heap_memory(HERE)
    floats = torch.arange(HERE.nbytes([[1]]) // 4, dtype=torch.float32).reshape(2, -1).t()
    scatter_stream(floats, target, [[1]])
    assert gather_stream(target, [[1]]).equal(floats.contiguous().reshape(-1).view(torch.uint8))


def test_a_stream_of_another_length_is_refused_before_a_byte_is_written():
    target = heap_memory(HERE)
    for nbytes in (0, HERE.nbytes(BLOCKS) - 1, HERE.nbytes(BLOCKS) + 1):
        with pytest.raises(LoadError):
            scatter_stream(torch.ones(nbytes, dtype=torch.uint8), target, BLOCKS)
    assert not any(region.any() for region in regions(target))


def test_no_blocks_are_no_bytes():
    memory = heap_memory(HERE)
    assert gather_stream(memory, []).shape == (0,)
    scatter_stream(torch.empty(0, dtype=torch.uint8), memory, [[], []])


def test_ids_out_of_range_are_refused():
    memory = heap_memory(HERE)
    with pytest.raises(HandshakeError):
        gather_stream(memory, [[8]])
    with pytest.raises(HandshakeError):
        scatter_stream(torch.empty(0, dtype=torch.uint8), memory, [[-1]])


def test_selections_must_pair_up():
    assert check_pair(HERE, [[1], []], THERE, [[2]]) == HERE.nbytes([[1]])
    with pytest.raises(HandshakeError, match="numbers of blocks"):
        check_pair(HERE, [[1, 2]], THERE, [[1]])
    with pytest.raises(HandshakeError):
        check_pair(HERE, [[1]], THERE, [[1], [1]])


def test_memory_on_another_device_is_refused_by_name():
    memory = PagedMemory(HERE, heap_memory(HERE).bases.tolist(), "cuda:0")
    iov = memory.iovec([[0]])
    with pytest.raises(TensorRejectedError, match="cuda:0"):
        gather(memory, iov, torch.empty(HERE.nbytes([[0]]), dtype=torch.uint8))
    with pytest.raises(TensorRejectedError, match="cuda:0"):
        scatter(torch.empty(HERE.nbytes([[0]]), dtype=torch.uint8), memory, iov)


def test_a_tensor_that_does_not_fit_the_pieces_is_refused():
    memory = heap_memory(HERE)
    with pytest.raises(TensorRejectedError):
        gather(memory, memory.iovec([[0]]), torch.empty(HERE.nbytes([[0]]), 2, dtype=torch.uint8)[:, 0])
