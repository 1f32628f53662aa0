"""Registered tensors of every generation → paged memory."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

import torch

from kvconnect.connectors import geometry
from kvconnect.connectors.groups import Group
from kvconnect.errors import HandshakeError

B, H, N, C, L = 6, 2, 4, 8, 3
NAMES = tuple(f"layers.{i}" for i in range(L))
GROUPS = (Group(0, N, None, NAMES),)


def bytes_of_block(tensor: torch.Tensor, block: int, dim: int = 0) -> bytes:
    """A block's bytes in memory order."""
    view = tensor.select(dim, block)
    order = sorted(range(view.dim()), key=lambda d: -view.stride(d))
    return view.permute(order).contiguous().view(torch.uint8).numpy().tobytes()


def read(memory, blocks):
    import ctypes

    return b"".join(ctypes.string_at(int(a), int(n)) for a, n in memory.iovec(blocks))


def packed(order: str) -> dict[str, torch.Tensor]:
    """0.29+: all layers are strided views [B, H, N, C] of one allocation laid out in ``order``."""
    sizes = {"L": L, "B": B, "H": H, "N": N, "C": C}
    store = torch.randn([sizes[d] for d in order], dtype=torch.float32)
    logical = store.permute([order.index(d) for d in "LBHNC"])
    return {name: logical[i] for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC", "LHBNC", "BHLNC"])
def test_a_block_is_its_bytes_in_every_layout(order: str) -> None:
    caches = packed(order)
    memory = geometry.paged_memory(caches, GROUPS, B)
    assert read(memory, [[4, 1]]) == b"".join(bytes_of_block(caches[n], b) for n in NAMES for b in (4, 1))


def test_a_contiguous_page_is_one_piece() -> None:
    memory = geometry.paged_memory(packed("LBNHC"), GROUPS, B)
    assert [layer.inner for layer in memory.layout.layers] == [(), (), ()]
    assert memory.layout.layers[0].piece_bytes == H * N * C * 4


def test_layers_of_a_block_that_touch_become_one_run() -> None:
    memory = geometry.paged_memory(packed("BLHNC"), GROUPS, B)
    assert len(memory.iovec([[2]])) == 1


def test_heads_outside_blocks_stay_apart() -> None:
    memory = geometry.paged_memory(packed("LHBNC"), GROUPS, B)
    assert len(memory.iovec([[2]])) == L * H


def test_the_older_tensor_with_k_and_v_first() -> None:
    caches = {n: torch.randn(2, B, N, H, C) for n in NAMES}
    memory = geometry.paged_memory(caches, GROUPS, B)
    assert read(memory, [[3]]) == b"".join(bytes_of_block(caches[n], 3, dim=1) for n in NAMES)
    assert memory.layout.layers[0].inner == ((2, B * N * H * C * 4),)


def test_mla_with_one_latent_head() -> None:
    caches = {n: torch.randn(B, N, 24) for n in NAMES}
    assert geometry.paged_memory(caches, GROUPS, B).layout.layers[0].block_bytes == N * 24 * 4


def test_kernel_blocks_are_joined_to_the_engines_blocks() -> None:
    caches = {n: torch.randn(B * 2, H, N // 2, C) for n in NAMES}
    memory = geometry.paged_memory(caches, GROUPS, B)
    expected = b"".join(bytes_of_block(caches[n].unflatten(0, (B, 2)), 5) for n in NAMES)
    assert read(memory, [[5]]) == expected


def test_layers_that_share_their_cache_are_moved_once() -> None:
    caches = packed("LBHNC")
    caches[NAMES[2]] = caches[NAMES[0]]
    assert [layer.name for layer in geometry.paged_memory(caches, GROUPS, B).layout.layers] == list(NAMES[:2])


def test_groups_that_share_a_pool_keep_their_own_layers() -> None:
    store = torch.randn(B, H, N, C)
    groups = (Group(0, N, None, ("a",)), Group(1, N, 16, ("b",)))
    layout = geometry.paged_memory({"a": store, "b": store}, groups, B).layout
    assert [(x.name, x.group) for x in layout.layers] == [("a", 0), ("b", 1)]


def test_a_tensor_without_a_block_dimension_is_refused_by_name() -> None:
    with pytest.raises(HandshakeError, match=r"layers\.0"):
        geometry.paged_memory({n: torch.randn(5, 3) for n in NAMES}, GROUPS, B)
