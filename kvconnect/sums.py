"""Sums of the canonical stream of blocks: equal at both ends whatever their layouts, strides and devices.

They find damage and stop no forger. Between CPU memories it is XXH3. Where a GPU takes
part it is a sum that a kernel can build in any order: the stream as little-endian 64-bit
words, the last one filled up with zeros, each mixed with its position,
``sum(mix(word[i] ^ (i + 1) * GOLDEN)) mod 2**64``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from kvconnect.errors import HandshakeError
from kvconnect.paging import BlockIds, IoVec, PagedMemory, Pieces, spans
from kvconnect.pipes import vectored

#: Kinds of sums, as they are called between peers.
XXH3: Final = "xxh3"
WORDS: Final = "words"

#: Odd constants of the mixing steps (2**64 divided by the golden ratio; MurmurHash3's finalizer).
GOLDEN: Final = 0x9E3779B97F4A7C15
FIRST: Final = 0xFF51AFD7ED558CCD
SECOND: Final = 0xC4CEB9FE1A85EC53

_MASK: Final = (1 << 64) - 1
_CHUNK_BYTES: Final = 1 << 20
_WORD_BYTES: Final = 8

_PyBUF_READ: Final = 0x100
_PyBUF_WRITE: Final = 0x200
_memoryview = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview.restype = ctypes.py_object
_memoryview.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


Bytes = bytes | bytearray | memoryview


def view(address: int, nbytes: int) -> Bytes:
    """Return memory to read; whoever asks keeps it alive. Much cheaper than an array type for each size."""
    if not nbytes:
        return b""
    found: memoryview = _memoryview(address, nbytes, _PyBUF_READ)
    return found


def room(address: int, nbytes: int) -> memoryview:
    """Return memory (some) to write to; as `view`."""
    found: memoryview = _memoryview(address, nbytes, _PyBUF_WRITE)
    return found


def kind_for(*devices: str) -> str:
    """Return the kind of sum that ends on these devices both can build."""
    return XXH3 if all(device == "cpu" for device in devices) else WORDS


def of_blocks(memory: PagedMemory, blocks: BlockIds, kind: str) -> int:
    """Return the sum of the canonical stream of ``blocks``. Takes as long as to read them; without the GIL, mostly.

    Raises:
        HandshakeError: an id is out of range, or there is no such kind of sum for this memory.
        BrokenError: CUDA failed.

    """
    memory.layout.check(blocks)
    device = memory.device.partition(":")[0]
    if device == "cpu" and kind == XXH3:
        return _xxh3(memory.iovec(blocks))
    if device == "cpu" and kind == WORDS:
        return _words(memory.iovec(blocks), vectored.copy)
    if device == "cuda" and kind == WORDS:
        from kvconnect.cuda import sums

        found = sums.of_blocks(memory, blocks)
        return _words(memory.iovec(blocks), _from_device(memory.device)) if found is None else found
    raise HandshakeError(f"no sum of kind {kind!r} is built of {device} memory")


def _xxh3(iov: IoVec) -> int:
    state = xxhash.xxh3_64()
    for address, nbytes in iov.tolist():
        state.update(view(address, nbytes))
    return state.intdigest()


def _words(iov: IoVec, copy: Callable[[IoVec, IoVec], object]) -> int:
    """Add up word by word what ``copy`` brings into host memory."""
    pieces, total = Pieces(iov), 0
    room = np.zeros(_CHUNK_BYTES // _WORD_BYTES, dtype=np.uint64)
    for start, stop in spans(pieces.nbytes, _CHUNK_BYTES):
        words = room[: -(-(stop - start) // _WORD_BYTES)]
        words[-1] = 0
        copy(vectored.pieces((room.ctypes.data, stop - start)), pieces.cut(start, stop))
        total += mixed(words, start // _WORD_BYTES)
    return total & _MASK


def _from_device(device: str) -> Callable[[IoVec, IoVec], None]:
    """Return what copies from a GPU: for layouts that the kernel cannot read, whose numbers are odd."""
    import torch

    from kvconnect.cuda import pieces

    room = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device=device)

    def copy(target: IoVec, source: IoVec) -> None:
        count = int(target[0, 1])
        pieces.copy(device, vectored.pieces((room.data_ptr(), count)), source)
        here = room[:count].cpu()
        vectored.copy(target, vectored.pieces((here.data_ptr(), count)))

    return copy


def mixed(words: npt.NDArray[np.uint64], first: int) -> int:
    """Return the sum of ``words``, of which the first one is number ``first`` of the stream."""
    numbers = np.arange(first + 1, first + 1 + len(words), dtype=np.uint64)
    found = words ^ (numbers * np.uint64(GOLDEN))
    found ^= found >> np.uint64(33)
    found *= np.uint64(FIRST)
    found ^= found >> np.uint64(33)
    found *= np.uint64(SECOND)
    found ^= found >> np.uint64(33)
    return int(found.sum(dtype=np.uint64))
