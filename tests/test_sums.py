"""Sums of blocks: the same whatever the layout, and never the same for damaged bytes."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvconnect import sums
from kvconnect.blocks import scatter_stream
from kvconnect.errors import HandshakeError
from kvconnect.testing.layouts import blank_memory, naive_stream, noisy_memory, separate_layers, shared_region

KINDS = [sums.XXH3, sums.WORDS]
MASK = (1 << 64) - 1


def by_definition(data: bytes) -> int:
    """The sum of words, as the module's text defines it, one word at a time."""
    total = 0
    data += bytes(-len(data) % 8)
    for i in range(len(data) // 8):
        x = int.from_bytes(data[8 * i : 8 * i + 8], "little") ^ ((i + 1) * sums.GOLDEN & MASK)
        x = (x ^ x >> 33) * sums.FIRST & MASK
        x = (x ^ x >> 33) * sums.SECOND & MASK
        total += x ^ x >> 33
    return total & MASK


@given(blocks=st.lists(st.integers(0, 7), max_size=5), piece=st.sampled_from([1, 7, 8, 24, 100]))
def test_the_sum_of_words_is_that_of_its_definition(blocks, piece):
    memory = noisy_memory(separate_layers(2, 8, 2, piece), 1)
    assert sums.of_blocks(memory, [blocks], sums.WORDS) == by_definition(
        naive_stream(memory, [blocks]).numpy().tobytes()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_one_shape_have_one_sum(kind):
    one, other = separate_layers(3, 40, 2, 4096), shared_region(3, 40, 2, 4096)
    assert one.shape() == other.shape()
    first, second = noisy_memory(one, 1), blank_memory(other)
    scatter_stream(naive_stream(first, [[5, 3, 9, 30]]), second, [[1, 2, 39, 7]])
    assert sums.of_blocks(first, [[5, 3, 9, 30]], kind) == sums.of_blocks(second, [[1, 2, 39, 7]], kind)
    assert sums.of_blocks(first, [[5, 3, 9, 30]], kind) != sums.of_blocks(second, [[2, 1, 39, 7]], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_and_two_flipped_signs_change_the_sum(kind):
    memory = noisy_memory(separate_layers(1, 4, 1, 64), 1)
    whole = sums.of_blocks(memory, [[2, 0]], kind)
    (start, _), *_ = memory.iovec([[2]]).tolist()
    seen = {whole}
    for bit in range(64 * 8):
        byte = ctypes.c_ubyte.from_address(start + bit // 8)
        byte.value ^= 1 << bit % 8
        seen.add(sums.of_blocks(memory, [[2, 0]], kind))
        byte.value ^= 1 << bit % 8
    assert len(seen) == 1 + 64 * 8
    for offset in (7, 15):
        ctypes.c_ubyte.from_address(start + offset).value ^= 0x80
    assert sums.of_blocks(memory, [[2, 0]], kind) not in seen


def test_chunks_of_a_large_stream_add_up(monkeypatch):
    memory = noisy_memory(separate_layers(2, 8, 1, 1000), 1)
    whole = sums.of_blocks(memory, [[1, 2, 3]], sums.WORDS)
    monkeypatch.setattr(sums, "_CHUNK_BYTES", 64)
    assert sums.of_blocks(memory, [[1, 2, 3]], sums.WORDS) == whole
    words = np.frombuffer(naive_stream(memory, [[1, 2, 3]]).numpy().tobytes(), dtype=np.uint64)
    assert (sums.mixed(words[:100], 0) + sums.mixed(words[100:], 100)) & MASK == whole


def test_what_cannot_be_summed_up_is_refused_by_name():
    memory = noisy_memory(separate_layers(1, 4, 1, 64), 1)
    with pytest.raises(HandshakeError, match="md5"):
        sums.of_blocks(memory, [[1]], "md5")
    with pytest.raises(HandshakeError):
        sums.of_blocks(memory, [[4]], sums.XXH3)
    assert sums.kind_for("cpu", "cpu") == sums.XXH3
    assert sums.kind_for("cpu", "cuda:1") == sums.WORDS
    assert torch.is_tensor(naive_stream(memory, [[1]]))
