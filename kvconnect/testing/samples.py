"""Messages to test pipes with, and how to tell that they arrived."""

from __future__ import annotations

import torch
from torch import Tensor


def fidelity_samples(device: str = "cpu") -> list[Tensor]:
    """Return tensors on ``device``: every dtype and every awkward shape and stride that a pipe carries."""
    dtypes = (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint16, torch.uint32, torch.uint64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    )  # fmt: skip
    raw = torch.randint(0, 2, (96,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)
    samples = [raw.view(torch.bool) if dtype is torch.bool else raw.view(dtype) for dtype in dtypes]
    base = torch.arange(24, dtype=torch.float32, device=device).reshape(2, 3, 4)
    samples += [
        torch.tensor(1.5, device=device),
        torch.tensor(True, device=device),
        torch.empty(0, device=device),
        torch.empty(3, 0, 2, dtype=torch.bfloat16, device=device),
        base.permute(2, 0, 1),
        base[:, ::2, 1:3],
        torch.ones(1, 4, device=device).expand(3, 4),
        base[0, 1:],
        torch.ones(3, requires_grad=True, device=device),
        torch.ones(1, 1, 1, 1, 1, 1, 1, 2, device=device),
        torch.randn(3, 3, dtype=torch.complex64, device=device).conj(),
        torch.tensor([float("nan"), float("inf"), -0.0], device=device),
        torch.arange(300_000, dtype=torch.int64, device=device),
    ]
    return samples


def same(expected: Tensor | None, got: Tensor | None) -> None:
    """Raise `AssertionError` unless ``got`` is the message ``expected``: shape, dtype and every bit, on any device."""
    if expected is None or got is None:
        assert expected is got, f"sent {describe(expected)}, received {describe(got)}"
        return
    assert describe(expected) == describe(got), f"sent {describe(expected)}, received {describe(got)}"
    assert _bytes(expected).equal(_bytes(got)), f"values of {describe(expected)} changed"


def describe(tensor: Tensor | None) -> str:
    """Return shape and dtype."""
    return "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous().cpu().reshape(-1).view(torch.uint8)
