"""NCCL between GPUs, also of different hosts: blocks by send and receive, gathered and scattered beside them.

Two parts: paged blocks (`kvconnect.pipes.nccl_blocks`), in which both ends take part; and
tensors (`kvconnect.pipes.nccl_tensors`), by way of the hosts. No process group is
needed: any two ends make communicators of their own, when they have something to move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvconnect.config import Backend, parse_options
from kvconnect.cuda import driver, nccl
from kvconnect.cuda.copier import copier
from kvconnect.errors import BusyError, ClosedError, ConfigError, HandshakeError, KVConnectError
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes import companion, host, nccl_loop
from kvconnect.pipes.base import YES, Channel, Message, Pipe, PipeSpec, Reach, Traits, Transfer, Verdict
from kvconnect.pipes.nccl_blocks import NcclBlocks
from kvconnect.pipes.nccl_lines import Wire
from kvconnect.pipes.nccl_tensors import HostTensors
from kvconnect.pipes.nccl_wire import RecvWire, SendWire, Setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NcclOptions:
    """Options of this pipe.

    Args:
        max_ctas: the most CTAs that a send or receive may occupy, of a multiprocessor each. NCCL
            counts in powers of two, takes half as many for chunks of up to 16 MiB each, and
            buffers for all: on H200 16.8 MB at the receiving and 8.4 MB at the sending end for
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


class NcclPipe(Pipe):
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
        self.timeout_s = spec.timeout_s
        self._blocks: NcclBlocks | None = None
        self._ended: KVConnectError | None = None
        mine = _card(self._device)
        joined = companion.join(spec, mine, self._options.companion)
        verdict = _fit(mine, joined.theirs)
        if not verdict:
            joined.abort()
            raise HandshakeError(f"{verdict.reason}; {verdict.cure}")
        self._tensors = HostTensors(joined, f"cuda:{self._device}")

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

    # -- tensors ----------------------------------------------------------------------

    def send_tensor(self, tensor: Tensor | None) -> None:
        """See `Pipe.send_tensor`."""
        self._tensors.send(tensor)

    def recv_tensor(self) -> Tensor | None:
        """See `Pipe.recv_tensor`."""
        return self._tensors.receive()

    def recv_tensor_into(self, out: Tensor) -> None:
        """See `Pipe.recv_tensor_into`."""
        self._tensors.receive_into(out)

    def close(self) -> None:
        """See `Pipe.close`."""
        self._ended = self._ended or ClosedError("this end was closed")
        if self._blocks is not None:
            self._blocks.close(self._ended)
        self._tensors.close()

    def abort(self) -> None:
        """See `Pipe.abort`."""
        self._ended = self._ended or ClosedError("this end was closed")
        if self._blocks is not None:
            self._blocks.end(self._ended)
        self._tensors.abort()

    # -- blocks -------------------------------------------------------------------------

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """See `Pipe.attach`."""
        self._check_open()
        if self._blocks is not None:
            raise BusyError("this pipe is attached to paged memory already")
        if driver.index(local.device) != self._device:
            raise HandshakeError(f"the memory is on {local.device}, this pipe was opened for cuda:{self._device}")
        wires = _NcclWires(self._device, local, self._options)
        size = self._options.slot_bytes
        self._blocks = NcclBlocks(local, remote, channel, wires, slot_bytes=size, timeout_s=self.timeout_s)

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """See `Pipe.read_blocks`."""
        return self._block_path().read(remote, local)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """See `Pipe.write_blocks`."""
        return self._block_path().write(local, remote)

    def _block_path(self) -> NcclBlocks:
        self._check_open()
        if self._blocks is None:
            raise ClosedError("attach() this pipe to paged memory before moving blocks")
        return self._blocks

    def _check_open(self) -> None:
        if self._ended is not None:
            raise ClosedError(str(self._ended)) from self._ended


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
