"""The geometry of paged memory, against a model that looks at every byte."""

from __future__ import annotations

import ctypes
import timeit
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.errors import HandshakeError
from kvconnect.paging import IoVec, LayerLayout, PagedLayout, PagedMemory, Pieces, merge, place, spans


def expand(iov: IoVec) -> list[int]:
    """Every address of a stream, one by one."""
    return [int(start) + i for start, length in iov.tolist() for i in range(int(length))]


@st.composite
def streams(draw: st.DrawFn, *, empty: bool = False) -> IoVec:
    """Pieces of one run of memory, in order or in reverse; ``empty``: some may have no bytes."""
    lengths = draw(st.lists(st.integers(0 if empty else 1, 20), max_size=12))
    at, rows = 1000, []
    for length in lengths:
        at += draw(st.sampled_from([0, 0, 5]))
        rows.append((at, length))
        at += length
    if draw(st.booleans()):
        rows.reverse()
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


@given(streams(empty=True), st.data())
def test_a_cut_has_the_bytes_in_between_and_no_empty_piece(iov: IoVec, data: st.DataObject) -> None:
    addresses = expand(iov)
    kept = iov.copy()
    pieces = Pieces(iov)
    assert pieces.nbytes == len(addresses)
    for _ in range(3):  # in any order
        start = data.draw(st.integers(0, len(addresses)))
        stop = data.draw(st.integers(start, len(addresses)))
        part = pieces.cut(start, stop)
        assert expand(part) == addresses[start:stop]
        assert (part[:, 1] > 0).all()
        assert part.dtype == np.uint64
        assert part.flags.c_contiguous
        part[:] = 0  # the caller's own: neither the stream nor what it was made from changes
    assert (iov == kept).all()
    assert expand(pieces.cut(0, pieces.nbytes)) == addresses


@given(streams(empty=True), st.integers(-3, 300), st.integers(-3, 300))
def test_bytes_that_a_stream_does_not_have_are_refused(iov: IoVec, start: int, stop: int) -> None:
    pieces = Pieces(iov)
    if 0 <= start <= stop <= pieces.nbytes:
        assert len(expand(pieces.cut(start, stop))) == stop - start
    else:
        with pytest.raises(ValueError, match=f"bytes {start} to {stop} of a stream of {pieces.nbytes}"):
            pieces.cut(start, stop)


def test_a_cut_takes_no_longer_in_a_long_stream() -> None:
    def seconds(length: int) -> float:
        pieces = Pieces(np.array([[1 << 40, 64]], dtype=np.uint64).repeat(length, axis=0))
        half = pieces.nbytes // 2
        return min(timeit.repeat(lambda: pieces.cut(half, half + 640), number=3, repeat=30))

    assert seconds(1_000_000) < 20 * seconds(1000)


@given(st.integers(0, 500), st.integers(1, 100), st.none() | st.integers(1, 100))
def test_spans_follow_each_other_and_all_but_the_first_and_the_last_have_one_length(
    nbytes: int, step: int, first: int | None
) -> None:
    found = spans(nbytes, step, first)
    assert [byte for start, stop in found for byte in range(start, stop)] == list(range(nbytes))
    lengths = [stop - start for start, stop in found]
    assert all(lengths)
    assert lengths[:1] == ([min(first or step, nbytes)] if nbytes else [])
    assert all(length == step for length in lengths[1:-1])
    assert all(length <= step for length in lengths[1:])


@given(streams())
def test_merge_keeps_every_byte_and_leaves_no_neighbours(iov: IoVec) -> None:
    merged = merge(iov)
    assert expand(merged) == expand(iov)
    ends = merged[:, 0] + merged[:, 1]
    assert not (merged[1:, 0] == ends[:-1]).any()


@given(streams(), st.integers(1, 30))
def test_chunks_of_a_stream_make_up_the_stream(iov: IoVec, size: int) -> None:
    addresses = expand(iov)
    pieces = Pieces(iov)
    chunks = [expand(pieces.cut(start, stop)) for start, stop in spans(len(addresses), size)]
    assert [address for chunk in chunks for address in chunk] == addresses


@dataclass(frozen=True)
class Cache:
    """The KV cache of some layers as one array of byte cells, as an engine would register it."""

    layout: PagedLayout
    #: For each layer, the cells of one block in canonical order: ``cells[layer][block]``.
    cells: list[list[list[int]]]


def kv_first(layers: int, blocks: int, tokens: int, row: int) -> Cache:
    """Five dimensions, a region a layer: ``[K or V, block, token, head × size]``; two pieces a block."""
    piece = tokens * row
    shape = (2, blocks, piece)
    grid = np.arange(int(np.prod(shape))).reshape(shape)
    found = tuple(LayerLayout(f"l{i}", 0, i, 0, piece, blocks, piece, ((2, blocks * piece),)) for i in range(layers))
    cells = [[grid[:, b].reshape(-1).tolist() for b in range(blocks)] for _ in range(layers)]
    return Cache(PagedLayout(found, (2 * blocks * piece,) * layers), cells)


def shared_storage(order: str, layers: int, blocks: int, tokens: int, heads: int, size: int) -> Cache:
    """Four dimensions in one storage for all layers; ``order`` names them, outermost first (C is the content)."""
    extent = {"L": layers, "B": blocks, "N": tokens, "H": heads, "C": size}
    stride, step = {}, 1
    for axis in reversed(order):
        stride[axis] = step
        step *= extent[axis]
    grid = np.arange(step).reshape([extent[axis] for axis in order])
    canonical = grid.transpose([order.index(axis) for axis in "LBHNC"])
    inner = ((heads, stride["H"]), (tokens, stride["N"]))
    found = tuple(LayerLayout(f"l{i}", 0, 0, i * stride["L"], stride["B"], blocks, size, inner) for i in range(layers))
    cells = [[canonical[i, b].reshape(-1).tolist() for b in range(blocks)] for i in range(layers)]
    return Cache(PagedLayout(found, (step,)), cells)


def mla(layers: int, blocks: int, tokens: int, latent: int) -> Cache:
    """Three dimensions: ``[block, token, latent]``, one piece a block."""
    piece = tokens * latent
    found = tuple(LayerLayout(f"l{i}", 0, i, 0, piece, blocks, piece) for i in range(layers))
    cells = [[list(range(b * piece, (b + 1) * piece)) for b in range(blocks)] for _ in range(layers)]
    return Cache(PagedLayout(found, (blocks * piece,) * layers), cells)


small = st.integers(1, 4)
caches = st.one_of(
    st.builds(kv_first, small, small, small, small),
    st.builds(shared_storage, st.sampled_from(["LBNHC", "LBHNC", "BLHNC"]), small, small, small, small, small),
    st.builds(mla, small, small, small, small),
)


@settings(max_examples=200)
@given(caches, st.data())
def test_the_canonical_stream_is_layer_by_layer_block_by_block(cache: Cache, data: st.DataObject) -> None:
    layout = cache.layout
    ids = data.draw(st.lists(st.integers(0, layout.layers[0].num_blocks - 1), max_size=6))
    wanted = [(layer.region, cell) for i, layer in enumerate(layout.layers) for b in ids for cell in cache.cells[i][b]]
    region, offset, nbytes = layout.pieces([ids])
    got = [(int(r), int(o) + i) for r, o, n in zip(region, offset, nbytes, strict=True) for i in range(int(n))]
    assert got == wanted
    assert layout.nbytes([ids]) == len(wanted)
    bases = np.array([10_000 * (1 + r) for r in range(len(layout.region_bytes))], dtype=np.uint64)
    assert expand(place(layout, bases, [ids])) == [10_000 * (1 + r) + cell for r, cell in wanted]


@given(small, small, small, small, small, st.data())
def test_orders_of_one_shape_carry_the_same_stream(
    layers: int, blocks: int, tokens: int, heads: int, size: int, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, blocks - 1), max_size=4))
    streams, shapes = [], []
    for order in ("LBNHC", "LBHNC", "BLHNC"):
        cache = shared_storage(order, layers, blocks, tokens, heads, size)
        axes = ["LBHNC".index(axis) for axis in order]
        content = np.arange(layers * blocks * tokens * heads * size).astype(np.uint8)
        storage = np.ascontiguousarray(content.reshape(layers, blocks, heads, tokens, size).transpose(axes))
        memory = PagedMemory(cache.layout, [storage.ctypes.data], owner=storage)
        streams.append(b"".join(ctypes.string_at(int(a), int(n)) for a, n in memory.iovec([ids]).tolist()))
        shapes.append(cache.layout.shape())
    assert streams[0] == streams[1] == streams[2]
    assert shapes[0] == shapes[1] == shapes[2]


def test_groups_follow_each_other_and_trailing_ones_may_be_left_out() -> None:
    layers = tuple(LayerLayout(f"l{i}", i % 2, i, 0, 8, 4, 8) for i in range(4))
    layout = PagedLayout(layers, (32,) * 4)
    region, offset, _ = layout.pieces([[3], [1, 0]])
    assert region.tolist() == [0, 2, 1, 1, 3, 3]
    assert offset.tolist() == [24, 24, 8, 0, 8, 0]
    assert layout.nbytes([[3]]) == 16
    assert layout.nbytes([]) == 0
    assert layout.pieces([])[0].size == 0


def test_whole_neighbouring_blocks_become_one_piece() -> None:
    layout = mla(1, 8, 4, 4).layout
    assert len(PagedMemory(layout, [4096]).iovec([[2, 3, 4]])) == 1
    assert len(PagedMemory(layout, [4096]).iovec([[2, 4, 3]])) == 3


@given(caches)
def test_a_layout_crosses_the_wire_unchanged(cache: Cache) -> None:
    assert PagedLayout.from_wire(cache.layout.to_wire()) == cache.layout


@pytest.mark.parametrize("ids", [[[-1]], [[4]], [[0], [-1]], [[0], [1 << 64]], [[1 << 40]]])
def test_block_ids_that_are_not_there_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(HandshakeError):
        mla(2, 4, 2, 2).layout.check(ids)


def test_a_group_that_has_no_layer_here_moves_nothing() -> None:
    one = mla(2, 4, 2, 2).layout
    layout = PagedLayout((*one.layers, replace(one.layers[0], name="last", group=2)), one.region_bytes)
    for ids in ([[1], [7]], [[1], []], [[1], [9]]):
        layout.check(ids)
        assert layout.nbytes(ids) == layout.nbytes([[1]])
        assert layout.pieces(ids)[0].size == 2


def test_more_groups_than_there_are_are_refused() -> None:
    with pytest.raises(HandshakeError, match="2 block groups asked for, this memory has 1"):
        mla(2, 4, 2, 2).layout.check([[1], [1]])


@pytest.mark.parametrize(
    "layer",
    [
        LayerLayout("l", 0, 0, 0, 8, 5, 8),
        LayerLayout("l", 0, 0, 1, 8, 4, 8),
        LayerLayout("l", 0, 1, 0, 8, 4, 8),
        LayerLayout("l", 0, 0, 0, -8, 4, 8),
        LayerLayout("l", 0, 0, 0, 8, 4, 0),
        LayerLayout("l", 0, 0, 0, 8, 4, 4, ((2, 8),)),
        LayerLayout("l", 0, -1, 0, 8, 4, 8),
    ],
)
def test_a_layout_that_leaves_its_region_is_refused(layer: LayerLayout) -> None:
    with pytest.raises(HandshakeError):
        PagedLayout((layer,), (32,))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"layers": 3, "regions": []},
        {"layers": [["l"]], "regions": [1]},
        {"layers": [], "regions": ["x"]},
        {"layers": [], "regions": [float("inf")]},
        {"layers": [["l", 0, 0, 0, 8, 1 << 60, 8, [], ""]], "regions": [1 << 63]},
        {"layers": [["l", 1 << 40, 0, 0, 8, 1, 8, [], ""]], "regions": [8]},
        {"layers": [["l", 0, 0, 0, 1 << 63, 1, 8, [], ""]], "regions": [8]},
    ],
)
def test_a_malformed_layout_from_a_peer_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(HandshakeError):
        PagedLayout.from_wire(data)
