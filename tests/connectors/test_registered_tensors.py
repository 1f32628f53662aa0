"""What vLLM registers, in every generation and layout: a layout's pieces are the bytes that vLLM would write.

The tensors have the shapes and strides of CUDA's, on the CPU. Up to 0.28 each layer has a storage of
its own and the attention backend chooses dimensions (`get_kv_cache_shape`) and their order in memory
(`get_kv_cache_stride_order`); from 0.29 on one storage holds all layers, ``[B, H, N, C]`` each, in an
order that the layout's name tells. For the newer ones vLLM's own allocation makes the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

import torch
from torch import Tensor

from kvconnect.blocks import check_shapes, gather_stream, scatter_stream
from kvconnect.connectors import geometry
from kvconnect.connectors.groups import Group
from kvconnect.errors import HandshakeError
from kvconnect.paging import PagedMemory

#: Blocks, heads, tokens, size of a head: as many heads as tokens, so that sizes do not tell them apart.
B, H, N, D = 6, 4, 4, 8
LATENT = 24
LAYERS = ("model.layers.0.attn", "model.layers.1.attn", "model.layers.2.attn")
DTYPE = torch.bfloat16
FILL = 0x11


@dataclass(frozen=True)
class Pool:
    """An engine's registered caches.

    Args:
        caches: by layer, as ``register_kv_caches`` gets them.
        storages: all bytes behind them, uint8.
        block_dim: the dimension that counts blocks.
        split: kernel blocks of a block.

    """

    caches: Mapping[str, Tensor]
    storages: Sequence[Tensor]
    block_dim: int = 0
    split: int = 1

    def block(self, name: str, block: int) -> Tensor:
        """Return the elements of a block as vLLM's kernels address them."""
        rows = range(block * self.split, (block + 1) * self.split)
        return self.caches[name].narrow(self.block_dim, rows.start, self.split)

    def fill(self, seed: int) -> None:
        """Put noise into every byte, also between blocks."""
        noise = torch.Generator().manual_seed(seed)
        for storage in self.storages:
            storage.copy_(torch.randint(0, 256, storage.shape, generator=noise, dtype=torch.uint8))

    def bytes_of(self, name: str, block: int) -> Tensor:
        """Return a block's bytes in the order of the tensor's dimensions, those of one entry left out."""
        return self.block(name, block).contiguous().view(torch.uint8).squeeze()


def storages_of(caches: Mapping[str, Tensor]) -> list[Tensor]:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in caches.values()}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in found.values()]


# -- before 0.29: a storage a layer, dimensions and their order in memory by the backend -------------


def older(
    shape: tuple[int, ...], order: tuple[int, ...] | None = None, *, dim: int = 0, split: int = 1, page: int = 0
) -> Pool:
    """Make what `_reshape_kv_cache` makes of a backend's ``shape`` and stride ``order``.

    ``page`` is that of a padded page, in elements, where blocks come first.
    """
    order = order or tuple(range(len(shape)))
    physical = [shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(len(shape))]
    caches = {}
    for name in LAYERS:
        strides = list(torch.empty(physical).stride())
        if page:
            strides[back[0]] = page
        raw = torch.zeros(page * physical[0] if page else torch.Size(physical).numel(), dtype=DTYPE)
        caches[name] = raw.as_strided(physical, strides).permute(*back)
    return Pool(caches, storages_of(caches), dim, split)


def hybrid_with_mamba() -> Pool:
    """K and V first by shape, but restrided so that a block is one page (`_update_hybrid_attention_layout`)."""
    pool = older((2, B, N, H, D), dim=1)
    hidden = N * H * D
    for cache in pool.caches.values():
        cache.as_strided_(cache.shape, (hidden, 2 * hidden, *cache.stride()[2:]))
    return pool


# -- from 0.29: vLLM's own views of one storage ----------------------------------------------------


def shared_storage() -> tuple[Any, Any]:
    """Return vLLM's modules of cache specs and of their tensors."""
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    utils = pytest.importorskip("vllm.v1.worker.utils")
    if not hasattr(utils, "allocate_kv_cache"):
        pytest.skip("this vLLM is older than shared storage")
    return interface, utils


def newer(
    layout: str, *, mla: bool = False, kernel_block: int | None = None, padded: int | None = None, heads: int = H
) -> Pool:
    """Have vLLM allocate its caches in ``layout``."""
    interface, utils = shared_storage()
    if mla:
        spec = interface.MLAAttentionSpec(block_size=N, num_kv_heads=1, head_size=LATENT, dtype=DTYPE)
    else:
        spec = interface.FullAttentionSpec(
            block_size=N, num_kv_heads=heads, head_size=D, dtype=DTYPE, page_size_padded=padded
        )
    order = interface.KVCacheLayout[layout]
    strides = interface.compute_layout_strides(spec, B, len(LAYERS), order)
    size = B * len(LAYERS) * spec.page_size_bytes
    placed = interface.KVCacheTensor(size=size, layers=list(LAYERS), layer_stride=strides[0], block_stride=strides[1])
    config = interface.KVCacheConfig(B, [placed], [interface.KVCacheGroupSpec(list(LAYERS), spec)])
    caches = utils.allocate_kv_cache(config, torch.device("cpu"), order, [kernel_block or N])
    return Pool(caches, storages_of(caches), split=N // (kernel_block or N))


NHD, HND = (0, 1, 2, 3, 4), (0, 1, 3, 2, 4)

POOLS: dict[str, Callable[[], Pool]] = {
    "0.23 flash NHD": lambda: older((B, 2, N, H, D), NHD),
    "0.23 flash HND": lambda: older((B, 2, N, H, D), HND),
    "0.23 flex": lambda: older((B, 2, N, H, D), (0, 2, 1, 3, 4)),
    "0.23 kernel blocks NHD": lambda: older((B * 2, 2, N // 2, H, D), NHD, split=2),
    "0.22 flash K first": lambda: older((2, B, N, H, D), dim=1),
    "0.22 flash K first HND": lambda: older((2, B, N, H, D), HND, dim=1),
    "0.22 kernel blocks K first": lambda: older((2, B * 2, N // 2, H, D), dim=1, split=2),
    "0.23 hybrid": hybrid_with_mamba,
    "0.23 padded page": lambda: older((B, 2, N, H, D), NHD, page=2 * N * H * D + 40),
    "0.23 padded page HND": lambda: older((B, 2, N, H, D), HND, page=2 * N * H * D + 40),
    "0.23 MLA": lambda: older((B, N, LATENT)),
    "0.23 MLA padded": lambda: older((B, N, LATENT), page=N * LATENT + 8),
    "0.26 fused NHD": lambda: older((B, H, N, 2 * D), (0, 2, 1, 3)),
    "0.32 LBNHC": lambda: newer("LBNHC"),
    "0.32 LBHNC": lambda: newer("LBHNC"),
    "0.32 LHBNC": lambda: newer("LHBNC"),
    "0.32 BLHNC": lambda: newer("BLHNC"),
    "0.32 BLNHC": lambda: newer("BLNHC"),
    "0.32 BHLNC": lambda: newer("BHLNC"),
    "0.32 LBNHC kernel blocks": lambda: newer("LBNHC", kernel_block=N // 2),
    "0.32 LBHNC kernel blocks": lambda: newer("LBHNC", kernel_block=N // 2),
    "0.32 LBNHC padded": lambda: newer("LBNHC", padded=2 * N * H * D * 2 + 64),
    "0.32 BLHNC padded": lambda: newer("BLHNC", padded=2 * N * H * D * 2 + 64),
    "0.32 MLA": lambda: newer("LBNHC", mla=True),
    "0.32 MLA BLHNC": lambda: newer("BLHNC", mla=True),
}

#: Pools whose blocks mean the same, byte by byte: between any two of one row blocks are moved.
ALIKE = (
    {"0.23 flash NHD", "0.22 flash K first", "0.23 hybrid", "0.23 padded page"},
    {"0.23 flash HND", "0.22 flash K first HND", "0.23 padded page HND"},
    {"0.26 fused NHD", "0.32 LBNHC", "0.32 BLNHC", "0.32 LBNHC padded"},
    {"0.32 LBHNC", "0.32 LHBNC", "0.32 BLHNC", "0.32 BHLNC", "0.32 BLHNC padded"},
    {"0.23 MLA", "0.23 MLA padded", "0.32 MLA", "0.32 MLA BLHNC"},
)


def memory_of(pool: Pool) -> PagedMemory:
    return geometry.paged_memory(pool.caches, (Group(0, N, None, LAYERS),), B)


@pytest.mark.parametrize("name", POOLS)
def test_the_pieces_of_blocks_are_what_vllm_writes_of_them(name: str) -> None:
    pool, ids = POOLS[name](), [4, 1]
    memory = memory_of(pool)
    for block in ids:
        for layer in LAYERS:
            pool.block(layer, block).view(torch.uint8).fill_(FILL)
    written = int(sum((storage == FILL).sum() for storage in pool.storages))
    assert memory.layout.nbytes([ids]) == written
    stream = gather_stream(memory, [ids])
    assert (stream == FILL).all()
    scatter_stream(torch.zeros_like(stream), memory, [ids])
    assert not any(storage.any() for storage in pool.storages), "a byte of the blocks is in no piece"


@pytest.mark.parametrize("source", POOLS)
def test_blocks_are_moved_as_what_they_mean_or_refused(source: str) -> None:
    """Every generation and layout to every other one."""
    theirs = POOLS[source]()
    theirs.fill(2)
    other = memory_of(theirs)
    for target, make in POOLS.items():
        ours = make()
        ours.fill(1)
        mine = memory_of(ours)
        try:
            check_shapes(mine.layout, other.layout)
            accepted = True
        except HandshakeError:
            accepted = False
        alike = source == target or any({source, target} <= row for row in ALIKE)
        assert accepted == alike, f"to {target}: {'accepted' if accepted else 'refused'}"
        if accepted:
            move(theirs, other, ours, mine, make())


def move(theirs: Pool, other: PagedMemory, ours: Pool, mine: PagedMemory, marks: Pool) -> None:
    """Copy blocks, with ids in another order on each side, and look at every byte of the target."""
    pairs = {2: 5, 0: 1, 3: 3}
    before = [storage.clone() for storage in ours.storages]
    scatter_stream(gather_stream(other, [list(pairs)]), mine, [list(pairs.values())])
    for name in LAYERS:
        for there, here in pairs.items():
            assert ours.bytes_of(name, here).equal(theirs.bytes_of(name, there))
            marks.block(name, here).view(torch.uint8).fill_(FILL)
    for storage, old, mark in zip(ours.storages, before, marks.storages, strict=True):
        assert storage[mark == 0].equal(old[mark == 0]), "a byte beside the blocks has changed"


def test_one_head_means_the_same_in_every_order() -> None:
    """With a single head, "heads first" and "tokens first" are the same bytes."""
    first, second = newer("LBNHC", heads=1), newer("LBHNC", heads=1)
    check_shapes(memory_of(first).layout, memory_of(second).layout)


def test_groups_that_overlay_each_other_in_one_storage_keep_their_own_blocks() -> None:
    """Two groups of a hybrid model share bytes; a block id belongs to one of them at a time."""
    interface, utils = shared_storage()
    full = interface.FullAttentionSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=DTYPE)
    window = interface.SlidingWindowSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=DTYPE, sliding_window=8)
    order = interface.KVCacheLayout.LBNHC
    page, names = full.page_size_bytes, (("full.0", "full.1"), ("window.0", "window.1"))
    tensors = [interface.KVCacheTensor(2 * B * page, list(n), layer_stride=B * page, block_stride=page) for n in names]
    groups = [interface.KVCacheGroupSpec(list(n), s) for n, s in zip(names, (full, window), strict=True)]
    caches = utils.allocate_kv_cache(interface.KVCacheConfig(B, tensors, groups), torch.device("cpu"), order, [N, N])
    pool = Pool(caches, storages_of(caches))
    memory = geometry.paged_memory(caches, (Group(0, N, None, names[0]), Group(1, N, 8, names[1])), B)
    assert [(layer.name, layer.group) for layer in memory.layout.layers] == [
        ("full.0", 0), ("full.1", 0), ("window.0", 1), ("window.1", 1),
    ]  # fmt: skip
    pool.fill(3)
    # In this layout a block is one run of memory, tokens outermost.
    blocks = [pool.block(name, block) for group, block in zip(names, (2, 5), strict=True) for name in group]
    runs = [block.permute(0, 2, 1, 3).contiguous().view(torch.uint8).flatten() for block in blocks]
    assert gather_stream(memory, [[2], [5]]).equal(torch.cat(runs))


def test_layers_that_share_the_cache_of_another_are_moved_once() -> None:
    pool = newer("BLHNC")
    caches = {**pool.caches, "model.layers.3.attn": pool.caches[LAYERS[0]]}
    memory = geometry.paged_memory(caches, (Group(0, N, None, (*LAYERS, "model.layers.3.attn")),), B)
    assert [layer.name for layer in memory.layout.layers] == list(LAYERS)


def test_caches_of_other_groups_may_be_anything() -> None:
    """Up to 0.28 the state of a recurrent layer is a list of tensors; it takes no part in a transfer."""
    pool = older((B, 2, N, H, D))
    caches: dict[str, object] = {"mamba": [torch.zeros(1)], **pool.caches}
    assert memory_of(Pool(caches, [])).device == "cpu"  # type: ignore[arg-type]


def test_caches_on_several_devices_are_refused_by_name() -> None:
    pool = older((B, 2, N, H, D))
    caches = {**pool.caches, LAYERS[1]: torch.empty((B, 2, N, H, D), dtype=DTYPE, device="meta")}
    with pytest.raises(HandshakeError, match="several devices: cpu, meta"):
        memory_of(Pool(caches, []))
