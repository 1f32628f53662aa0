"""NIXL: one-sided reads over what UCX (or another backend) finds between two machines, also from GPU to GPU.

NIXL moves bytes and nothing else. The order of tensors, the ends and the peer's death come from
the host pipes of `kvconnect.pipes.companion`; tensors go through slots (`kvconnect.pipes.staged`),
blocks straight into place or through staging memory, whichever is quicker
(`kvconnect.pipes.nixl_blocks`). All pipes of a process share one agent (`kvconnect.pipes.nixl_agent`).
"""

from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import msgpack

from kvconnect.config import Backend, parse_options
from kvconnect.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    DeadlineError,
    HandshakeError,
    KVConnectError,
)
from kvconnect.pipes.base import YES, Channel, PipeSpec, Reach, Traits, Verdict
from kvconnect.pipes.companion import join
from kvconnect.pipes.nixl_agent import Agent, Peer, Read
from kvconnect.pipes.nixl_blocks import NixlBlocks, check_device
from kvconnect.pipes.nixl_place import Place, Registration, read_card
from kvconnect.pipes.nixl_staging import SIZES, STAGERS, stager_for, whole
from kvconnect.pipes.staged import StagedTensors, Staging
from kvconnect.pipes.two_paths import TwoPathPipe

if TYPE_CHECKING:
    from torch import Tensor

    from kvconnect.paging import PagedLayout, PagedMemory

#: Of what the two ends tell each other.
_VERSION: Final = 3
#: How to reach staging memory: far more than any agent's metadata take.
_MAX_CARD_BYTES: Final = 1 << 20
#: Given to a fetch of another thread to notice that it is too late.
_SLACK_S: Final = 1.0


@dataclass(frozen=True)
class NixlOptions:
    """Options of the NIXL pipe.

    Args:
        backends: NIXL's backends by name, or ``{"name": "UCX", parameter: value}``.
        mode: ``"runs"`` reads blocks straight into place, neighbours in one piece;
            ``"staged"`` has the peer gather them, and reads and scatters whole portions;
            ``"auto"`` takes whichever proves quicker.
        portion_bytes: what a block transfer reads in one go, another has its turn after it;
            0 chooses by device. A process has 8 such slots on the CPU, 3 on a GPU, for all peers.
        slot_bytes: of each of four slots that large tensors go through.
        companion: the host pipe beside it, ``"auto"`` or a name with options; the options of
            ``"auto"`` are those of ``tcp`` (``{"name": "auto", "bind_host": "10.0.0.1"}``).

    """

    backends: tuple[Backend, ...] = (Backend("UCX"),)
    mode: Literal["auto", "runs", "staged"] = "auto"
    portion_bytes: int = 0
    slot_bytes: int = 4 << 20
    companion: Backend = Backend("auto")

    def __post_init__(self) -> None:
        """Check ranges; raise `ConfigError`."""
        if not self.backends:
            raise ConfigError("pipe.backends must name at least one backend")
        for name in ("portion_bytes", "slot_bytes"):
            value = getattr(self, name)
            if not (1 << 16 <= value <= 1 << 30 or (name == "portion_bytes" and value == 0)):
                raise ConfigError(f"pipe.{name} must be 65536 to {1 << 30}, got {getattr(self, name)}")


class NixlPipe(TwoPathPipe):
    """One end of a pipe over NIXL."""

    name: ClassVar[str] = "nixl"
    # One-sided as far as NIXL's backend is: UCX over RDMA or the kernel's, not over sockets.
    # Not zero_copy: what is staged is copied twice, so that `tcp` is nearer where both carry the memory.
    traits: ClassVar[Traits] = Traits(
        devices=frozenset(STAGERS), reach=Reach.NETWORK, one_sided=None, likes_long_runs=True
    )

    def __init__(self, spec: PipeSpec) -> None:
        """Start the process's agent, if it is the first, and meet the other end.

        Raises:
            ConfigError: a wrong option, or a backend that NIXL does not have.
            UnavailableBackendError: this kind of device cannot be served.
            HandshakeError: the other end is no such pipe.
            BrokenError, DeadlineError: the other end cannot be reached.

        """
        self._options = parse_options(NixlOptions, spec.options, "pipe")
        self._device = spec.device
        stager_for(spec.device)
        self._agent = Agent.shared(self._options.backends, Place.of(spec.device))
        companion = join(spec, {"nixl": _VERSION}, self._options.companion)
        if (theirs := companion.theirs.get("nixl")) != _VERSION:
            companion.abort()
            raise HandshakeError(f"ours is version {_VERSION} of the nixl pipe, theirs {theirs!r}")
        medium = NixlMedium(self._agent, spec.device, spec.timeout_s, self._options.slot_bytes)
        tensors = StagedTensors(companion, medium, slot_bytes=self._options.slot_bytes, timeout_s=spec.timeout_s)
        super().__init__(tensors, spec.timeout_s)

    # -- blocks -----------------------------------------------------------------------------

    def make_blocks(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> NixlBlocks:
        """Register ``local`` with NIXL, once for all pipes over it, and tell the peer where it is."""
        check_device(local, self._device)
        return NixlBlocks(
            self._agent,
            local,
            remote,
            channel,
            mode=None if self._options.mode == "auto" else self._options.mode,
            portion_bytes=self._options.portion_bytes or SIZES[local.device.partition(":")[0]].portion_bytes,
            timeout_s=self.timeout_s,
        )

    # -- where it works -----------------------------------------------------------------------

    @classmethod
    def availability(cls) -> Verdict:
        """Whether NIXL is installed, and may be used in this process; nothing of it is imported."""
        if importlib.util.find_spec("nixl") is None:
            return Verdict(False, "NIXL is not installed", "pip install 'kvconnect[nixl]'")
        return Agent.usable()

    @classmethod
    def accepts(cls, memory: PagedMemory) -> Verdict:
        """Say whether blocks of ``memory`` can be gathered and scattered here: on CUDA that takes CuPy."""
        try:
            stager_for(memory.device)
        except KVConnectError as error:
            return Verdict(False, str(error))
        return YES


class NixlMedium:
    """Staging memory and fetches for the tensor path of one pipe; see `kvconnect.pipes.staged.Medium`."""

    def __init__(self, agent: Agent, device: str, timeout_s: float, slot_bytes: int) -> None:
        self._agent, self._device, self._timeout_s, self._slot_bytes = agent, device, timeout_s, slot_bytes
        self._place, self._stager = Place.of(device), stager_for(device)
        self._lock = threading.Lock()
        self._peer: tuple[Peer, Place] | None = None
        self._staging: _NixlStaging | None = None
        self._bounce: tuple[Tensor, Registration] | None = None
        self._ended = False

    @property
    def device(self) -> str:
        """Where the tensors are."""
        return self._device

    def allocate(self, nbytes: int) -> Staging:
        """Allocate and register; as `Medium.allocate`."""
        self._staging = _NixlStaging(self._agent, self._place, self._stager.allocate(nbytes), self)
        return self._staging

    def stage(self, source: Tensor, address: int) -> None:
        """Copy into a slot, and progress the agent while the peer may read it."""
        if self._staging is None:
            raise BrokenError("nothing was allocated to stage in")
        self._stager.copy(source, self._staging.part(address, source.nbytes))
        with self._lock:
            if not self._ended:
                self._agent.watch(self, self._timeout_s)

    def meet(self, card: bytes) -> None:
        """Learn how to reach the peer's slots."""
        try:
            if len(card) > _MAX_CARD_BYTES:
                raise ValueError(f"{len(card)} bytes")
            body = msgpack.unpackb(card, max_ext_len=0)
            theirs = read_card(body)
        except (ValueError, TypeError, AttributeError) as error:
            raise BrokenError(f"the peer did not say how its memory is reached: {error}") from error
        peer = self._agent.meet(theirs)
        with self._lock:
            old, self._peer = self._peer, (peer, theirs.place)
            if self._ended:
                old, self._peer = self._peer, None
        if old is not None:
            old[0].leave()

    def fetch(self, address: int, out: Tensor) -> None:
        """Read into registered memory and copy from there: registering every tensor would cost more."""
        if self._peer is None:
            raise BrokenError("the peer sent bytes before it said how its memory is reached")
        peer, place = self._peer
        for start in range(0, out.nbytes, self._slot_bytes):
            part = out[start : start + self._slot_bytes]
            bounce = self._landing()[: part.nbytes]
            local = whole(bounce)
            remote = local.copy()
            remote[0, 0] = address + start
            over: Future[KVConnectError | None] = Future()
            self._agent.read(Read(peer.name, (self._place, local), (place, remote), over.set_result, bounce))
            _await(over, self._timeout_s)
            self._stager.copy(bounce, part)

    def _landing(self) -> Tensor:
        if self._bounce is None:
            memory = self._stager.allocate(self._slot_bytes)
            bounce = memory, self._agent.register(self._place, whole(memory), memory)
            with self._lock:
                if self._ended:
                    self._agent.deregister(bounce[1])
                    raise ClosedError("this end was closed")
                self._bounce = bounce
        return self._bounce[0]

    def end(self) -> None:
        """Give everything back but what the peer may still read."""
        with self._lock:
            self._ended = True
            peer, self._peer = self._peer, None
            bounce, self._bounce = self._bounce, None
        self._agent.unwatch(self)
        if bounce is not None:
            # A fetch may be under way on another thread. One whose peer hangs lasts longer, and
            # then writes to memory that it holds itself.
            self._agent.deregister(bounce[1], delay_s=self._timeout_s + _SLACK_S)
        if peer is not None:
            self._agent.after(self._timeout_s + _SLACK_S, peer[0].leave)


class _NixlStaging:
    """Slots that the peer reads from; see `kvconnect.pipes.staged.Staging`."""

    def __init__(self, agent: Agent, place: Place, memory: Tensor, watcher: object) -> None:
        self._agent, self._memory = agent, memory
        self._registration = agent.register(place, whole(memory), memory)
        self.address = memory.data_ptr()
        self.card: bytes = _packed(agent.card(place, self._registration))

    def part(self, address: int, nbytes: int) -> Tensor:
        """Return the memory at ``address``."""
        start = address - self.address
        return self._memory[start : start + nbytes]

    def free(self, *, read_until_s: float) -> None:
        """Deregister, perhaps later."""
        if read_until_s:
            # Its reads are answered meanwhile.
            self._agent.watch(self, read_until_s)
            self._agent.after(read_until_s, lambda: self._agent.unwatch(self))
        self._agent.deregister(self._registration, delay_s=read_until_s)


def _packed(body: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(body)
    return packed


def _await(over: Future[KVConnectError | None], timeout_s: float) -> None:
    try:
        error = over.result(timeout_s)
    except TimeoutError:
        raise DeadlineError(f"the peer's memory could not be read within {timeout_s} s") from None
    if error is not None:
        raise error
