"""NCCL between GPUs, also of different hosts: blocks by send and receive, gathered and scattered beside them.

Two parts: paged blocks (`kvconnect.pipes.nccl_blocks`), in which both ends take part; and
tensors (`kvconnect.pipes.nccl_tensors`), by way of the hosts. No process group is
needed: any two ends make communicators of their own, when they have something to move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvconnect.config import Backend, parse_options
from kvconnect.cuda import driver, nccl
from kvconnect.cuda.copier import copier
from kvconnect.errors import ConfigError, HandshakeError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes import companion, host, nccl_loop
from kvconnect.pipes.base import YES, Channel, Message, PipeSpec, Reach, Traits, Verdict
from kvconnect.pipes.nccl_blocks import NcclBlocks
from kvconnect.pipes.nccl_lines import Wire
from kvconnect.pipes.nccl_tensors import HostTensors
from kvconnect.pipes.nccl_wire import RecvWire, SendWire, Setting
from kvconnect.pipes.two_paths import TwoPathPipe


@dataclass(frozen=True)
class NcclOptions:
    """Options of this pipe.

    Args:
        max_ctas: the most CTAs that a send or receive may occupy, of a multiprocessor each. NCCL
            counts in powers of two, takes half as many for chunks of up to 16 MiB each, and
            buffers for all: on H200 21 MB at the receiving and 12.6 MB at the sending end for
            each, per direction that is used. Chunks of 28 MB are sent there at 134 GB/s with 8,
            at 253 with 16, at 295 with 32.
        multiprocessors: the most that a gather or scatter occupies beside it, shortly: with 16
            it takes half as long as the wire does, with 32 a quarter.
        slot_bytes: the largest chunk. Each direction that is used has two such slots on each
            GPU; they are larger where a block is. The smaller of two ends' counts. An operation
            of NCCL's takes 8 µs and its bytes' time.
        companion: the host pipe beside it, ``"shm"``, ``"tcp"`` or ``"auto"``.

    """

    max_ctas: int = 16
    multiprocessors: int = 32
    slot_bytes: int = 28 << 20
    companion: Backend = Backend("auto")

    def __post_init__(self) -> None:
        """Check ranges; raise `ConfigError`."""
        for name, least in (("max_ctas", 1), ("multiprocessors", 1), ("slot_bytes", 1 << 20)):
            if getattr(self, name) < least:
                raise ConfigError(f"pipe.{name} is {getattr(self, name)}; it must be at least {least}")
        # NCCL takes no more.
        if self.max_ctas > 64:
            raise ConfigError(f"pipe.max_ctas is {self.max_ctas}; it must be at most 64")


class NcclPipe(TwoPathPipe):
    """One end of a pipe between two GPUs."""

    name: ClassVar[str] = "nccl"
    traits: ClassVar[Traits] = Traits(frozenset({"cuda"}), Reach.NETWORK, immediate=True)

    def __init__(self, spec: PipeSpec) -> None:
        """Meet the other end.

        Raises:
            ConfigError: a wrong option, or ``spec.device`` is no CUDA device.
            HandshakeError: the other end is not such a pipe, or has the same GPU.

        """
        self._options = parse_options(NcclOptions, spec.options, "pipe")
        self._device = driver.index(spec.device)
        mine = _card(self._device)
        joined = companion.join(spec, mine, self._options.companion)
        verdict = _fit(mine, joined.theirs)
        if not verdict:
            joined.abort()
            raise HandshakeError(f"{verdict.reason}; {verdict.cure}")
        super().__init__(HostTensors(joined, f"cuda:{self._device}"), spec.timeout_s)

    # -- placing --------------------------------------------------------------------

    @classmethod
    def availability(cls) -> Verdict:
        """Say whether there are a GPU, CuPy and NCCL."""
        missing = nccl.missing()
        return YES if missing is None else Verdict(False, *missing)

    @classmethod
    def descriptor(cls, device: str) -> dict[str, Any]:
        """Describe this process, its device by UUID, and its NCCL."""
        return {**host.identity(), **_card(driver.index(device))}

    @classmethod
    def can_reach(cls, local: Message, remote: Message) -> Verdict:
        """Say whether NCCL joins the two devices: they are two, and NCCL is the same."""
        return _fit(local, remote)

    @classmethod
    def accepts(cls, memory: PagedMemory) -> Verdict:
        """Take any; the kernels are compiled now rather than under the first request."""
        copier(driver.index(memory.device))
        return YES

    # -- blocks -------------------------------------------------------------------------

    def make_blocks(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> NcclBlocks:
        """See `TwoPathPipe.make_blocks`."""
        if driver.index(local.device) != self._device:
            raise HandshakeError(f"the memory is on {local.device}, this pipe was opened for cuda:{self._device}")
        wires = _NcclWires(self._device, local, self._options)
        size = self._options.slot_bytes
        return NcclBlocks(local, remote, channel, wires, slot_bytes=size, timeout_s=self.timeout_s)


class _NcclWires:
    """Makes the wires of one end (`kvconnect.pipes.nccl_blocks.Wires`)."""

    def __init__(self, device: int, memory: PagedMemory, options: NcclOptions) -> None:
        self._device, self._memory, self._options = device, memory, options
        self.loop, self.meetings = nccl_loop.loop(device), nccl_loop.meetings(device)

    def name(self) -> bytes:
        """Return the name of a new communicator."""
        nccl_loop.bind(self._device)
        return nccl.unique_id()

    def make(self, name: bytes, slot_bytes: int, *, receives: bool) -> Wire:
        """Return this end's wire."""
        nccl_loop.bind(self._device)
        options = self._options
        setting = Setting(
            self._device, self._memory, slot_bytes, options.max_ctas, options.multiprocessors, self.meetings
        )
        return (RecvWire if receives else SendWire)(setting, name)


def _card(device: int) -> dict[str, Any]:
    return {"uuid": driver.uuid(device), "nccl": nccl.version()}


def _fit(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Verdict:
    """Say whether two ends' cards fit."""
    for card in (ours, theirs):
        if not isinstance(card.get("uuid"), str) or not isinstance(card.get("nccl"), int):
            return Verdict(False, "NCCL joins GPUs, and an end has none", "use pipe 'tcp' or 'shm' for memory of hosts")
    if ours["uuid"] == theirs["uuid"]:
        return Verdict(
            False,
            "both ends are on one GPU, which NCCL refuses",
            "use pipe 'cuda_ipc', or give the two engines GPUs of their own",
        )
    # Patches of one release speak with each other; releases are not said to.
    if ours["nccl"] // 100 != theirs["nccl"] // 100:
        return Verdict(
            False,
            f"the ends have NCCL {ours['nccl']} and {theirs['nccl']}",
            "install the same release at both (it comes with torch)",
        )
    return YES
