"""CUDA IPC between processes of one host: one kernel from the peer's memory into ours, pool to pool.

Two parts: paged blocks (`kvconnect.pipes.cuda_ipc_blocks`), which need nothing of the
peer but the handles of its memory, once; and tensors (`kvconnect.pipes.staged`) by way
of staging memory. Host pipes beside them tell of the peer's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvconnect.config import Backend, parse_options
from kvconnect.cuda import driver, ipc
from kvconnect.cuda.copier import copier
from kvconnect.errors import ConfigError, HandshakeError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes import companion, host
from kvconnect.pipes.base import YES, Channel, Message, PipeSpec, Reach, Traits, Verdict
from kvconnect.pipes.cuda_ipc_blocks import CudaIpcBlocks
from kvconnect.pipes.cuda_ipc_staging import CudaIpcMedium
from kvconnect.pipes.peer_process import PeerProcess
from kvconnect.pipes.staged import StagedTensors
from kvconnect.pipes.two_paths import TwoPathPipe


@dataclass(frozen=True)
class CudaIpcOptions:
    """Options of this pipe.

    Args:
        multiprocessors: the most that one copy may occupy; by default 16 between two GPUs, whose
            link they saturate, and all of them within one.
        companion: the host pipe beside it, ``"shm"``, ``"tcp"`` or ``"auto"``.

    """

    multiprocessors: int | None = None
    companion: Backend = Backend("auto")


class CudaIpcPipe(TwoPathPipe):
    """One end of a pipe between two processes of a host, over CUDA memory."""

    name: ClassVar[str] = "cuda_ipc"
    traits: ClassVar[Traits] = Traits(frozenset({"cuda"}), Reach.HOST, one_sided=True, zero_copy=True, immediate=True)

    def __init__(self, spec: PipeSpec) -> None:
        """Meet the other end.

        Raises:
            ConfigError: a wrong option, or ``spec.device`` is no CUDA device.
            HandshakeError: the other end is not such a pipe.

        """
        self._options = _options(spec)
        self._device = driver.index(spec.device)
        mine = {"uuid": driver.uuid(self._device), **PeerProcess.card()}
        joined = companion.join(spec, mine, self._options.companion)
        try:
            self._peer_uuid = _text(joined.theirs, "uuid")
            self._peer = PeerProcess(joined.theirs)
        except BaseException:
            joined.abort()
            raise
        tensors = StagedTensors(joined, CudaIpcMedium(self._device), timeout_s=spec.timeout_s)
        super().__init__(tensors, spec.timeout_s)

    # -- placing --------------------------------------------------------------------

    @classmethod
    def availability(cls) -> Verdict:
        """Say whether there are a GPU and CuPy."""
        missing = driver.missing()
        return YES if missing is None else Verdict(False, *missing)

    @classmethod
    def descriptor(cls, device: str) -> dict[str, Any]:
        """Describe this process and its device, by UUID: indices differ between processes."""
        return {**host.identity(), "uuid": driver.uuid(driver.index(device))}

    @classmethod
    def can_reach(cls, local: Message, remote: Message) -> Verdict:
        """Say whether both ends are on one host and see each other's handles."""
        near = host.within(cls.traits.reach, local, remote)
        if near and local.get("ipcns") != remote.get("ipcns"):
            return Verdict(False, "the peers are in different IPC namespaces", "share the host's (hostIPC, --ipc=host)")
        return near

    @classmethod
    def accepts(cls, memory: PagedMemory) -> Verdict:
        """Say whether other processes can open ``memory``."""
        reason = ipc.why_not(memory)
        if reason is None:
            copier(driver.index(memory.device))  # the kernels are compiled now rather than under the first request
        return YES if reason is None else Verdict(False, reason, "")

    # -- blocks -------------------------------------------------------------------------

    def make_blocks(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> CudaIpcBlocks:
        """See `TwoPathPipe.make_blocks`."""
        if driver.index(local.device) != self._device:
            raise HandshakeError(f"the memory is on {local.device}, this pipe was opened for cuda:{self._device}")
        most = self._options.multiprocessors
        return CudaIpcBlocks(local, remote, channel, most, peer_uuid=self._peer_uuid, peer=self._peer)

    def let_go(self) -> None:
        """See `TwoPathPipe.let_go`."""
        self._peer.close()


def _options(spec: PipeSpec) -> CudaIpcOptions:
    options = parse_options(CudaIpcOptions, spec.options, "pipe")
    if options.multiprocessors is not None and options.multiprocessors < 1:
        raise ConfigError(f"pipe.multiprocessors is {options.multiprocessors}; it must be at least 1")
    return options


def _text(message: Mapping[str, Any], field: str) -> str:
    value = message.get(field)
    if not isinstance(value, str):
        raise HandshakeError(f"the other end's message has no {field!r}")
    return value
