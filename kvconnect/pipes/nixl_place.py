"""Memory in NIXL's words, and how a peer is told where it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    #: No other one of this agent had it, or will.
    number: int
    descriptors: Any
    metadata: bytes
    owner: object
    users: int = 0


@dataclass(frozen=True)
class Card:
    """What a peer tells of memory of its own.

    Args:
        agent: name of its agent.
        metadata: how NIXL reaches the memory.
        place: what kind of memory it is.
        number: of this registration.
        valid: numbers of all registrations that its agent had at that time; they only grow.

    """

    agent: str
    metadata: bytes
    place: Place
    number: int
    valid: frozenset[int]

    def denies(self, number: int) -> bool:
        """Whether the registration of that number was over; of later ones this card knows nothing."""
        return number not in self.valid and number < max(self.valid)


def card(agent: str, place: Place, registration: Registration, valid: Iterable[int]) -> dict[str, Any]:
    """Return what a peer needs to reach registered memory of the agent of this name: a `Card`."""
    told = {"metadata": registration.metadata, "number": registration.number, "valid": sorted(valid)}
    return {"agent": agent, "kind": place.kind, "device": place.device, **told}


def read_card(body: Mapping[str, Any]) -> Card:
    """Read `card` from a peer; raise `BrokenError`."""
    name, metadata = body.get("agent"), body.get("metadata")
    kind, device = body.get("kind"), body.get("device")
    number: Any = body.get("number")
    valid = body.get("valid")
    if not isinstance(name, str) or not isinstance(metadata, bytes) or kind not in ("DRAM", "VRAM"):
        raise BrokenError("the peer did not say how its memory is reached")
    if not isinstance(device, int) or isinstance(device, bool) or not 0 <= device < 1 << 16:
        raise BrokenError(f"the peer's memory is on device {device!r}")
    if not isinstance(valid, list) or not all(type(one) is int for one in (number, *valid)) or number not in valid:
        raise BrokenError("the peer did not say which registrations of its memory are valid")
    return Card(name, metadata, Place(kind, device), number, frozenset(valid))
