"""Shared memory between processes of one host: one copy from the peer's memory, else a ring.

Three parts: a Unix socket for each direction carries small messages, wakes the
other end and tells of its death (`kvconnect.pipes.shm_lane`); large tensors and
paged blocks are copied straight out of the peer's memory where the kernel
allows it (`kvconnect.pipes.peer_memory`); where it does not, bytes go through a
bounded ring (`kvconnect.pipes.ring`). Nothing has a name in a file system.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from kvconnect.config import parse_options
from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    ConfigError,
    DeadlineError,
    EndOfPipe,
    KVConnectError,
    UnavailableBackendError,
)
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes import host, ring
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.base import YES, Channel, Message, Pipe, PipeSpec, Reach, Traits, Transfer, Verdict
from kvconnect.pipes.peer_memory import Beacon, PeerMemory
from kvconnect.pipes.shm_blocks import ShmBlocks
from kvconnect.pipes.shm_lane import Lane, Listener, connect, hung_up
from kvconnect.pipes.shm_messages import Receiver, Sender
from kvconnect.pipes.stream import BlockStream

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShmOptions:
    """Options of this pipe.

    Args:
        copy: ``"direct"`` insists on reading the peer's memory, ``"ring"`` never does,
            ``"auto"`` does where the kernel allows it.
        ring_bytes: size of each direction's ring; it is made when it is first needed.

    """

    copy: Literal["auto", "direct", "ring"] = "auto"
    ring_bytes: int = 4 << 20


class ShmPipe(Pipe):
    """One end of a pipe between two processes of a host."""

    name: ClassVar[str] = "shm"
    traits: ClassVar[Traits] = Traits(reach=Reach.HOST, one_sided=True, zero_copy=True)

    def __init__(self, spec: PipeSpec) -> None:
        """Meet the other end, and try whether its memory can be read.

        Raises:
            ConfigError: a wrong option or device.
            UnavailableBackendError: ``copy`` is ``"direct"`` and the kernel does not allow it.
            BrokenError, HandshakeError: the other end is gone, or is not such a pipe.

        """
        self._options = _options(spec)
        self._timeout_s = spec.timeout_s
        self._beacon = Beacon()
        self._life = _Life(self._free)
        self._sending, self._receiving = _Turn("send", self._life), _Turn("receive", self._life)
        self._meeting, self._attaching = threading.Lock(), threading.Lock()
        self._ends: tuple[Sender, Receiver] | None = None
        self._blocks: ShmBlocks | None = None
        self._listener: Listener | None = None
        self._peer: PeerMemory | None = None
        self._peer_pid: int | None = None
        try:
            self._serve(spec) if spec.side == "serves" else self._ask(spec)
        except BaseException:
            self.abort()
            raise

    def _serve(self, spec: PipeSpec) -> None:
        self._listener = Listener()
        self._look_at(spec.exchange({**self._card(), **self._listener.invitation()}))

    def _ask(self, spec: PipeSpec) -> None:
        theirs = spec.exchange(self._card())
        self._look_at(theirs)
        self._ends = self._make_ends(*connect(theirs, self._timeout_s))

    def _card(self) -> dict[str, Any]:
        return {**self._beacon.card(), "pidns": host.identity()["pidns"]}

    def _look_at(self, theirs: Message) -> None:
        """Find the peer's process; leave `_peer` unset if its memory cannot be read, or shall not."""
        if theirs.get("pidns") == host.identity()["pidns"] and isinstance(theirs.get("pid"), int):
            self._peer_pid = theirs["pid"]
        if self._options.copy == "ring":
            return
        try:
            if self._peer_pid is None:
                raise BrokenError("it lives in another pid namespace")
            self._peer = PeerMemory(theirs)
        except BrokenError as error:
            if self._options.copy == "direct":
                cure = "run both as one user with CAP_SYS_PTRACE or ptrace_scope 0, or use copy='auto'"
                raise UnavailableBackendError("pipe", self.name, f"the peer cannot be read: {error}", cure) from error
            log.info("the peer's memory cannot be read (%s); its bytes go through a ring", error)

    # -- tensors ------------------------------------------------------------------

    def send_tensor(self, tensor: Tensor | None) -> None:
        """Send one message; a large one returns once the peer has copied it."""
        with self._sending:
            self._meet(self._timeout_s)[0].send(tensor)

    def recv_tensor(self) -> Tensor | None:
        """Receive the next message, as a new tensor."""
        with self._receiving:
            return self._meet(self._timeout_s)[1].receive()

    def recv_tensor_into(self, out: Tensor) -> None:
        """Receive the next message straight into ``out``: no new memory is touched."""
        with self._receiving:
            self._meet(self._timeout_s)[1].receive(out)

    def close(self) -> None:
        """Say goodbye behind all that was sent, and end."""
        if not self._life.begin_end():
            return
        try:
            self._say_goodbye()
        finally:
            self._cut()
        # Chunks end by themselves; afterwards nobody touches this end's blocks.
        self._life.await_others(self._timeout_s)
        self._life.leave()

    def abort(self) -> None:
        """End at once; the peer finds the pipe broken behind what it has already got."""
        if self._life.begin_end() or self._life.hold():
            try:
                self._cut()
            finally:
                self._life.leave()

    def _say_goodbye(self) -> None:
        if not self._sending.lock.acquire(blocking=False):
            return  # a send is cut short by this close, so this is no orderly end
        try:
            self._meet(0.0)[0].end()
        except KVConnectError as error:
            log.debug("the peer does not hear that this end closes: %s", error)
        finally:
            self._sending.lock.release()

    # -- meeting and parting ------------------------------------------------------

    def _meet(self, wait_s: float) -> tuple[Sender, Receiver]:
        """Return both lanes; the serving end lets the other in first, once."""
        if self._ends is not None:
            return self._ends
        if not self._meeting.acquire(timeout=wait_s):
            raise DeadlineError(f"the peer did not connect within {wait_s} s")
        try:
            if self._ends is None:
                if self._listener is None:
                    raise BrokenError("this end did not open")
                self._ends = self._make_ends(*self._listener.accept(wait_s, self._timeout_s, self._peer_pid))
                if self._life.closed and wait_s:
                    self._cut()  # `close` came too early to see these lanes
            return self._ends
        finally:
            self._meeting.release()

    def _make_ends(self, out: Lane, into: Lane) -> tuple[Sender, Receiver]:
        sender = Sender(out, self._options.ring_bytes, readable=self._options.copy != "ring")
        return sender, Receiver(into, self._peer)

    def _cut(self) -> None:
        """Wake everybody who waits on this pipe, at both ends."""
        if self._listener is not None:
            self._listener.shutdown()
        if self._ends is not None:
            for end in self._ends:
                end.lane.shutdown()
        if self._blocks is not None:
            self._blocks.close()

    def _free(self) -> None:
        for held in (*(self._ends or ()), self._listener, self._peer):
            if held is not None:
                held.close()

    # -- blocks -------------------------------------------------------------------

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """Tell the peer where this end's memory is; see `Pipe.attach`."""
        if torch.device(local.device).type != "cpu":
            raise ConfigError(f"the shm pipe moves blocks in CPU memory, these are on {local.device!r}")

        def stream() -> BlockStream:
            return BlockStream(self, local, remote, channel, self._timeout_s)

        # Inside, so that a close meanwhile waits and then finds the block path to end.
        self._life.enter()
        try:
            with self._attaching:
                if self._blocks is not None:
                    raise BusyError("this pipe is attached to paged memory already")
                self._blocks = ShmBlocks(self._peer, local, remote, channel, self, stream, timeout_s=self._timeout_s)
            if self._life.closed:
                self._blocks.close()
                self._life.check_open()
        finally:
            self._life.leave()

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to read the peer's blocks; see `Pipe.read_blocks`."""
        return self._attached_blocks().read(remote, local)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to write the peer's blocks; see `Pipe.write_blocks`."""
        return self._attached_blocks().write(local, remote)

    def _attached_blocks(self) -> ShmBlocks:
        if self._blocks is None:
            raise ClosedError("attach() this pipe to paged memory before moving blocks")
        return self._blocks

    def enter(self) -> None:
        """Keep what this pipe holds until `leave` (for its block path)."""
        self._life.enter()

    def leave(self) -> None:
        """Undo `enter`."""
        self._life.leave()

    def check_open(self) -> None:
        """Raise `ClosedError` if this end was closed."""
        self._life.check_open()

    def check_peer(self, *, closely: bool) -> None:
        """Raise `BrokenError` if the peer's process has ended or its end was closed; see `Guard`."""
        self._life.enter()
        try:
            if self._peer is not None:
                self._peer.verify() if closely else self._peer.check_runs()
            try:
                ends = self._meet(0.0)
            except DeadlineError:
                return  # it has not connected yet, or another thread is letting it in
            if hung_up(ends[0].lane, ends[1].lane):
                raise BrokenError("the peer has closed its end")
        finally:
            self._life.leave()

    # -- where it works -----------------------------------------------------------

    @classmethod
    def availability(cls) -> Verdict:
        """Linux with memfd and pidfd."""
        if not sys.platform.startswith("linux"):
            return Verdict(False, f"it needs Linux, this is {sys.platform}")
        try:
            os.close(os.pidfd_open(os.getpid()))
            os.close(os.memfd_create("kvconnect-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except (OSError, AttributeError) as error:
            return Verdict(
                False, f"the system has no pidfd or no memfd: {error}", "needs Linux 5.3 and no filter on them"
            )
        return YES

    @classmethod
    def can_reach(cls, local: Message, remote: Message) -> Verdict:
        """Say whether both processes are on one host and see the same abstract sockets."""
        near = host.within(cls.traits.reach, local, remote)
        if near and local.get("netns") != remote.get("netns"):
            return Verdict(
                False,
                "the peers are in different network namespaces",
                "give their containers one network (--network=host)",
            )
        return near


class _Life:
    """Who is inside a pipe: what it holds is freed when it has ended and the last one has left."""

    def __init__(self, free: Callable[[], None]) -> None:
        self.closed = False
        self._free = free
        self._inside = 0
        self._freed = False
        self._left = threading.Condition(threading.Lock())

    def enter(self) -> None:
        with self._left:
            self.check_open()
            self._inside += 1

    def hold(self) -> bool:
        """Enter even if closed, unless everything has been freed."""
        with self._left:
            self._inside += not self._freed
            return not self._freed

    def begin_end(self) -> bool:
        """Let nobody in any more, and enter; ``False`` if somebody has done so before."""
        with self._left:
            first, self.closed = not self.closed, True
            self._inside += first
            return first

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError("this end was closed")

    def await_others(self, timeout_s: float) -> None:
        """Wait until nobody else is inside."""
        with self._left:
            self._left.wait_for(lambda: self._inside <= 1, timeout_s)

    def leave(self) -> None:
        with self._left:
            self._inside -= 1
            if not self.closed:
                return
            self._left.notify_all()
            free = not self._inside and not self._freed
            self._freed = self._freed or free
        if free:
            self._free()


class _Turn(Alone):
    """For one thread at a time to be inside a pipe and do one thing."""

    def __init__(self, what: str, life: _Life) -> None:
        super().__init__(what)
        self._life = life

    def __enter__(self) -> None:
        self._life.enter()
        try:
            super().__enter__()
        except BusyError:
            self._life.leave()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        self._life.leave()
        if self._life.closed and isinstance(error, (BrokenError, DeadlineError, EndOfPipe)):
            raise ClosedError("this end was closed") from error


def _options(spec: PipeSpec) -> ShmOptions:
    options = parse_options(ShmOptions, spec.options, "pipe")
    if not 1 << 16 <= options.ring_bytes <= ring.MAX_RING_BYTES:
        raise ConfigError(f"pipe.ring_bytes must be 65536 to {ring.MAX_RING_BYTES}, got {options.ring_bytes}")
    if not spec.device.startswith("cpu"):
        raise ConfigError(f"pipe 'shm' carries CPU memory, not that of {spec.device!r}")
    return options
