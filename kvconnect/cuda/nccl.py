"""NCCL between two ranks, by ctypes: communicators that can be given up at any time.

CuPy has a binding, but its configuration offers neither ``blocking = 0`` nor a limit of
CTAs. Without the first, a peer that dies while a communicator is being made holds the
thread for ever; without the second, one communicator takes most of a gigabyte.
So every call here returns at once, and `Communicator.settled` tells when it took effect.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvconnect.cuda import driver
from kvconnect.errors import BrokenError, HandshakeError, UnavailableBackendError

log = logging.getLogger(__name__)

SONAME = "libnccl.so.2"
#: Bytes of what names a communicator to all its ranks.
ID_BYTES = 128
#: The first version with the configuration declared here.
MIN_VERSION = 21800
_CURE = "install a CUDA build of torch, or nvidia-nccl-cu13 (-cu12)"

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNDEFINED = -(1 << 31)
_MAGIC = 0xCAFEBEEF


class UniqueId(ctypes.Structure):
    """``ncclUniqueId``, passed by value."""

    _fields_ = (("internal", ctypes.c_char * ID_BYTES),)


class Config(ctypes.Structure):
    """``ncclConfig_t`` as of NCCL 2.18.

    Later versions append fields. They read as many bytes as ``size`` says, give what is
    missing its default, and take ``version`` to know which fields there are.
    """

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        # Padding then, a field in later versions.
        ("reserved", ctypes.c_int),
    )

    @classmethod
    def narrow(cls, max_ctas: int) -> Config:
        """Return a configuration that never blocks and uses at most ``max_ctas`` CTAs."""
        return cls(
            size=ctypes.sizeof(cls),
            magic=_MAGIC,
            version=MIN_VERSION,
            blocking=0,
            # Clusters would keep CTAs of a kernel waiting for neighbouring multiprocessors.
            cga_cluster_size=0,
            min_ctas=1,
            max_ctas=max_ctas,
            net_name=None,
            split_share=_UNDEFINED,
            reserved=_UNDEFINED,
        )


def missing() -> tuple[str, str] | None:
    """Return why there is no NCCL here and the cure, or ``None``. Makes no CUDA context."""
    lacking = driver.missing()
    if lacking is not None:
        return lacking
    try:
        _library()
    except UnavailableBackendError as error:
        return error.reason, error.cure
    return None


def version() -> int:
    """Return NCCL's version, 22809 for 2.28.9.

    Raises:
        UnavailableBackendError: there is no NCCL, or it is too old.

    """
    return _library().version


def unique_id() -> bytes:
    """Make the name of a new communicator, for both ranks to use once.

    Raises:
        BrokenError: NCCL has no network interface to meet over, say.

    """
    made = UniqueId()
    _check(_library().calls.ncclGetUniqueId(ctypes.byref(made)), "name a communicator")
    return ctypes.string_at(ctypes.addressof(made), ID_BYTES)


class Communicator:
    """One of two ranks, on the device that is current. For one thread at a time, but for `abort`.

    Nothing may be called but `settled` and `abort` until the call before has settled.
    """

    def __init__(self, name: bytes, rank: int, max_ctas: int) -> None:
        """Start to meet the other rank; `settled` tells when it has come.

        Args:
            name: from `unique_id`, the same for both.
            rank: 0 or 1.
            max_ctas: the most CTAs, and so multiprocessors, that a send or receive occupies.

        Raises:
            HandshakeError: ``name`` is none.
            BrokenError: NCCL failed.

        """
        if len(name) != ID_BYTES:
            raise HandshakeError(f"the name of a communicator has {ID_BYTES} bytes, not {len(name)}")
        self._nccl = _library()
        self._peer = 1 - rank
        self._comm = ctypes.c_void_p()
        config = Config.narrow(max_ctas)
        named = UniqueId.from_buffer_copy(name)
        code = self._nccl.calls.ncclCommInitRankConfig(ctypes.byref(self._comm), 2, named, rank, ctypes.byref(config))
        log.debug("rank %d: communicator %#x begun, code %d", rank, self._comm.value or 0, code)
        self._started(code, "make a communicator")

    def settled(self) -> bool:
        """Whether the last call has taken effect: the ranks have met, or the copy is in its stream.

        Raises:
            BrokenError: it failed, or something went wrong since.

        """
        if self._comm.value is None:
            raise BrokenError("the communicator was given up")
        state = ctypes.c_int()
        code = self._nccl.quick.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
        self._check(code, "look after a communicator")
        if state.value == _IN_PROGRESS:
            return False
        self._check(state.value, "go on")
        return True

    def send(self, address: int, nbytes: int, stream: int) -> None:
        """Begin to enqueue on ``stream`` (``cudaStream_t``): send ``nbytes`` at ``address`` to the other rank."""
        code = self._nccl.quick.ncclSend(address, nbytes, _UINT8, self._peer, self._comm, stream)
        self._started(code, "send")

    def recv(self, address: int, nbytes: int, stream: int) -> None:
        """Begin to enqueue on ``stream``: receive ``nbytes`` to ``address`` from the other rank."""
        code = self._nccl.quick.ncclRecv(address, nbytes, _UINT8, self._peer, self._comm, stream)
        self._started(code, "receive")

    def abort(self) -> None:
        """End it, and with it whatever waits for the other rank on the device. May take half a second. Idempotent."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm.value is not None:
            code = self._nccl.calls.ncclCommAbort(comm)
            log.debug("communicator %#x aborted, code %d", comm.value or 0, code)

    def _started(self, code: int, doing: str) -> None:
        if code != _IN_PROGRESS:
            self._check(code, doing)

    def _check(self, code: int, doing: str) -> None:
        if code != _SUCCESS:
            _check(code, doing, self._comm)


def _check(code: int, doing: str, comm: ctypes.c_void_p | None = None) -> None:
    if code == _SUCCESS:
        return
    nccl = _library().calls
    text = (nccl.ncclGetErrorString(code) or b"").decode(errors="replace")
    last = (nccl.ncclGetLastError(comm) or b"").decode(errors="replace").strip()
    raise BrokenError(f"NCCL failed to {doing}: {text} (error {code}{'; ' + last if last else ''})")


@dataclass(frozen=True)
class _Library:
    """NCCL's functions, declared.

    Args:
        calls: let other threads of the interpreter run meanwhile.
        quick: do not; for what takes microseconds, since getting the interpreter back beside a
            busy engine takes milliseconds.
        version: as `version`.

    """

    calls: ctypes.CDLL
    quick: ctypes.CDLL
    version: int


@functools.cache
def _library() -> _Library:
    calls, quick = _declared(_open(ctypes.CDLL)), _declared(_open(ctypes.PyDLL))
    found = ctypes.c_int()
    code = calls.ncclGetVersion(ctypes.byref(found))
    if code != _SUCCESS or found.value < MIN_VERSION:
        raise UnavailableBackendError("library", SONAME, f"version {found.value} is older than {MIN_VERSION}", _CURE)
    log.debug("NCCL %d from %s", found.value, calls._name)  # noqa: SLF001 - ctypes shows it nowhere else
    return _Library(calls, quick, found.value)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures: dict[str, list[Any]] = {
        "ncclGetVersion": [pointer],
        "ncclGetUniqueId": [pointer],
        "ncclCommInitRankConfig": [pointer, number, UniqueId, number, pointer],
        "ncclCommGetAsyncError": [pointer, pointer],
        "ncclCommAbort": [pointer],
        "ncclSend": [pointer, size, number, number, pointer, pointer],
        "ncclRecv": [pointer, size, number, number, pointer, pointer],
        "ncclGetErrorString": [number],
        "ncclGetLastError": [pointer],
    }
    for name, argtypes in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise UnavailableBackendError("library", SONAME, f"it is too old: {error}", _CURE) from error
        function.argtypes = argtypes
        function.restype = ctypes.c_char_p if name in {"ncclGetErrorString", "ncclGetLastError"} else number
    return library


def _open(kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    """Open the NCCL that this process has already (torch's); else the one installed beside it; else the system's.

    Two of them in one process would be two sets of threads and buffers, and the wheels are the newer ones.
    """
    tries: list[tuple[str, int]] = [(SONAME, os.RTLD_NOLOAD | os.RTLD_NOW)]
    tries += [(str(path), os.RTLD_NOW) for path in _installed()]
    tries.append((SONAME, os.RTLD_NOW))
    reason: OSError | None = None
    for name, mode in tries:
        try:
            return kind(name, mode=mode)
        except OSError as error:
            reason = error
    raise UnavailableBackendError("library", SONAME, f"NCCL is not installed: {reason}", _CURE) from reason


def _installed() -> list[Path]:
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ImportError:
        return []
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return [path for place in places if (path := Path(place) / "lib" / SONAME).exists()]
