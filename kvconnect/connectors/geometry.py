"""The tensors that vLLM registers → `PagedMemory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvconnect import paging
from kvconnect.connectors import compat
from kvconnect.errors import HandshakeError
from kvconnect.paging import PagedLayout, PagedMemory

if TYPE_CHECKING:
    import torch

    from kvconnect.connectors.groups import Group


def paged_memory(caches: Mapping[str, torch.Tensor], groups: Sequence[Group], num_blocks: int) -> PagedMemory:
    """Describe a worker's registered KV caches.

    Layers that share their KV with an earlier layer of their group are aliases and
    are moved once.

    Args:
        caches: layer name → tensor, as given to ``register_kv_caches``: any shape
            whose block dimension `compat.block_dim` knows, strided, storage possibly shared.
        groups: the groups that take part; their order is the order of the block tables.
        num_blocks: blocks of the engine's pool.

    Raises:
        HandshakeError: a tensor is of a shape that cannot be addressed by block, or they lie on several devices.

    """
    regions: dict[int, tuple[int, int]] = {}
    layers: list[paging.LayerLayout] = []
    owned: dict[str, torch.Tensor] = {}
    for number, group in enumerate(groups):
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for name in group.layers:
            tensor = caches.get(name)
            if tensor is None or (alias := (tensor.data_ptr(), tuple(tensor.stride()))) in seen:
                continue
            seen.add(alias)
            layers.append(_layer(name, number, tensor, regions, num_blocks))
            owned[name] = tensor
    if not layers:
        raise HandshakeError(f"none of the {len(caches)} registered KV caches belongs to a group that is handed over")
    layout = PagedLayout(tuple(layers), tuple(size for _, size in regions.values()))
    # Caches of other groups may be no tensors at all (recurrent state), or elsewhere.
    devices = sorted({str(tensor.device) for tensor in owned.values()})
    if len(devices) > 1:
        raise HandshakeError(f"the KV caches that are handed over lie on several devices: {', '.join(devices)}")
    return PagedMemory(layout, list(regions), devices[0], owner=owned)


def _layer(
    name: str, group: int, tensor: torch.Tensor, regions: dict[int, tuple[int, int]], num_blocks: int
) -> paging.LayerLayout:
    """Describe one layer, adding its storage to ``regions`` (base address → number, bytes) if it is new."""
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    region, _ = regions.setdefault(base, (len(regions), storage.nbytes()))
    try:
        dim = compat.block_dim(tuple(tensor.shape), num_blocks)
    except ValueError as error:
        raise HandshakeError(f"layer {name!r}: {error}") from error
    view = paging.Strided(tensor.data_ptr() - base, tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size())
    return paging.layer_from_strides(name, group, region, view, block_dim=dim, num_blocks=num_blocks)
