"""Tensors in paged memory: how `RemoteBuffer` keeps what it copies, so that pipes can move it as blocks.

An entry is a stream over its blocks: the number of tensors and the length of
their headers, the headers (`kvconnect.pipes.wire`), then each tensor's bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.errors import BrokenError, LoadError
from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory, Pieces
from kvconnect.pipes import wire

_LEAD = struct.Struct("<II")

Ids = tuple[int, ...]


class Arena:
    """``num_blocks`` blocks of ``block_bytes`` bytes and the list of free ones. Not thread-safe."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Reserve the memory; the system provides it page by page, as it is first used."""
        self.block_bytes, self.num_blocks = block_bytes, num_blocks
        nbytes = num_blocks * block_bytes
        layer = LayerLayout("arena", 0, 0, 0, block_bytes, num_blocks, block_bytes)
        self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        self.memory = PagedMemory(PagedLayout((layer,), (nbytes,)), [self._bytes.data_ptr()], "cpu", self._bytes)
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def take(self, count: int) -> Ids:
        """Take ``count`` free blocks; the caller has made sure that there are so many."""
        taken = tuple(self._free[len(self._free) - count :])
        del self._free[len(self._free) - count :]
        return tuple(sorted(taken))

    def give(self, ids: Ids) -> None:
        """Return blocks."""
        self._free.extend(ids)


def blocks_needed(stream: Sequence[Tensor], block_bytes: int) -> int:
    """Return how many blocks hold `encode`'s stream; at least one."""
    return max(1, -(-sum(piece.nbytes for piece in stream) // block_bytes))


def encode(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the stream of an entry as byte tensors; the later ones may share the caller's memory.

    Raises:
        TensorRejectedError: a tensor cannot be carried.

    """
    encoded = [wire.encode(tensor) for tensor in tensors]
    headers = b"".join(header for header, _ in encoded)
    lead = _LEAD.pack(len(tensors), len(headers)) + headers
    payloads = [payload for _, payload in encoded if payload is not None and payload.nbytes]
    flat = [payload.contiguous().reshape(-1).view(torch.uint8) for payload in payloads]
    return [torch.frombuffer(bytearray(lead), dtype=torch.uint8), *flat]


def store(arena: Arena, ids: Ids, stream: Sequence[Tensor]) -> None:
    """Write an entry's stream into its blocks."""
    memory = arena.memory
    whole = Pieces(memory.iovec([ids]))
    at = 0
    for piece in stream:
        paged.scatter(piece, memory, whole.cut(at, at + piece.nbytes))
        at += piece.nbytes


def load(arena: Arena, ids: Ids) -> list[Tensor]:
    """Read an entry's tensors out of its blocks, as new ones.

    Raises:
        LoadError: the blocks do not hold an entry.

    """
    return decode(paged.gather_stream(arena.memory, [ids]))


def decode(stream: Tensor) -> list[Tensor]:
    """Read an entry's tensors out of its stream, uint8 ``[nbytes]``, as new ones.

    Raises:
        LoadError: the stream does not hold an entry.

    """
    if stream.nbytes < _LEAD.size:
        raise LoadError("the entry is cut off")
    count, length = _LEAD.unpack(stream[: _LEAD.size].numpy().tobytes())
    headers = memoryview(stream[_LEAD.size : _LEAD.size + length].numpy().tobytes())
    at, named = _LEAD.size + length, 0
    tensors = []
    try:
        for _ in range(count):
            end = named + wire.HEADER_BYTES
            end += wire.read(headers[named:end])
            meta = wire.decode(headers[named:end], max_bytes=stream.nbytes)
            named = end
            if meta.kind is not wire.Kind.TENSOR or at + meta.nbytes > stream.nbytes:
                raise LoadError("the entry is cut off")
            tensor = meta.empty()
            if meta.nbytes:
                tensor.reshape(-1).view(torch.uint8).copy_(stream[at : at + meta.nbytes])
            tensors.append(tensor)
            at += meta.nbytes
    except BrokenError as error:
        raise LoadError(f"the entry is malformed: {error}") from error
    return tensors
