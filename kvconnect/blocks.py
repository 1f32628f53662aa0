"""Gather and scatter of paged blocks: between scattered pieces and one tensor of bytes, both on one device.

On the CPU one pass of plain memory copies. On CUDA one kernel on the caller's current
stream (see `own_stream`), which is waited for: what was copied is there, and what it was
copied from is free. Memory on other kinds of devices is refused by name.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from kvconnect.errors import HandshakeError, LoadError, TensorRejectedError
from kvconnect.paging import BlockIds, IoVec, PagedLayout, PagedMemory
from kvconnect.pipes import vectored


def gather(memory: PagedMemory, iov: IoVec, out: Tensor) -> None:
    """Copy the pieces ``iov`` of ``memory``, one after another, into ``out``.

    Args:
        memory: where the pieces lie, on the CPU or a CUDA device.
        iov: addresses and lengths, as from `PagedMemory.iovec` or `kvconnect.paging.Pieces.cut`.
        out: contiguous tensor of exactly as many bytes, on the same device.

    Raises:
        TensorRejectedError: ``out`` is elsewhere, not contiguous or not of that size, or
            the device is of another kind. Nothing was copied.
        BrokenError: CUDA failed.

    """
    _copy(memory, _whole(out, memory, iov), iov)


def scatter(src: Tensor, memory: PagedMemory, iov: IoVec) -> None:
    """Copy the bytes of ``src`` into the pieces ``iov`` of ``memory``: the reverse of `gather`.

    Raises:
        TensorRejectedError, BrokenError: as for `gather`.

    """
    _copy(memory, iov, _whole(src, memory, iov))


def _copy(memory: PagedMemory, target: IoVec, source: IoVec) -> None:
    if memory.device == "cpu":
        vectored.copy(target, source)
        return
    from kvconnect.cuda import pieces

    pieces.copy(memory.device, target, source)


def own_stream(device: str) -> AbstractContextManager[object]:
    """Make a stream of this thread's own its current one for a while; nothing on the CPU.

    On the default stream copies would queue behind whatever an engine computes there.
    """
    if torch.device(device).type != "cuda":
        return nullcontext()
    streams: dict[str, torch.cuda.Stream] = _mine.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(streams[device])


_mine = threading.local()


def gather_stream(memory: PagedMemory, blocks: BlockIds) -> Tensor:
    """Return the canonical stream of ``blocks`` as a new uint8 tensor of the same device, shape ``[nbytes]``.

    Raises:
        HandshakeError: a block id is out of range.
        TensorRejectedError, BrokenError: as for `gather`.

    """
    memory.layout.check(blocks)
    out = torch.empty(memory.layout.nbytes(blocks), dtype=torch.uint8, device=memory.device)
    gather(memory, memory.iovec(blocks), out)
    return out


def scatter_stream(tensor: Tensor, memory: PagedMemory, blocks: BlockIds) -> None:
    """Copy a canonical stream into ``blocks`` of ``memory``.

    Args:
        tensor: the stream, any shape and dtype; only its bytes count.
        memory: where the blocks lie, on the tensor's device.
        blocks: ids, per KV-cache group.

    Raises:
        LoadError: the stream has another length than the blocks. Nothing was copied.
        HandshakeError: a block id is out of range.
        TensorRejectedError, BrokenError: as for `gather`.

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
    for group, (ids, limit) in enumerate(zip(blocks, layout.num_blocks, strict=False)):
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
    if torch.device(memory.device) != tensor.device or tensor.device.type not in ("cpu", "cuda"):
        raise TensorRejectedError(
            f"blocks on {memory.device!r} and a tensor on {str(tensor.device)!r}: "
            "both have to be on the CPU or on one CUDA device"
        )
    nbytes = int(iov[:, 1].sum())
    if tensor.nbytes != nbytes or not tensor.is_contiguous():
        raise TensorRejectedError(
            f"need a contiguous tensor of {nbytes} bytes, got {tensor.nbytes} bytes, strides {tensor.stride()}"
        )
    return np.array([[tensor.data_ptr(), nbytes]], dtype=np.uint64) if nbytes else np.empty((0, 2), np.uint64)
