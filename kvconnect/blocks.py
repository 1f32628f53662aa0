"""Gather and scatter of paged blocks: between scattered pieces and one tensor of bytes.

On the CPU one pass of plain memory copies. Memory on other devices is refused
by name until kernels for it exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvconnect.errors import HandshakeError, LoadError, TensorRejectedError
from kvconnect.paging import BlockIds, IoVec, PagedLayout, PagedMemory
from kvconnect.pipes import vectored


def gather(memory: PagedMemory, iov: IoVec, out: Tensor) -> None:
    """Copy the pieces ``iov`` of ``memory``, one after another, into ``out``.

    Args:
        memory: where the pieces lie; must be on the CPU.
        iov: addresses and lengths, as from `PagedMemory.iovec` or `kvconnect.paging.Pieces.cut`.
        out: contiguous CPU tensor of exactly as many bytes.

    Raises:
        TensorRejectedError: ``memory`` or ``out`` is not on the CPU, or ``out`` is not
            contiguous or not of that size. Nothing was copied.

    """
    vectored.copy(_whole(out, memory, iov), iov)


def scatter(src: Tensor, memory: PagedMemory, iov: IoVec) -> None:
    """Copy the bytes of ``src`` into the pieces ``iov`` of ``memory``: the reverse of `gather`.

    Raises:
        TensorRejectedError: as for `gather`. Nothing was copied.

    """
    vectored.copy(iov, _whole(src, memory, iov))


def gather_stream(memory: PagedMemory, blocks: BlockIds) -> Tensor:
    """Return the canonical stream of ``blocks`` as a new uint8 tensor, shape ``[nbytes]``.

    Raises:
        HandshakeError: a block id is out of range.
        TensorRejectedError: ``memory`` is not on the CPU.

    """
    memory.layout.check(blocks)
    out = torch.empty(memory.layout.nbytes(blocks), dtype=torch.uint8)
    gather(memory, memory.iovec(blocks), out)
    return out


def scatter_stream(tensor: Tensor, memory: PagedMemory, blocks: BlockIds) -> None:
    """Copy a canonical stream into ``blocks`` of ``memory``.

    Args:
        tensor: the stream, any shape and dtype; only its bytes count.
        memory: where the blocks lie; must be on the CPU.
        blocks: ids, per KV-cache group.

    Raises:
        LoadError: the stream has another length than the blocks. Nothing was copied.
        HandshakeError: a block id is out of range.
        TensorRejectedError: ``memory`` is not on the CPU.

    """
    memory.layout.check(blocks)
    expected = memory.layout.nbytes(blocks)
    if tensor.nbytes != expected:
        raise LoadError(f"the entry has {tensor.nbytes} bytes, the blocks to load have {expected}")
    scatter(tensor.detach().contiguous(), memory, memory.iovec(blocks))


def heap_memory(layout: PagedLayout) -> PagedMemory:
    """Return zeroed CPU memory for ``layout``; `PagedMemory.owner` is its regions, uint8 ``[nbytes]`` each."""
    regions = [torch.zeros(nbytes, dtype=torch.uint8) for nbytes in layout.region_bytes]
    return PagedMemory(layout, [region.data_ptr() for region in regions], "cpu", regions)


def check_shapes(local: PagedLayout, remote: PagedLayout) -> None:
    """Raise `HandshakeError` unless the two layouts have the same layers of the same sizes."""
    ours, theirs = local.shape(), remote.shape()
    if len(ours) != len(theirs):
        raise HandshakeError(f"numbers of layers differ: ours {len(ours)}, theirs {len(theirs)}")
    for mine, other in zip(ours, theirs, strict=True):
        if mine != other:
            raise HandshakeError(f"layers [name, group, bytes a block, order] differ: ours {mine}, theirs {other}")


def check_counts(layout: PagedLayout, blocks: BlockIds) -> None:
    """Raise `HandshakeError` if a peer asks for more blocks of a group than it has, as ids that repeat.

    Each id costs memory before it is looked at.
    """
    for group, ids in enumerate(blocks):
        limit = max((layer.num_blocks for layer in layout.in_group(group)), default=len(ids))
        if len(ids) > limit:
            raise HandshakeError(f"{len(ids)} blocks of group {group} asked for, this memory has {limit}")


def check_pair(local: PagedLayout, local_blocks: BlockIds, remote: PagedLayout, remote_blocks: BlockIds) -> int:
    """Check that two selections of blocks can be copied onto each other; return their bytes.

    Raises:
        HandshakeError: an id is out of range, or the selections do not pair up.

    """
    local.check(local_blocks)
    remote.check(remote_blocks)
    ours, theirs = _counts(local_blocks), _counts(remote_blocks)
    if ours != theirs:
        raise HandshakeError(f"numbers of blocks per group differ: ours {ours}, theirs {theirs}")
    return local.nbytes(local_blocks)


def _counts(blocks: Sequence[Sequence[int]]) -> list[int]:
    counts = [len(ids) for ids in blocks]
    while counts and counts[-1] == 0:
        counts.pop()
    return counts


def _whole(tensor: Tensor, memory: PagedMemory, iov: IoVec) -> IoVec:
    """Return ``tensor``'s own memory as one piece, after checking that ``iov`` fits it."""
    if torch.device(memory.device).type != "cpu" or tensor.device.type != "cpu":
        raise TensorRejectedError(
            f"blocks on {memory.device!r} and a tensor on {str(tensor.device)!r}: only 'cpu' memory can be moved so far"
        )
    nbytes = int(iov[:, 1].sum())
    if tensor.nbytes != nbytes or not tensor.is_contiguous():
        raise TensorRejectedError(
            f"need a contiguous tensor of {nbytes} bytes, got {tensor.nbytes} bytes, strides {tensor.stride()}"
        )
    return np.array([[tensor.data_ptr(), nbytes]], dtype=np.uint64) if nbytes else np.empty((0, 2), np.uint64)
