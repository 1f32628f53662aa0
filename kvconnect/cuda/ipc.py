"""Memory of other processes, by CUDA IPC handles.

A handle names a whole allocation, not an address: regions carry their offset in it.
Opening costs up to 100 ms and the same allocation opens to the same address, so what
is open is counted and closed with its last user.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from kvconnect.cuda import driver
from kvconnect.errors import BrokenError, HandshakeError
from kvconnect.paging import PagedMemory

#: ``cudaIpcMemLazyEnablePeerAccess``
_LAZY = 1
_MAX_REGIONS = 1 << 12


def why_not(memory: PagedMemory) -> str | None:
    """Return why ``memory`` cannot be opened by other processes, or ``None`` if it can."""
    with driver.errors("look at the KV cache"), driver.use(driver.index(memory.device)):
        for base, nbytes in zip(memory.bases, memory.layout.region_bytes, strict=True):
            start, size = driver.allocation(int(base))
            if not driver.is_exportable(int(base)):
                return (
                    "its memory comes from expandable segments or a memory pool, which have no IPC handle; "
                    "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
                )
            if int(base) + nbytes > start + size:
                return "a region of it spans several allocations"
    return None


def export(memory: PagedMemory) -> dict[str, Any]:
    """Describe ``memory`` so that `Mapped` can open it in another process: msgpack-able.

    Raises:
        HandshakeError: it cannot be exported; says why and the cure.

    """
    reason = why_not(memory)
    if reason is not None:
        raise HandshakeError(f"the KV cache cannot be opened by another process: {reason}")
    return describe([int(base) for base in memory.bases], driver.index(memory.device))


def describe(addresses: Sequence[int], device: int) -> dict[str, Any]:
    """Return the handles of memory at ``addresses`` that can be exported: what `Mapped` reads."""
    module = driver.cupy()
    regions: list[list[Any]] = []
    with driver.errors("export memory"), driver.use(device):
        for address in addresses:
            start, _ = driver.allocation(address)
            regions.append([bytes(module.cuda.runtime.ipcGetMemHandle(start)), start, address - start])
    return {"process": _process(), "regions": regions}


@driver.per_process
def _process() -> str:
    """Name this process: a number would not do, containers count theirs alike."""
    return secrets.token_hex(8)


class Mapped:
    """A peer's memory, open in this process until `close`."""

    def __init__(self, exported: Mapping[str, Any], region_bytes: Sequence[int], device: int) -> None:
        """Open what `export` described, for use on ``device``.

        Raises:
            HandshakeError: the description is malformed or does not fit ``region_bytes``.
            BrokenError: CUDA cannot open it.

        """
        self._device = device
        self._handles: list[bytes] = []
        try:
            self.bases = [self._open(*region) for region in _checked(exported, len(region_bytes))]
            self._check_sizes(region_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it; no copy may be using it."""
        handles, self._handles = self._handles, []
        for handle in handles:
            _imports.release(self._device, handle)

    def _open(self, handle: bytes, address: int, offset: int, mine: bool) -> int:  # noqa: FBT001 - a row, spread
        if mine:
            _let_reach(self._device, address)
            return address + offset  # a process cannot open its own handles, and need not
        base = _imports.acquire(self._device, handle)
        self._handles.append(handle)
        return base + offset

    def _check_sizes(self, region_bytes: Sequence[int]) -> None:
        """Refuse regions that end beyond their allocation: offsets are the peer's word only."""
        with driver.use(self._device):
            for base, nbytes in zip(self.bases, region_bytes, strict=True):
                start, size = driver.allocation(base)
                if base < start or base + nbytes > start + size:
                    raise HandshakeError("a region of the peer's memory ends beyond its allocation")


def _checked(exported: Mapping[str, Any], count: int) -> list[tuple[bytes, int, int, bool]]:
    """Return ``(handle, address, offset, is ours)`` of each region."""
    regions = exported.get("regions")
    if not isinstance(regions, list) or len(regions) != count or count > _MAX_REGIONS:
        raise HandshakeError("the peer's memory handles do not fit its layout")
    mine = exported.get("process") == _process()
    found = []
    for region in regions:
        match region:
            case [bytes(handle), int(address), int(offset)] if len(handle) == 64 and address >= 0 <= offset:
                found.append((handle, address, offset, mine))
            case _:
                raise HandshakeError("a memory handle of the peer is malformed")
    return found


def _let_reach(device: int, address: int) -> None:
    """Let ``device`` use memory of this process that may be on another one; opening a handle does so by itself."""
    runtime = driver.cupy().cuda.runtime
    with driver.errors("reach memory of another device"), driver.use(device):
        owner = int(runtime.pointerGetAttributes(address).device)
        if owner == device:
            return
        try:
            runtime.deviceEnablePeerAccess(owner)
        except runtime.CUDARuntimeError as error:
            if "PeerAccessAlreadyEnabled" not in str(error):
                raise


class _Imports:
    """Open handles of this process, counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, bytes], list[int]] = {}

    def acquire(self, device: int, handle: bytes) -> int:
        with self._lock:
            found = self._open.get((device, handle))
            if found is None:
                found = self._open[device, handle] = [_open(device, handle), 0]
            found[1] += 1
            return found[0]

    def release(self, device: int, handle: bytes) -> None:
        with self._lock:
            found = self._open[device, handle]
            found[1] -= 1
            if found[1] == 0:
                del self._open[device, handle]
                module = driver.cupy()
                with driver.errors("close a peer's memory"), driver.use(device):
                    module.cuda.runtime.ipcCloseMemHandle(found[0])


def _open(device: int, handle: bytes) -> int:
    module = driver.cupy()
    try:
        with driver.errors("open the peer's memory"), driver.use(device):
            return int(module.cuda.runtime.ipcOpenMemHandle(handle, _LAZY))
    except BrokenError as error:
        raise BrokenError(f"{error}; the two GPUs must have peer access (nvidia-smi topo -p2p r)") from error


_imports = _Imports()
