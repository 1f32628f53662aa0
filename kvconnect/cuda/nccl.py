"""NCCL between two ranks, by ctypes: communicators that can be given up at any time.

CuPy has a binding, but its configuration offers neither ``blocking = 0`` nor a limit of
CTAs. Without the first, a peer that dies while a communicator is being made holds the
thread for ever; without the second, one communicator takes most of a gigabyte.

A communicator that does not block has a price: NCCL starts a thread for each of its
calls. So the ranks meet over one that does not, and connect over it; then it is split
into one that blocks and shares its connections. A send on that is a few microseconds
of the caller's own thread, for nothing is left to wait for. The parent stays as long: ending it would
free memory, which waits for what runs on the device, while that may wait for the other rank.

What one costs in GPU memory, by NCCL 2.28's sources and as measured on H200: each of its
allocations takes 2 MiB at least, and it has three for each CTA that it is allowed and two for the
child, one more at the sending end and a buffer of 10 MiB at the receiving one. So 12.6 and 21
MB for each CTA. A message of up to 16 MiB for each CTA that takes part is moved by half of the CTAs.
"""

from __future__ import annotations

import ctypes
import enum
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
#: What the ranks try the wire with.
TRIAL_BYTES = 16
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
    def narrow(cls, max_ctas: int, *, blocking: bool) -> Config:
        """Return a configuration of at most ``max_ctas`` CTAs, whose connections and end are its children's, too."""
        return cls(
            size=ctypes.sizeof(cls),
            magic=_MAGIC,
            version=MIN_VERSION,
            blocking=int(blocking),
            # Clusters would keep CTAs of a kernel waiting for neighbouring multiprocessors.
            cga_cluster_size=0,
            min_ctas=1,
            max_ctas=max_ctas,
            net_name=None,
            split_share=1,
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


class _Stage(enum.Enum):
    """What is being waited for."""

    MEETING = "the other rank"
    TRYING = "the connections"
    SPLITTING = "the communicator that blocks"
    READY = "nothing"


class Communicator:
    """From one rank to another, on the device that is current. For one thread at a time.

    Nothing may be called but `settled` and `abort` before it has settled.
    """

    def __init__(self, name: bytes, *, sends: bool, max_ctas: int, address: int, stream: int) -> None:
        """Start to meet the other rank; `settled` tells when it has come.

        Args:
            name: from `unique_id`, the same for both.
            sends: whether this rank is the one that sends; the other one receives.
            max_ctas: the most CTAs, and so multiprocessors, that a send or receive occupies.
            address: `TRIAL_BYTES` on the device, which the trial reads or writes; free once settled, in
                the order of ``stream``.
            stream: a ``cudaStream_t`` for it.

        Raises:
            HandshakeError: ``name`` is none.
            BrokenError: NCCL failed.

        """
        if len(name) != ID_BYTES:
            raise HandshakeError(f"the name of a communicator has {ID_BYTES} bytes, not {len(name)}")
        self._nccl = _library()
        self._sends, self._rank, self._max_ctas = sends, int(sends), max_ctas
        self._trial = address, stream
        # The one that does not block, and its child; NCCL's own threads write the latter.
        self._comm, self._direct = ctypes.c_void_p(), ctypes.c_void_p()
        self._stage = _Stage.MEETING
        config = Config.narrow(max_ctas, blocking=False)
        named = UniqueId.from_buffer_copy(name)
        init = self._nccl.calls.ncclCommInitRankConfig
        code = init(ctypes.byref(self._comm), 2, named, self._rank, ctypes.byref(config))
        log.debug("rank %d: communicator %#x begun, code %d", self._rank, self._comm.value or 0, code)
        self._started(code, "make a communicator")

    def settled(self) -> bool:
        """Whether the ranks have met and are connected: `move` may be called. Goes on with that, if not.

        Raises:
            BrokenError: it failed, or something went wrong since.

        """
        if self._comm.value is None:
            raise BrokenError("the communicator was given up")
        if self._stage is _Stage.READY:
            return self._look(self._direct)
        if not self._look(self._comm):
            return False
        if self._stage is _Stage.MEETING:
            self._stage = _Stage.TRYING
            # What connects would block, were it left to the first call that means it.
            self._started(self._enqueue(self._comm, self._trial[0], TRIAL_BYTES, self._trial[1]), "connect")
        elif self._stage is _Stage.TRYING:
            self._stage = _Stage.SPLITTING
            config = Config.narrow(self._max_ctas, blocking=True)
            split = self._nccl.calls.ncclCommSplit
            code = split(self._comm, 0, self._rank, ctypes.byref(self._direct), ctypes.byref(config))
            self._started(code, "split a communicator")
        else:
            if self._direct.value is None:
                raise BrokenError("NCCL made no communicator of a split")
            log.debug("rank %d: communicator %#x ready", self._rank, self._direct.value)
            self._stage = _Stage.READY
            return True
        return False

    def move(self, address: int, nbytes: int, stream: int) -> None:
        """Enqueue on ``stream`` (``cudaStream_t``): send ``nbytes`` at ``address``, or receive them there."""
        if self._stage is not _Stage.READY:
            raise BrokenError(f"the communicator still waits for {self._stage.value}")
        code = self._enqueue(self._direct, address, nbytes, stream)
        _check(code, "send" if self._sends else "receive", self._direct)

    def abort(self) -> None:
        """End it, and with it whatever waits for the other rank on the device. May take half a second. Idempotent."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm.value is not None:
            self._end(self._direct)
            self._end(comm)
            # It may have come while its parent's end waited for what made it.
            self._end(self._direct)

    def _end(self, comm: ctypes.c_void_p) -> None:
        if comm.value is not None:
            ended, comm.value = ctypes.c_void_p(comm.value), None
            code = self._nccl.calls.ncclCommAbort(ended)
            log.debug("communicator %#x aborted, code %d", ended.value or 0, code)

    def _enqueue(self, comm: ctypes.c_void_p, address: int, nbytes: int, stream: int) -> int:
        call = self._nccl.quick.ncclSend if self._sends else self._nccl.quick.ncclRecv
        return int(call(address, nbytes, _UINT8, 1 - self._rank, comm, stream))

    def _look(self, comm: ctypes.c_void_p) -> bool:
        state = ctypes.c_int()
        _check(self._nccl.quick.ncclCommGetAsyncError(comm, ctypes.byref(state)), "look after a communicator", comm)
        if state.value == _IN_PROGRESS:
            return False
        _check(state.value, "go on", comm)
        return True

    def _started(self, code: int, doing: str) -> None:
        if code != _IN_PROGRESS:
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
        "ncclCommSplit": [pointer, number, number, pointer, pointer],
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
