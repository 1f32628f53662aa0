"""Where a test's tensors and paged memory lie: on the CPU or on a CUDA device, and the streams used there."""

from __future__ import annotations

import ctypes
import functools
from contextlib import AbstractContextManager, nullcontext

import torch

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, nor that one for it


def is_cuda(device: str) -> bool:
    """Say whether ``device`` is a CUDA device."""
    return torch.device(device).type == "cuda"


def complete(device: str) -> None:
    """Wait until ``device`` has done all that it was given so far (the CPU always has)."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def fitting(device: str, nbytes: int) -> int:
    """Return ``nbytes``, or less (whole MiB) where ``device`` has no room for six times as much."""
    if not is_cuda(device):
        return nbytes
    free, _ = torch.cuda.mem_get_info(device)
    return min(nbytes, free // 6 >> 20 << 20)


@functools.lru_cache(maxsize=64)
def own_stream(device: str, number: int) -> torch.cuda.Stream:
    """Return a stream of ``device`` that no pipe has: torch's own 32 are handed out in turn, to all who ask.

    Raises:
        RuntimeError: CUDA refused.

    """
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context this thread's
        handle = ctypes.c_void_p()
        code = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING)
        if code != 0 or handle.value is None:
            raise RuntimeError(f"cuStreamCreate on {device} failed with CUresult {code} (stream {number})")
    return torch.cuda.ExternalStream(handle.value, device)  # type: ignore[no-untyped-call]


def on_stream(device: str, number: int) -> AbstractContextManager[object]:
    """Make `own_stream` this thread's current one for a while; nothing on the CPU."""
    return torch.cuda.stream(own_stream(device, number)) if is_cuda(device) else nullcontext()
