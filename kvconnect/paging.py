"""Paged memory as values: registered tensors + block ids → byte regions.

Pure geometry: no torch, no I/O, no device. A *layout* says where the bytes of a
block lie, relative to named regions; a *memory* is a layout with the regions'
base addresses in this process. Hybrid models, MLA and packed layouts differ in
their values, never in code.

Every layout defines a **canonical byte stream** for a selection of blocks:
group by group, layer by layer within it, block by block in the order of the
given ids, piece by piece within a block. Two engines whose layouts have the same *shape*
(`PagedLayout.shape`) but other strides produce the same stream, so a transfer
is cut into chunks by stream offset alone and neither side needs to know the
other's strides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvconnect.errors import HandshakeError

Int64Array = npt.NDArray[np.int64]
#: ``uint64[n, 2]``: address and length of each piece – the memory image of ``struct iovec[n]``.
IoVec = npt.NDArray[np.uint64]
#: Block ids, one sequence per KV-cache group (attention-only models have one group).
BlockIds = Sequence[Sequence[int]]

_MAX_BLOCKS = 1 << 31
_MAX_GROUPS = 1 << 12
_MAX_BYTES = 1 << 48
#: Pieces of one block, and dimensions that they lie along: each piece costs its reader memory.
_MAX_PIECES = 1 << 12
_MAX_INNER = 16


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """Where the blocks of one layer lie.

    Block ``b`` consists of ``prod(count)`` pieces of ``piece_bytes`` bytes; the
    piece at index ``(i, j, …)`` starts at
    ``offset + b * block_stride + i * stride_i + j * stride_j + …`` of region ``region``.
    """

    name: str
    group: int
    region: int
    offset: int
    block_stride: int
    num_blocks: int
    piece_bytes: int
    inner: tuple[tuple[int, int], ...] = ()
    #: What a block's bytes mean, in their order: equal on peers that may exchange them, otherwise opaque.
    order: str = ""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of this layer."""
        return self.piece_bytes * _piece_count(self)

    def piece_offsets(self) -> Int64Array:
        """Offsets of a block's pieces relative to the block's start, in canonical order."""
        offsets = np.zeros(1, dtype=np.int64)
        for count, stride in self.inner:
            steps = np.arange(count, dtype=np.int64) * stride
            offsets = (offsets[:, None] + steps[None, :]).reshape(-1)
        return offsets


class _Stack(NamedTuple):
    """Consecutive layers whose blocks have equally many pieces: arrays ``[layers, blocks or 1, pieces or 1]``."""

    region: Int64Array
    piece_bytes: Int64Array
    offset: Int64Array
    block_stride: Int64Array
    inner: Int64Array

    @classmethod
    def of(cls, layers: Sequence[LayerLayout]) -> _Stack:
        def column(field: str) -> Int64Array:
            return np.array([getattr(layer, field) for layer in layers], dtype=np.int64)

        return cls(
            column("region"),
            column("piece_bytes"),
            column("offset")[:, None, None],
            column("block_stride")[:, None, None],
            np.stack([layer.piece_offsets() for layer in layers])[:, None, :],
        )


def _piece_count(layer: LayerLayout) -> int:
    return math.prod(count for count, _ in layer.inner)


@dataclass(frozen=True)
class PagedLayout:
    """The layout of one rank's KV memory: its layers, and how many bytes each region has."""

    layers: tuple[LayerLayout, ...]
    region_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that every piece of every block lies inside its region."""
        for layer in self.layers:
            _check_layer(layer, self.region_bytes)

    @functools.cached_property
    def num_groups(self) -> int:
        """Number of KV-cache groups."""
        return 1 + max((layer.group for layer in self.layers), default=-1)

    def in_group(self, group: int) -> tuple[LayerLayout, ...]:
        """Layers of one group, in canonical order."""
        return tuple(layer for layer in self.layers if layer.group == group)

    def shape(self) -> list[list[Any]]:
        """What must agree between two peers: ``[layer name, group, bytes a block, order]`` per layer."""
        return [[layer.name, layer.group, layer.block_bytes, layer.order] for layer in self.layers]

    @functools.cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block of each group; 0 where a group has no layer here."""
        return tuple(sum(layer.block_bytes for layer in self.in_group(group)) for group in range(self.num_groups))

    @functools.cached_property
    def num_blocks(self) -> tuple[int, ...]:
        """How many blocks all layers of each group have."""
        # A pipeline stage may have no layer of a group in between: its blocks have no bytes here.
        return tuple(
            min((layer.num_blocks for layer in self.in_group(group)), default=_MAX_BLOCKS)
            for group in range(self.num_groups)
        )

    def nbytes(self, blocks: BlockIds) -> int:
        """Length of the canonical stream of ``blocks``, in bytes."""
        return sum(len(ids) * size for ids, size in zip(blocks, self.block_bytes, strict=False))

    def check(self, blocks: BlockIds) -> None:
        """Raise `HandshakeError` if a block id (from a peer, say) lies outside this memory."""
        if len(blocks) > self.num_groups:
            raise HandshakeError(f"{len(blocks)} block groups asked for, this memory has {self.num_groups}")
        for group, (ids, limit) in enumerate(zip(blocks, self.num_blocks, strict=False)):
            if len(ids) and (min(ids) < 0 or max(ids) >= limit):
                bad = next(b for b in ids if not 0 <= b < limit)
                raise HandshakeError(f"block {bad} of group {group} is outside 0..{limit - 1}")

    def pieces(self, blocks: BlockIds) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return ``(region, offset, nbytes)`` of every piece, in canonical order."""
        regions: list[Int64Array] = []
        offsets: list[Int64Array] = []
        lengths: list[Int64Array] = []
        for group, ids in enumerate(blocks):
            numbers = np.asarray(ids, dtype=np.int64)[None, :, None]
            for stack in self._stacks[group] if group < len(self._stacks) else ():
                starts = stack.offset + numbers * stack.block_stride + stack.inner
                per_layer = starts.size // len(stack.region)
                offsets.append(starts.reshape(-1))
                regions.append(np.repeat(stack.region, per_layer))
                lengths.append(np.repeat(stack.piece_bytes, per_layer))
        if not offsets:
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty, empty
        return np.concatenate(regions), np.concatenate(offsets), np.concatenate(lengths)

    @functools.cached_property
    def _stacks(self) -> tuple[tuple[_Stack, ...], ...]:
        """Layers by group as arrays; a hand-over asks for all of them at once, and often."""
        return tuple(
            tuple(_Stack.of(list(run)) for _, run in itertools.groupby(self.in_group(group), _piece_count))
            for group in range(self.num_groups)
        )

    def to_wire(self) -> dict[str, Any]:
        """Plain data for msgpack."""
        return {
            "regions": list(self.region_bytes),
            "layers": [
                [
                    x.name,
                    x.group,
                    x.region,
                    x.offset,
                    x.block_stride,
                    x.num_blocks,
                    x.piece_bytes,
                    [list(pair) for pair in x.inner],
                    x.order,
                ]
                for x in self.layers
            ],
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> PagedLayout:
        """Read `to_wire`'s data from a peer; raise `HandshakeError` on anything malformed."""
        try:
            layers = tuple(
                LayerLayout(
                    str(name), int(group), int(region), int(offset), int(stride), int(count), int(piece),
                    tuple((int(c), int(s)) for c, s in inner), str(order),
                )
                for name, group, region, offset, stride, count, piece, inner, order in data["layers"]
            )  # fmt: skip
            layout = cls(layers, tuple(int(n) for n in data["regions"]))
            _check_sizes(layout)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise HandshakeError(f"the peer's memory layout is malformed: {error}") from error
        return layout


class PagedMemory:
    """A layout placed at addresses of this process.

    Args:
        layout: where blocks lie inside the regions.
        bases: the address of each region's first byte (``data_ptr()``), in this process.
        device: ``"cpu"`` or a CUDA device such as ``"cuda:0"``.
        owner: whatever keeps the memory alive (the registered tensors, say).

    """

    def __init__(self, layout: PagedLayout, bases: Sequence[int], device: str = "cpu", owner: object = None) -> None:
        if len(bases) != len(layout.region_bytes):
            raise ValueError(f"{len(bases)} base addresses for {len(layout.region_bytes)} regions")
        self.layout = layout
        self.bases = np.asarray(bases, dtype=np.uint64)
        self.device = device
        self.owner = owner

    def iovec(self, blocks: BlockIds) -> IoVec:
        """Addresses and lengths of the canonical stream of ``blocks``, neighbours merged."""
        return place(self.layout, self.bases, blocks)


class Strided(NamedTuple):
    """A tensor's place in its region.

    Args:
        offset: of its first element, in bytes.
        shape: in elements.
        strides: in elements.
        itemsize: bytes of an element.

    """

    offset: int
    shape: Sequence[int]
    strides: Sequence[int]
    itemsize: int


def layer_from_strides(
    name: str,
    group: int,
    region: int,
    view: Strided,
    *,
    block_dim: int,
    num_blocks: int,
) -> LayerLayout:
    """Describe one registered KV tensor: a value, whatever vLLM generation it comes from.

    Within a block, pieces follow each other in *memory* order, so that a page that is
    one contiguous run is one piece. `LayerLayout.order` says which dimensions these
    bytes run through: K and V apart or side by side, heads before tokens or after them.
    Only where it is the same on both sides can blocks be exchanged; where layers and
    blocks lie may differ.

    Args:
        name, group, region: which layer it is, its KV-cache group, the region that holds it.
        view: the tensor.
        block_dim: the dimension that counts blocks.
        num_blocks: blocks of the engine's pool; a multiple of it in ``block_dim``
            means that the backend splits each block into equal kernel blocks.

    Raises:
        HandshakeError: the tensor does not hold ``num_blocks`` whole blocks.

    """
    dims = [(size, stride * view.itemsize) for size, stride in zip(view.shape, view.strides, strict=True)]
    size, stride = dims.pop(block_dim)
    count, rest = divmod(size, num_blocks)
    if rest or count == 0:
        raise HandshakeError(f"layer {name!r} has {size} blocks, the engine's pool has {num_blocks}")
    # A dimension of one entry has no place in memory: MLA's latent cache is the same with and without its one head.
    # The first one is that of a block's kernel blocks, whether there are several or not.
    axes = [(count, stride), *(dim for dim in dims if dim[0] > 1)]
    order = sorted(range(count == 1, len(axes)), key=lambda axis: -axes[axis][1])
    piece = view.itemsize
    runs: list[tuple[int, int]] = []
    for n, step in (axes[axis] for axis in reversed(order)):
        if step == piece and not runs:
            piece *= n
        else:
            runs.append((n, step))
    sizes = "x".join(str(axes[axis][0]) for axis in order)
    return LayerLayout(
        name, group, region, view.offset, stride * count, num_blocks, piece, tuple(reversed(runs)),
        f"{sizes} of {view.itemsize} B, dimensions {order}",
    )  # fmt: skip


def place(layout: PagedLayout, bases: npt.NDArray[np.uint64], blocks: BlockIds) -> IoVec:
    """Place the canonical stream of ``blocks`` at ``bases``; pieces that touch become one.

    Also serves a reader that holds a *peer's* layout and base addresses.
    """
    region, offset, nbytes = layout.pieces(blocks)
    out = np.empty((region.size, 2), dtype=np.uint64)
    out[:, 0] = bases[region] + offset.astype(np.uint64)
    out[:, 1] = nbytes.astype(np.uint64)
    return merge(out)


def merge(iov: IoVec) -> IoVec:
    """Join pieces that follow each other in memory as well as in the stream."""
    if len(iov) < 2:
        return iov
    ends = iov[:, 0] + iov[:, 1]
    first = np.flatnonzero(np.concatenate(([True], iov[1:, 0] != ends[:-1])))
    out = np.empty((first.size, 2), dtype=np.uint64)
    out[:, 0] = iov[first, 0]
    out[:, 1] = np.add.reduceat(iov[:, 1], first)
    return out


class Pieces:
    """A stream of pieces of memory that can be cut anywhere, for a search and the cut's own pieces.

    A large transfer has many thousand pieces and is cut once for each chunk, so their
    ends are summed up once, here. Never changes: threads may share it.
    """

    __slots__ = ("_ends", "_iov", "nbytes")

    def __init__(self, iov: IoVec) -> None:
        """Copy ``iov``, without the pieces that are empty."""
        self._iov: IoVec = iov[iov[:, 1] > 0]
        self._ends = np.cumsum(self._iov[:, 1], dtype=np.uint64)
        #: Length of the stream in bytes.
        self.nbytes = int(self._ends[-1]) if len(self._ends) else 0

    def cut(self, start: int, stop: int) -> IoVec:
        """Return the pieces that make up bytes ``start:stop``, as an array of the caller's own.

        Raises:
            ValueError: the stream does not have these bytes.

        """
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes {start} to {stop} of a stream of {self.nbytes}")
        if start == stop:
            return self._iov[:0].copy()
        # np.uint64, not int: numpy would convert the whole array to find a common type.
        first = int(self._ends.searchsorted(np.uint64(start), side="right"))
        last = int(self._ends.searchsorted(np.uint64(stop), side="left"))
        out = self._iov[first : last + 1].copy()
        # Most cuts lie between two pieces: arithmetic on single elements takes longer than all of the rest.
        if skipped := start - self._ends.item(first) + self._iov.item(first, 1):
            out[0, 0] += np.uint64(skipped)
            out[0, 1] -= np.uint64(skipped)
        if left := self._ends.item(last) - stop:
            out[-1, 1] -= np.uint64(left)
        return out


def spans(nbytes: int, step: int, first: int | None = None) -> list[tuple[int, int]]:
    """Divide a stream of ``nbytes`` bytes into chunks; return their ``(start, stop)``.

    Args:
        nbytes: bytes of the stream.
        step: bytes of a chunk; the last one has what is left.
        first: bytes of the first chunk, if other than ``step``.

    """
    marks = [0, *range(first or step, nbytes, step)] if nbytes else []
    return list(zip(marks, [*marks[1:], nbytes], strict=True)) if marks else []


def _check_sizes(layout: PagedLayout) -> None:
    """Raise `HandshakeError` at numbers of a peer that no memory has and no array could hold."""
    for layer in layout.layers:
        numbers = [layer.offset, layer.block_stride, layer.piece_bytes, *(n for pair in layer.inner for n in pair)]
        if layer.group >= _MAX_GROUPS or layer.num_blocks > _MAX_BLOCKS or max(numbers) > _MAX_BYTES:
            raise HandshakeError(f"layer {layer.name!r}: a number is out of range")
        if len(layer.inner) > _MAX_INNER or _piece_count(layer) > _MAX_PIECES:
            raise HandshakeError(f"layer {layer.name!r}: a block has more than {_MAX_PIECES} pieces")
    if max(layout.region_bytes, default=0) > _MAX_BYTES:
        raise HandshakeError("a region's size is out of range")


def _check_layer(layer: LayerLayout, region_bytes: Sequence[int]) -> None:
    """Raise `HandshakeError` unless every piece of every block lies inside the layer's region."""
    spans = [layer.offset, layer.block_stride, layer.num_blocks, layer.piece_bytes, layer.group, layer.region]
    spans += [value for pair in layer.inner for value in pair]
    if min(spans) < 0 or layer.piece_bytes == 0 or layer.region >= len(region_bytes):
        raise HandshakeError(f"layer {layer.name!r}: a size, stride or region number is out of range")
    if layer.num_blocks == 0 or any(count == 0 for count, _ in layer.inner):
        return
    last = layer.offset + (layer.num_blocks - 1) * layer.block_stride
    last += sum((count - 1) * stride for count, stride in layer.inner) + layer.piece_bytes
    if last > region_bytes[layer.region]:
        raise HandshakeError(f"layer {layer.name!r} ends at byte {last}, its region has {region_bytes[layer.region]}")
