"""The binary header of a tensor message, shared by media that carry bytes.

::

    magic u16 | kind u8 | dtype u8 | ndim u8 | 0 u8[3] | nbytes u64 | dims i64[6] | more dims i64[ndim-6]
    `------------------------- HEADER_BYTES, fixed -----------------------------' `---- `read` bytes ----'

Six dimensions fit the fixed part, so that a usual message is one header and one
payload. Numbers are little-endian. Everything a peer sent is checked before
memory is allocated for it.
"""

from __future__ import annotations

import enum
import functools
import math
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import torch

from kvconnect.errors import BrokenError, EndOfPipe, TensorRejectedError

MAGIC: Final = 0x6B76  # "kv"
INLINE_DIMS: Final = 6
MAX_DIMS: Final = 64
DEFAULT_MAX_BYTES: Final = 1 << 40

_PREFIX = struct.Struct(f"<HBBB3xQ{INLINE_DIMS}q")
HEADER_BYTES: Final = _PREFIX.size
MAX_HEADER_BYTES: Final = HEADER_BYTES + 8 * MAX_DIMS


class Kind(enum.IntEnum):
    """What a message or frame is. Numbers are part of the wire format and never reused."""

    TENSOR = 1
    NONE = 2
    END = 3
    # frames of a medium's own block protocol
    READ = 16
    WRITE = 17
    DATA = 18
    CANCEL = 19
    ERROR = 20
    ACK = 21


# Names, not torch attributes: older releases lack some. The position is the code on the wire.
_DTYPE_NAMES: Final = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2",
)  # fmt: skip
_DTYPES: Final[dict[int, torch.dtype]] = {
    code: getattr(torch, name) for code, name in enumerate(_DTYPE_NAMES, start=1) if hasattr(torch, name)
}
_CODES: Final[dict[torch.dtype, int]] = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Meta:
    """A checked header. ``dtype`` and ``shape`` mean something for `Kind.TENSOR` only."""

    kind: Kind
    dtype: torch.dtype = torch.uint8
    shape: tuple[int, ...] = ()
    nbytes: int = 0

    def empty(self) -> torch.Tensor:
        """Return a new contiguous CPU tensor of this shape and dtype, not initialised."""
        return torch.empty(self.shape, dtype=self.dtype)


def control(kind: Kind) -> bytes:
    """Return the header of a message without a tensor, such as `Kind.NONE` or `Kind.END`."""
    return _CONTROL[kind]


def encode(tensor: torch.Tensor | None, devices: Collection[str] = ("cpu",)) -> tuple[bytes, torch.Tensor | None]:
    """Return a message's header, and the contiguous tensor whose memory follows it.

    The tensor is ``tensor`` itself where its memory can be sent as it lies, else a copy.

    Args:
        tensor: the message.
        devices: kinds of memory that the pipe carries.

    Raises:
        TensorRejectedError: not a dense tensor on one of ``devices``, or of a dtype the wire has no code for.

    """
    if tensor is None:
        return _CONTROL[Kind.NONE], None
    _check(tensor, devices)
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return _tensor_header(dense.dtype, tuple(dense.shape)), dense


def memory(dense: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, which `encode` and `Meta.empty` make, to send or to fill."""
    return dense.detach().reshape(-1).view(torch.uint8).numpy().data


def read(prefix: bytes | bytearray | memoryview) -> int:
    """Return how many bytes of dimensions follow the first `HEADER_BYTES`.

    Raises:
        BrokenError: these are not the first bytes of a message.

    """
    if len(prefix) != HEADER_BYTES:
        raise BrokenError(f"a message header has {HEADER_BYTES} bytes, not {len(prefix)}")
    magic: int
    ndim: int
    magic, _, _, ndim, *_ = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise BrokenError(f"the peer sent something that is not a message (magic {magic:#06x})")
    if ndim > MAX_DIMS:
        raise BrokenError(f"the peer sent a tensor of {ndim} dimensions (limit {MAX_DIMS})")
    return 8 * max(0, ndim - INLINE_DIMS)


def decode(header: bytes | bytearray | memoryview, max_bytes: int = DEFAULT_MAX_BYTES) -> Meta:
    """Check a whole header (the fixed part and what `read` asked for) and return what it says.

    Raises:
        BrokenError: any field is out of range, inconsistent or larger than ``max_bytes``.

    """
    extra = read(header[:HEADER_BYTES])
    if len(header) != HEADER_BYTES + extra:
        raise BrokenError(f"a message header is {HEADER_BYTES + extra} bytes long, got {len(header)}")
    return _parse(bytes(header), max_bytes)


def receive(recv_into: Callable[[memoryview], int], max_bytes: int = DEFAULT_MAX_BYTES) -> torch.Tensor | None:
    """Receive one message, as a new CPU tensor, from a medium that carries a stream of bytes.

    Args:
        recv_into: fills some of a view and returns how many bytes, 0 at the stream's end, as a socket's does.
        max_bytes: a larger tensor is refused.

    Raises:
        EndOfPipe: the message is the end, `Kind.END`.
        BrokenError: the stream ended without it, or what came is no message.

    """
    header = _fill(recv_into, memoryview(bytearray(HEADER_BYTES)))
    dims = _fill(recv_into, memoryview(bytearray(read(header))))
    meta = decode(bytes(header) + bytes(dims), max_bytes)
    if meta.kind is Kind.END:
        raise EndOfPipe("the other end was closed")
    if meta.kind is Kind.NONE:
        return None
    if meta.kind is not Kind.TENSOR:
        raise BrokenError(f"the peer sent a {meta.kind.name} frame where a message was due")
    tensor = meta.empty()
    _fill(recv_into, memory(tensor))
    return tensor


def _fill(recv_into: Callable[[memoryview], int], view: memoryview) -> memoryview:
    left = view
    while left:
        count = recv_into(left)
        if count == 0:
            raise BrokenError("the other end is gone")
        left = left[count:]
    return view


# Peers repeat shapes; a header seen before costs one dictionary look-up.
@functools.lru_cache(maxsize=256)
def _parse(header: bytes, max_bytes: int) -> Meta:
    _, number, code, ndim, nbytes, *dims = _PREFIX.unpack_from(header)
    try:
        kind = Kind(number)
    except ValueError:
        raise BrokenError(f"the peer sent a message of unknown kind {number}") from None
    if kind is not Kind.TENSOR:
        if code or ndim or nbytes:
            raise BrokenError(f"the peer sent a {kind.name} message with a payload")
        return Meta(kind)
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise BrokenError(f"the peer sent a tensor of unknown dtype code {code}")
    dims += struct.unpack_from(f"<{max(0, ndim - INLINE_DIMS)}q", header, HEADER_BYTES)
    return Meta(kind, dtype, _checked_shape(dims[:ndim], nbytes, dtype.itemsize, max_bytes), nbytes)


def _checked_shape(shape: list[int], nbytes: int, itemsize: int, max_bytes: int) -> tuple[int, ...]:
    # With zeros counted as ones: torch computes strides that way and must not overflow.
    span = math.prod(max(1, dim) for dim in shape) * itemsize
    if min(shape, default=0) < 0 or span >= 1 << 63:
        raise BrokenError("the peer sent a tensor with a dimension out of range")
    if nbytes != math.prod(shape) * itemsize:
        raise BrokenError(f"the peer announced {nbytes} bytes for a tensor of {math.prod(shape) * itemsize}")
    if nbytes > max_bytes:
        raise BrokenError(f"the peer announced a tensor of {nbytes} bytes (limit {max_bytes})")
    return tuple(shape)


def _check(tensor: torch.Tensor, devices: Collection[str]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TensorRejectedError(f"a pipe carries tensors or None, not {type(tensor).__name__}")
    if tensor.device.type not in devices:
        carried = " and ".join(kind.upper() for kind in devices)
        raise TensorRejectedError(f"the tensor is on {tensor.device}, this pipe carries {carried} tensors")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TensorRejectedError("only dense (strided) tensors can be carried")
    if tensor.dtype not in _CODES:
        raise TensorRejectedError(f"a tensor of dtype {tensor.dtype} cannot be carried")


@functools.lru_cache(maxsize=256)
def _tensor_header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    if len(shape) > MAX_DIMS:
        raise TensorRejectedError(f"a tensor of {len(shape)} dimensions cannot be carried (limit {MAX_DIMS})")
    inline = [*shape[:INLINE_DIMS], *[0] * (INLINE_DIMS - len(shape))]
    nbytes = math.prod(shape) * dtype.itemsize
    prefix = _PREFIX.pack(MAGIC, Kind.TENSOR, _CODES[dtype], len(shape), nbytes, *inline)
    rest = shape[INLINE_DIMS:]
    return prefix + struct.pack(f"<{len(rest)}q", *rest)


_CONTROL: Final[dict[Kind, bytes]] = {
    kind: _PREFIX.pack(MAGIC, kind, 0, 0, 0, *[0] * INLINE_DIMS) for kind in Kind if kind is not Kind.TENSOR
}
