"""CuPy and the CUDA driver: the only module that imports either, and that maps their errors.

Nothing here makes a CUDA context unless asked to use a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kvconnect.errors import BrokenError, ConfigError, UnavailableBackendError

P = ParamSpec("P")
T = TypeVar("T")

#: Of the driver's ``CU_POINTER_ATTRIBUTE_…``.
_LEGACY_IPC_CAPABLE, _RANGE_START, _RANGE_SIZE = 10, 11, 12
_INSTALL = "pip install 'kvconnect[cuda13]' (or [cuda12], to match torch.version.cuda)"


def per_process(make: Callable[P, T]) -> Callable[P, T]:
    """Make something once (for each device), and anew in a process that was forked: CUDA does not survive a fork."""
    made = functools.cache(lambda _, *args, **kwargs: make(*args, **kwargs))
    return functools.wraps(make)(lambda *args, **kwargs: made(os.getpid(), *args, **kwargs))


def missing() -> tuple[str, str] | None:
    """Return why CUDA pipes cannot run here and the cure; ``None`` if nothing is known to be missing.

    Looks at device files and packages only: ``cuInit`` in a process that forks later
    would break its children.
    """
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "there is no NVIDIA GPU here", "run it on a host with one, or use pipe 'shm' or 'tcp'"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed", _INSTALL
    return None


@functools.cache
def cupy() -> Any:
    """Return the module ``cupy``.

    Raises:
        UnavailableBackendError: it is not installed or does not load.

    """
    try:
        import cupy  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnavailableBackendError("package", "cupy", str(error), _INSTALL) from error
    return cupy


@contextlib.contextmanager
def errors(doing: str) -> Iterator[None]:
    """Map CUDA's errors to `BrokenError`."""
    module = cupy()
    try:
        yield
    except (module.cuda.runtime.CUDARuntimeError, module.cuda.driver.CUDADriverError) as error:
        raise BrokenError(f"CUDA failed to {doing}: {error}") from error


@contextlib.contextmanager
def use(device: int) -> Iterator[None]:
    """Make ``device`` this thread's current one, for a while, with a context even if the thread is new."""
    module = cupy()
    with module.cuda.Device(device):
        module.cuda.runtime.setDevice(device)  # the guard does nothing if the number is the same
        yield


def index(device: str) -> int:
    """Return the index of ``"cuda:N"``, as this process counts its devices.

    Raises:
        ConfigError: it is no CUDA device.

    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ConfigError(f"device {device!r} is not a CUDA device such as 'cuda:0'")
    return int(number or 0)


def uuid(device: int) -> str:
    """Return a device's UUID in hex: the same in every process, whatever it may see."""
    with errors("name the device"):
        raw = cupy().cuda.runtime.getDeviceProperties(device)["uuid"]
    return bytes(raw).hex()


@functools.cache
def _libcuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnavailableBackendError("library", "libcuda.so.1", str(error), "install NVIDIA's driver") from error


def allocation(address: int) -> tuple[int, int]:
    """Return base address and bytes of the allocation that ``address`` lies in, on whichever device.

    Raises:
        BrokenError: it is not device memory that this process has or has mapped.

    """
    base, size = _attribute(address, _RANGE_START), _attribute(address, _RANGE_SIZE)
    if base is None or size is None:
        raise BrokenError(f"CUDA does not know the memory at {address:#x}")
    return base, size


def is_exportable(address: int) -> bool:
    """Whether the memory at ``address`` can be opened by other processes (``cudaMalloc``, not a pool)."""
    return bool(_attribute(address, _LEGACY_IPC_CAPABLE))


def _attribute(address: int, which: int) -> int | None:
    """Ask the driver about a pointer; needs no context, unlike ``cuMemGetAddressRange``."""
    answer = ctypes.c_uint64()
    code = _libcuda().cuPointerGetAttribute(ctypes.byref(answer), which, ctypes.c_uint64(address))
    return answer.value if code == 0 else None
