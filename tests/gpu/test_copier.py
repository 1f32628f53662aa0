"""The copy kernels on a real GPU, against plain copies."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest
import torch

from kvconnect.cuda import driver
from kvconnect.cuda.copier import TILE_BYTES, Part, copier
from kvconnect.cuda.costs import measure
from kvconnect.cuda.lanes import Lanes
from kvconnect.cuda.stager import CudaStager
from kvconnect.cuda.tiles import Packed, Paged
from kvconnect.errors import BrokenError
from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCKS, LAYERS = 40, 5


def layout(piece: int, heads: int = 2, *, gap: int = 0) -> PagedLayout:
    block = heads * (piece + gap)
    layers = tuple(
        LayerLayout(f"layer.{i}", 0, i, 0, block, BLOCKS, piece, ((heads, piece + gap),)) for i in range(LAYERS)
    )
    return PagedLayout(layers, (block * BLOCKS,) * LAYERS)


def memory(which: PagedLayout, seed: int) -> PagedMemory:
    generator = torch.Generator("cuda").manual_seed(seed)
    regions = [
        torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda", generator=generator)
        for nbytes in which.region_bytes
    ]
    torch.cuda.synchronize()
    return PagedMemory(which, [region.data_ptr() for region in regions], "cuda:0", regions)


def block(which: PagedMemory, layer: int, number: int) -> torch.Tensor:
    described = which.layout.layers[layer]
    start = number * described.block_stride
    heads, stride = described.inner[0] if described.inner else (1, described.piece_bytes)
    parts = [which.owner[layer][start + h * stride :][: described.piece_bytes] for h in range(heads)]
    return torch.cat(parts)


@pytest.mark.parametrize("piece", [32 << 10, 80 << 10, 16, 48, 40, 7])
@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
def test_any_piece_size_is_copied_and_nothing_else_is_touched(piece: int, multiprocessors: int) -> None:
    source, target = memory(layout(piece), 1), memory(layout(piece, gap=8), 2)
    before = [region.clone() for region in target.owner]
    rng = np.random.default_rng(piece)
    from_ids, to_ids = (rng.permutation(BLOCKS)[:30].tolist() for _ in range(2))
    stream = driver.cupy().cuda.Stream(non_blocking=True)
    table = copier(0).table(Paged.of(source), Paged.of(target))
    kept = copier(0).launch(table, Part(0, from_ids, to_ids), stream, multiprocessors)
    stream.synchronize()
    del kept
    for layer in range(LAYERS):
        for a, b in zip(from_ids, to_ids, strict=True):
            assert torch.equal(block(source, layer, a), block(target, layer, b))
            start = b * target.layout.layers[layer].block_stride
            for head in range(2):
                at = start + head * (piece + 8)
                before[layer][at : at + piece] = target.owner[layer][at : at + piece]
        assert torch.equal(before[layer], target.owner[layer]), "bytes that nobody chose changed"


def test_blocks_are_packed_and_unpacked_at_any_shift() -> None:
    source, target = memory(layout(TILE_BYTES + 16), 1), memory(layout(TILE_BYTES + 16), 2)
    ids = [3, 0, 17, 39]
    buffer = torch.zeros(source.layout.nbytes([ids]) + 64, dtype=torch.uint8, device="cuda")
    stream = driver.cupy().cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    for shift in (0, 16, 3):
        at = buffer.data_ptr() + shift
        out = copier(0).table(Paged.of(source), Packed(source.layout))
        back = copier(0).table(Packed(source.layout), Paged.of(target))
        kept = [copier(0).launch(out, Part(0, ids, range(4), to_shift=at), stream, 16)]
        kept.append(copier(0).launch(back, Part(0, range(4), ids, from_shift=at), stream, 16))
        stream.synchronize()
        for layer in range(LAYERS):
            for number in ids:
                assert torch.equal(block(source, layer, number), block(target, layer, number))
        for region in target.owner:
            region.zero_()
        torch.cuda.synchronize()


def test_the_multiprocessors_that_took_part_are_counted_and_bounded() -> None:
    source, target = memory(layout(TILE_BYTES), 1), memory(layout(TILE_BYTES), 2)
    module = driver.cupy()
    seen = module.zeros(8, dtype=module.uint32)
    stream = module.cuda.Stream(non_blocking=True)
    module.cuda.Device(0).synchronize()
    table = copier(0).table(Paged.of(source), Paged.of(target))
    kept = copier(0).launch(table, Part(0, range(30), range(30)), stream, 16, seen)
    stream.synchronize()
    del kept
    assert 1 <= sum(int(word).bit_count() for word in seen.get()) <= 16


def test_an_empty_part_launches_nothing() -> None:
    source = memory(layout(64), 1)
    table = copier(0).table(Paged.of(source), Paged.of(source))
    assert copier(0).launch(table, Part(0, [], []), driver.cupy().cuda.Stream(), 16) is None


def test_costs_are_measured_and_plausible() -> None:
    source = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    costs = measure(copier(0), source.data_ptr(), source.nbytes, driver.cupy().cuda.Stream(non_blocking=True), 132)
    assert 1e10 < costs.kernel_rate < 1e13
    assert 1e10 < costs.engine_rate < 1e13
    assert 1e-7 < costs.engine_call_s < 1e-3


def test_a_lane_tells_the_end_of_each_work_once_and_survives_errors() -> None:
    lanes, told = Lanes(0, count=1), queue.SimpleQueue[object]()
    big = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.zeros_like(big)
    torch.cuda.synchronize()
    runtime = driver.cupy().cuda.runtime

    def fail(_: object) -> object:
        raise ValueError("planted")

    def copy(stream: Any) -> object:
        runtime.memsetAsync(big.data_ptr(), 7, big.nbytes, stream.ptr)
        runtime.memcpyAsync(other.data_ptr(), big.data_ptr(), big.nbytes, 3, stream.ptr)
        return None

    def copied(error: object) -> None:
        told.put((error, bool((other == 7).all())))

    lanes.start(fail, told.put)
    lanes.start(copy, copied)
    lanes.chore(fail, told.put)
    answers = [told.get(timeout=20) for _ in range(3)]
    assert sum(isinstance(answer, BrokenError) for answer in answers) == 2
    assert (None, True) in answers, "over was told before the device was done"


def _finish(is_over) -> None:
    torch.cuda.synchronize(0)
    assert is_over(), "the device is done, and the copy is not over"


def test_a_stager_gathers_and_scatters_the_canonical_stream() -> None:
    source, target = memory(layout(TILE_BYTES), 1), memory(layout(TILE_BYTES), 2)
    stager = CudaStager("cuda:0")
    from_ids, to_ids = [5, 0, 39, 7], [1, 2, 3, 30]
    buffer = stager.allocate(source.layout.nbytes([from_ids]))
    _finish(stager.gather(source, [from_ids], buffer))
    first = block(source, 0, from_ids[0])
    assert torch.equal(buffer[: first.nbytes], first)
    _finish(stager.scatter(buffer, target, [to_ids]))
    for layer in range(LAYERS):
        for a, b in zip(from_ids, to_ids, strict=True):
            assert torch.equal(block(source, layer, a), block(target, layer, b))
