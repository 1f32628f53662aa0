"""Scattered pieces of memory through one system call each.

An `IoVec` (``uint64[n, 2]``: address, length) is the memory image of ``struct
iovec[n]``, so it is handed to the kernel as it lies, without one Python object a
piece. All calls release the GIL. Addresses are trusted: whoever builds an
`IoVec` keeps the memory behind it alive and checks what came from a peer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Final

import numpy as np

from kvconnect.paging import IoVec

#: The kernel takes at most this many pieces a call (UIO_MAXIOV).
MAX_PIECES: Final = 1024

_MSG_NOSIGNAL: Final = 0x4000
# Below this a copy is cheaper than giving up the GIL and fighting to get it back.
_KEEP_GIL_BYTES: Final = 64 << 10

_Byte = ctypes.c_char


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_sendmsg = _libc.sendmsg
_recvmsg = _libc.recvmsg
for _call in (_sendmsg, _recvmsg):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (ctypes.c_int, ctypes.POINTER(_MsgHdr), ctypes.c_int)
_recv = _libc.recv
_recv.restype = ctypes.c_ssize_t
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
for _call in (_readv, _writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip
_memmove = _libc.memmove
_memmove.restype = ctypes.c_void_p
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove_with_gil = ctypes.PyDLL(None).memmove
_memmove_with_gil.restype = ctypes.c_void_p
_memmove_with_gil.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def pieces(*spans: tuple[int, int]) -> IoVec:
    """Return the `IoVec` of ``(address, nbytes)`` pairs."""
    return np.array(spans, dtype=np.uint64).reshape(-1, 2)


def nbytes(iov: IoVec) -> int:
    """Return the length of the stream in bytes."""
    return int(iov[:, 1].sum())


def send(fd: int, iov: IoVec, flags: int = 0) -> int:
    """Send from the front of ``iov`` (at most `MAX_PIECES` pieces); return bytes sent.

    Raises:
        OSError: with the call's errno, `BlockingIOError` among them. Never SIGPIPE.

    """
    header = _MsgHdr(iov=_address(iov), iovlen=min(len(iov), MAX_PIECES))
    done: int = _sendmsg(fd, header, flags | _MSG_NOSIGNAL)
    if done < 0:
        _fail()
    return done


def recv(fd: int, iov: IoVec, flags: int = 0) -> int:
    """Receive to the front of ``iov`` (at most `MAX_PIECES` pieces); return bytes received.

    Zero is the peer's end of the stream, unless ``iov`` was empty.

    Raises:
        OSError: with the call's errno, `BlockingIOError` among them.

    """
    header = _MsgHdr(iov=_address(iov), iovlen=min(len(iov), MAX_PIECES))
    done: int = _recvmsg(fd, header, flags)
    if done < 0:
        _fail()
    return done


def recv_at(fd: int, address: int, count: int, flags: int = 0) -> int:
    """Receive up to ``count`` bytes to one piece of memory; as `recv`."""
    done: int = _recv(fd, address, count, flags)
    if done < 0:
        _fail()
    return done


def process_read(pid: int, local: IoVec, remote: IoVec) -> int:
    """Copy from the front of process ``pid``'s ``remote`` to the front of ``local``.

    Both sides are cut to `MAX_PIECES` pieces; the shorter stream limits the copy.

    Returns:
        Bytes copied, possibly fewer than asked for (an unmapped page ends the copy).

    Raises:
        OSError: nothing was copied (EPERM: not allowed, ESRCH: no such process, EFAULT: no such memory).

    """
    return _process_copy(_readv, pid, local, remote)


def process_write(pid: int, local: IoVec, remote: IoVec) -> int:
    """Copy from the front of ``local`` to process ``pid``'s ``remote``; as `process_read`."""
    return _process_copy(_writev, pid, local, remote)


def advance(iov: IoVec, done: int) -> IoVec:
    """Drop the first ``done`` bytes of the stream and return the rest.

    The result is a view: where a piece was cut, its entry in ``iov`` is changed in
    place, so ``iov`` itself is used up. The cost depends on what is dropped, not on
    what is left.
    """
    if not done:
        return iov
    while len(iov):
        ends = np.cumsum(iov[:MAX_PIECES, 1], dtype=np.uint64)
        # np.uint64, not int: numpy would convert the whole array to find a common type.
        whole = int(ends.searchsorted(np.uint64(done), side="right"))
        dropped = int(ends[whole - 1]) if whole else 0
        done -= dropped
        iov = iov[whole:]
        if whole < len(ends):
            if done:
                iov[0, 0] += np.uint64(done)
                iov[0, 1] -= np.uint64(done)
            return iov
    if done:
        raise ValueError(f"{done} more bytes than the stream has")
    return iov


def copy(dst: IoVec, src: IoVec) -> None:
    """Copy one stream to another of the same length, in this process.

    Raises:
        ValueError: the lengths differ; nothing was copied.

    """
    to, to_length = _starts(dst)
    of, of_length = _starts(src)
    if to_length != of_length:
        raise ValueError(f"cannot copy {of_length} bytes to {to_length}")
    if not to_length:
        return
    cuts = np.union1d(to, of)
    lengths = np.diff(cuts, append=np.uint64(to_length))
    for target, source, length in zip(
        _at(dst, to, cuts).tolist(), _at(src, of, cuts).tolist(), lengths.tolist(), strict=True
    ):
        (_memmove_with_gil if length <= _KEEP_GIL_BYTES else _memmove)(target, source, length)


def _starts(iov: IoVec) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint64]], int]:
    """Stream offset of each piece, and the stream's length."""
    ends = np.cumsum(iov[:, 1], dtype=np.uint64)
    return ends - iov[:, 1], int(ends[-1]) if len(ends) else 0


def _at(
    iov: IoVec,
    starts: np.ndarray[tuple[int], np.dtype[np.uint64]],
    offsets: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Addresses of stream offsets."""
    # side="right": of several pieces that start here, all but the last are empty.
    piece = np.searchsorted(starts, offsets, side="right") - 1
    address: np.ndarray[tuple[int], np.dtype[np.uint64]] = iov[piece, 0] + (offsets - starts[piece])
    return address


def _process_copy(call: Callable[..., int], pid: int, local: IoVec, remote: IoVec) -> int:
    done = call(pid, _address(local), min(len(local), MAX_PIECES), _address(remote), min(len(remote), MAX_PIECES), 0)
    if done < 0:
        _fail()
    return done


def _address(iov: IoVec) -> int:
    if iov.dtype != np.uint64 or not iov.flags.c_contiguous:
        raise ValueError("an IoVec is a contiguous uint64[n, 2] array")
    if not iov.size or not iov.flags.writeable:
        return int(iov.ctypes.data)
    # A third of the cost of `iov.ctypes`. `.data`: numpy's arrays are no `Buffer` to mypy.
    return ctypes.addressof(_Byte.from_buffer(iov.data))


def _fail() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
