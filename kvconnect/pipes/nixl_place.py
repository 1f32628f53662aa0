"""Memory in NIXL's words, and how a peer is told where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvconnect.errors import BrokenError
from kvconnect.paging import IoVec


@dataclass(frozen=True)
class Place:
    """A kind of memory as NIXL names it."""

    kind: str
    device: int

    @classmethod
    def of(cls, device: str) -> Place:
        """Read a device such as ``"cpu"`` or ``"cuda:1"``."""
        name, _, number = device.partition(":")
        return cls("DRAM", 0) if name == "cpu" else cls("VRAM", int(number or 0))

    def enter(self) -> None:
        """Make a CUDA device the calling thread's: UCX takes its memory and its context for granted."""
        if self.kind == "VRAM":
            torch.cuda.set_device(self.device)

    def rows(self, iov: IoVec) -> npt.NDArray[np.uint64]:
        """Return pieces as NIXL's rows of address, length and device."""
        rows = np.empty((len(iov), 3), dtype=np.uint64)
        rows[:, :2] = iov
        rows[:, 2] = self.device
        return rows


@dataclass(eq=False)
class Registration:
    """Memory that NIXL knows. ``metadata`` tells peers how to reach it; shared by all who registered it."""

    key: tuple[Any, ...]
    descriptors: Any
    metadata: bytes
    owner: object
    users: int = 0


def card(agent: str, place: Place, registration: Registration) -> dict[str, Any]:
    """Return what a peer needs to reach registered memory of the agent of this name."""
    return {"agent": agent, "metadata": registration.metadata, "kind": place.kind, "device": place.device}


def read_card(body: Mapping[str, Any]) -> tuple[str, bytes, Place]:
    """Read `card` from a peer: its agent's name, the metadata and the kind of memory; raise `BrokenError`."""
    name, metadata = body.get("agent"), body.get("metadata")
    kind, device = body.get("kind"), body.get("device")
    if not isinstance(name, str) or not isinstance(metadata, bytes) or kind not in ("DRAM", "VRAM"):
        raise BrokenError("the peer did not say how its memory is reached")
    if not isinstance(device, int) or isinstance(device, bool) or not 0 <= device < 1 << 16:
        raise BrokenError(f"the peer's memory is on device {device!r}")
    return name, metadata, Place(kind, device)
