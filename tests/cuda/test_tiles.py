"""The tables that copy kernels read, executed here byte by byte on the CPU."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.cuda.tiles import COLUMNS, FROM, NBYTES, TO, Packed, Paged, is_aligned, listed, table
from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory
from kvconnect.testing.layouts import naive_stream, noisy_memory, separate_layers, shared_region

LAYERS, BLOCKS, HEADS = 3, 7, 2


def layouts(piece: int, groups: int = 1) -> list[PagedLayout]:
    """Layouts of one shape: in pieces, whole, interleaved, and cut where none of the others is."""
    block = HEADS * piece
    whole = tuple(
        LayerLayout(f"layer.{i}", i % groups, 0, i * block, LAYERS * block, BLOCKS, block) for i in range(LAYERS)
    )
    halves = tuple(
        LayerLayout(f"layer.{i}", i % groups, i, 5, 4 * block, BLOCKS, block // 4, ((4, block // 4 + 3),))
        for i in range(LAYERS)
    )
    return [
        separate_layers(LAYERS, BLOCKS, HEADS, piece, groups),
        shared_region(LAYERS, BLOCKS, HEADS, piece, groups),
        PagedLayout(whole, (LAYERS * BLOCKS * block,)),
        PagedLayout(halves, (4 * block * BLOCKS + 100,) * LAYERS),
    ]


def execute(tiles: np.ndarray, pairs: list[tuple[int, int]], from_shift: int = 0, to_shift: int = 0) -> None:
    """Do what the kernel does."""
    for source, target in pairs:
        for row in tiles.astype(np.int64):
            start = row[FROM] + source * row[FROM + 1] + len(pairs) * row[FROM + 2] + from_shift
            end = row[TO] + target * row[TO + 1] + len(pairs) * row[TO + 2] + to_shift
            ctypes.memmove(int(end), int(start), int(row[NBYTES]))


@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from([16, 48, 256]), st.sampled_from([16, 32, 4096]), st.data())
def test_a_table_copies_between_any_two_layouts_of_one_shape(
    a: int, b: int, piece: int, tile: int, data: st.DataObject
) -> None:
    ids = st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1, max_size=4)
    from_ids = data.draw(ids)
    to_ids = data.draw(st.permutations(range(BLOCKS)))[: len(from_ids)]
    source, target = noisy_memory(layouts(piece)[a], 1), noisy_memory(layouts(piece)[b], 2)
    others = [[i for i in range(BLOCKS) if i not in to_ids]]
    untouched = naive_stream(target, others)
    tiles = table(Paged.of(source), Paged.of(target), 0, tile)
    assert tiles[:, NBYTES].max() <= tile
    execute(tiles, list(zip(from_ids, to_ids, strict=True)))
    assert torch.equal(naive_stream(target, [to_ids]), naive_stream(source, [from_ids]))
    assert torch.equal(naive_stream(target, others), untouched)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("groups", [1, 2])
def test_a_packed_side_is_the_canonical_stream_and_comes_back_whole(number: int, groups: int) -> None:
    memory = noisy_memory(layouts(48, groups)[number], 3)
    chosen = [[5, 0, 3], [1, 2]][:groups]
    stream = torch.empty(memory.layout.nbytes(chosen), dtype=torch.uint8)
    other = noisy_memory(layouts(48, groups)[number], 4)
    shift = stream.data_ptr()
    for group, ids in enumerate(chosen):
        pairs = list(enumerate(ids))
        back = [(b, a) for a, b in pairs]
        execute(table(Paged.of(memory), Packed(memory.layout), group, 32), back, to_shift=shift)
        execute(table(Packed(memory.layout), Paged.of(other), group, 32), pairs, from_shift=shift)
        shift += memory.layout.nbytes([[] for _ in range(group)] + [ids])
    assert torch.equal(stream, naive_stream(memory, chosen))
    assert torch.equal(naive_stream(other, chosen), stream)


@given(st.lists(st.integers(0, 70), max_size=9), st.integers(1, 60), st.data())
def test_listed_pieces_are_copied_whatever_they_are_cut_into(
    lengths: list[int], step: int, data: st.DataObject
) -> None:
    nbytes = sum(lengths)
    source = torch.arange(1, 700, dtype=torch.int16).to(torch.uint8)
    target = torch.zeros(700, dtype=torch.uint8)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    starts = [source.data_ptr() + end - length for end, length in zip(ends, lengths, strict=True)]
    pieces = data.draw(st.permutations([*zip(starts, lengths, strict=True)]))
    parts = [(target.data_ptr() + at + 7, min(step, nbytes - at)) for at in range(0, nbytes, step)]
    rows = [np.array(each, dtype=np.uint64).reshape(-1, 2) for each in (pieces, parts)]
    tiles = listed(*rows, 16)
    assert not len(tiles) or (tiles[:, NBYTES].max() <= 16 and tiles[:, NBYTES].min() > 0)
    execute(tiles, [(0, 0)])
    wanted = b"".join(ctypes.string_at(start, length) for start, length in pieces)
    assert target[7 : 7 + nbytes].numpy().tobytes() == wanted
    assert not target[:7].any()
    assert not target[7 + nbytes :].any()


def test_alignment_is_seen_in_addresses_strides_and_sizes() -> None:
    layout = separate_layers(LAYERS, BLOCKS, HEADS, 64)
    sides = [Paged(layout, [1 << 20] * LAYERS), Paged(layout, [(1 << 20) + 8] * LAYERS)]
    assert is_aligned(table(sides[0], sides[0], 0, 4096))
    assert not is_aligned(table(sides[0], sides[1], 0, 4096))
    odd = separate_layers(LAYERS, BLOCKS, HEADS, 40)
    assert not is_aligned(table(Paged(odd, [0] * LAYERS), Paged(odd, [0] * LAYERS), 0, 4096))


def test_blocks_of_different_sizes_are_refused() -> None:
    small, large = separate_layers(1, BLOCKS, 1, 64), separate_layers(1, BLOCKS, 1, 128)
    with pytest.raises(ValueError, match="64 bytes on one side and 128"):
        table(Paged(small, [0]), Paged(large, [0]), 0, 4096)


def test_a_group_without_layers_has_no_tiles() -> None:
    layout = PagedLayout((LayerLayout("layer.0", 1, 0, 0, 64, BLOCKS, 64),), (64 * BLOCKS,))
    memory = PagedMemory(layout, [0])
    assert table(Paged.of(memory), Paged.of(memory), 0, 4096).shape == (0, COLUMNS)
