"""What a block stream puts on the wire, and what it remembers of one transfer."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvconnect.errors import BrokenError, HandshakeError, KVConnectError
from kvconnect.paging import BlockIds, Pieces
from kvconnect.pipes.base import Transfer

# magic, kind, transfer, offset in the stream
_TAG = struct.Struct("<4sI2Q")
_MAGIC = b"KVB1"
#: Bytes of the tag at the end of each chunk.
TAG_BYTES = _TAG.size

_MAX_COUNT = 1 << 48


class Kind(IntEnum):
    """Who asked for a transfer and numbered it: the end that receives, or the end that sends."""

    READ = 0
    WRITE = 1


Key = tuple[Kind, int]


@dataclass(eq=False)
class Flow:
    """One transfer at one end. Its fields change under the stream's lock.

    Args:
        key: who asked, and the asking end's number for it.
        receives: whether this end receives.
        pieces: this end's memory.

    """

    key: Key
    receives: bool
    pieces: Pieces
    #: The handle of whoever asked; none where the other end did.
    transfer: Transfer | None = None
    #: Bytes sent, or scattered.
    moved: int = 0
    #: Chunks scattered; how large they are is up to the end that sends.
    chunks: int = 0
    #: Chunks that may still be sent.
    credit: int = 0
    #: Waits for its turn to send, or has it.
    queued: bool = False
    #: A thread copies from or to the blocks right now; it settles the flow if the flow ends meanwhile.
    copying: bool = False
    ended: bool = False
    #: Why it ended, or is going to.
    error: KVConnectError | None = None
    #: When something moved last.
    stamp: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        """Bytes that the transfer moves."""
        return self.pieces.nbytes

    def address(self) -> dict[str, Any]:
        """Name this transfer in a message to the other end, which does the opposite in it."""
        return {"kind": int(self.key[0]), "transfer": self.key[1], "receives": not self.receives}


def flow_key(body: Mapping[str, Any]) -> tuple[bool, Key]:
    """Read `Flow.address`: whether this end receives, and the key; raise `HandshakeError` if malformed."""
    kind = body.get("kind")
    if kind not in (Kind.READ, Kind.WRITE):
        raise HandshakeError(f"a transfer's kind is {kind!r}")
    return bool(body.get("receives")), (Kind(kind), count(body, "transfer"))


def count(body: Mapping[str, Any], field_name: str) -> int:
    """Read a number that is not negative; raise `HandshakeError` if it is something else."""
    value = body.get(field_name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise HandshakeError(f"{field_name} must be a number, got {value!r}")
    return value


def pack(blocks: BlockIds) -> list[bytes]:
    """Block ids of each group as little-endian int32 bytes."""
    return [np.asarray(ids, dtype="<i4").tobytes() for ids in blocks]


def unpack(groups: object) -> list[list[int]]:
    """Read `pack`'s result from a peer; raise `HandshakeError` if malformed."""
    if not isinstance(groups, list) or not all(isinstance(ids, bytes) and len(ids) % 4 == 0 for ids in groups):
        raise HandshakeError("block ids must be a list of int32 arrays")
    return [np.frombuffer(ids, dtype="<i4").tolist() for ids in groups]


def write_tag(chunk: Tensor, key: Key, offset: int) -> None:
    """Fill the last `TAG_BYTES` of ``chunk``, uint8 ``[nbytes + TAG_BYTES]``, in order on the current stream."""
    tag = bytearray(_TAG.pack(_MAGIC, key[0], key[1], offset))
    chunk[chunk.nbytes - TAG_BYTES :] = torch.frombuffer(tag, dtype=torch.uint8)


def read_tag(chunk: Tensor | None) -> tuple[Tensor, Key, int]:
    """Split a received chunk into its bytes, its transfer and its offset.

    Raises:
        BrokenError: it is no chunk. The two ends are out of step for good.

    """
    if chunk is None or chunk.dtype != torch.uint8 or chunk.dim() != 1 or chunk.nbytes <= TAG_BYTES:
        what = "None" if chunk is None else f"{tuple(chunk.shape)} {chunk.dtype}"
        raise BrokenError(f"expected a chunk of blocks, received {what}")
    data = chunk[: chunk.nbytes - TAG_BYTES]
    magic, kind, number, offset = _TAG.unpack(chunk[chunk.nbytes - TAG_BYTES :].cpu().numpy().tobytes())
    if magic != _MAGIC or kind not in (Kind.READ, Kind.WRITE):
        raise BrokenError("expected a chunk of blocks, received other bytes")
    return data, (Kind(kind), number), offset
