"""The `Pipe` contract, its traits, and `Transfer`.

A pipe is one end of an ordered, reliable, point-to-point stream of tensors. An
author writes three methods, `Pipe.send_tensor`, `Pipe.recv_tensor` and
`Pipe.close`; everything else is concrete and may be overridden for speed.
``kvconnect.testing`` holds every clause below as a law.

The tensor path promises:

1. *Order.* Messages arrive as sent; ``None`` is a message like any other.
2. *Ownership.* When a send returns, the memory is the caller's again; on CUDA:
   ordered on the caller's current stream. What is received is safe on the
   receiver's current stream. Never a device-wide synchronisation.
3. *Fidelity.* Shape, dtype and values survive. What cannot be carried raises
   `TensorRejectedError` before a byte moves.
4. *Concurrency.* One sender and one receiver thread at a time, a second gets
   `BusyError`; `close` and `abort` may come from any thread and wake whoever is
   blocked.
5. *End.* Own close → `ClosedError`. Peer close → all that was sent is
   delivered, then `EndOfPipe`. `close` flushes; `abort` does not, and never blocks.
6. *Failure.* After `BrokenError`, or `DeadlineError` in the middle of a message,
   the pipe is dead; only `close` and `abort` remain. Errors reach the caller.
7. *Deadline.* A property of the opened pipe (`PipeSpec.timeout_s`), not of a
   call. Nothing waits for ever and nothing polls with ``sleep``.

The block path (`attach`, `read_blocks`, `write_blocks`) moves many scattered
pieces of paged memory. *Done* means the bytes are in place and readable, and
nothing will touch the local blocks any more. A failed or cancelled transfer
does not hurt the pipe; only a broken wire does.
"""

from __future__ import annotations

import enum
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from kvconnect.errors import BusyError, ClosedError, DeadlineError, KVConnectError

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
    from kvconnect.pipes.stream import BlockStream

logger = logging.getLogger("kvconnect.pipes.base")

Message = Mapping[str, Any]


class Reach(enum.IntEnum):
    """How far apart the two ends of a pipe may be."""

    PROCESS = 0
    HOST = 1
    NETWORK = 2


@dataclass(frozen=True)
class Traits:
    """What a pipe class can do, as data; tests take their skips from here and nowhere else."""

    devices: frozenset[str] = frozenset({"cpu"})
    reach: Reach = Reach.NETWORK
    #: `Pipe.read_blocks` needs no thread of the peer while it runs, unless options say otherwise;
    #: ``None`` where that is up to what lies below.
    one_sided: bool | None = False
    #: The block path moves bytes straight between the two paged memories.
    zero_copy: bool = False
    #: `Pipe.read_blocks` and `Pipe.write_blocks` only enqueue: a thread that serves other peers may call them.
    immediate: bool = False
    #: Blocks move faster where all layers of one lie together in memory, as in block-outermost layouts.
    likes_long_runs: bool = False


@dataclass(frozen=True)
class Verdict:
    """A yes, or a no with its reason and cure."""

    ok: bool
    reason: str = ""
    cure: str = ""

    def __bool__(self) -> bool:
        """Return `ok`."""
        return self.ok


YES = Verdict(True)


class Channel(Protocol):
    """Small messages to and from the other end, beside the pipe. Thread-safe.

    Bodies are what msgpack carries: dicts with string keys, lists, strings, bytes, integers.
    """

    def call(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Ask the other end; the future fails with a `KVConnectError`."""
        ...

    def handle(self, op: str, handler: Callable[[dict[str, Any]], Message]) -> None:
        """Answer the other end's `call` of ``op``; runs on the channel's thread, must not block."""
        ...


def _anywhere(_endpoint: str) -> None:
    """Contact whatever is named."""


@dataclass(frozen=True)
class PipeSpec:
    """What an end needs to open.

    ``exchange(mine) -> theirs`` swaps one small message (an address, a unique id,
    a memory handle) with the other end, once, and blocks for at most ``timeout_s``.
    The ``"asks"`` end goes first: its `exchange` carries its message to the
    ``"serves"`` end, whose `exchange` returns at once and sends the answer back.
    Once it has exchanged, the serving end may not wait for the other inside ``open``.
    So the asking end listens *before* it exchanges and accepts *after*, when the serving
    end connects; or the serving end listens before, and accepts in its first send or receive.

    ``check("host:port")`` raises a `KVConnectError` if the other end, that nobody vouches for,
    may not send this one there: to be called before an address from its message is contacted.

    ``bind_host`` is where an end that listens does so, and ``advertise_host`` what it tells the other
    end if that differs (NAT), unless its ``options`` say otherwise: the engine's own addresses.
    """

    side: Literal["asks", "serves"]
    exchange: Callable[[Message], Message]
    device: str = "cpu"
    timeout_s: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[str], None] = _anywhere
    bind_host: str = "127.0.0.1"
    advertise_host: str | None = None


class Transfer:
    """One running move of blocks, seen from the end that asked for it. Thread-safe.

    Whoever runs the transfer calls `finish` exactly once, after the last access
    to the local blocks. `cancel` only asks: the transfer is over when `done` is true.
    """

    def __init__(self, nbytes: int, on_cancel: Callable[[], None] | None = None) -> None:
        self.nbytes = nbytes
        #: Name of the pipe that carries it, for logs and counters.
        self.via = ""
        #: When its phases ended, by name: times of `time.monotonic`, where whoever runs it takes them.
        self.phases: dict[str, float] = {}
        self.error: KVConnectError | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Transfer], None]] = []
        self._on_cancel = on_cancel
        self._cancelled = False

    @property
    def done(self) -> bool:
        """Whether the transfer is over, well or not; `error` tells which."""
        return self._over.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to give up."""
        return self._cancelled

    def poll(self) -> bool:
        """Return `done`; raise the transfer's error if it failed."""
        if self.done and self.error is not None:
            raise self.error
        return self.done

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the transfer is over; raise its error, or `DeadlineError` if time is up.

        Running out of time leaves the transfer running: `cancel` it and wait again
        before its blocks are reused.
        """
        if not self._over.wait(timeout_s):
            raise DeadlineError(f"the transfer of {self.nbytes} bytes did not end within {timeout_s} s")
        self.poll()

    def cancel(self) -> None:
        """Ask to give up. The blocks are free again only once `done` is true."""
        with self._lock:
            first, self._cancelled = not self._cancelled and not self.done, True
        if first and self._on_cancel is not None:
            self._on_cancel()

    def add_done_callback(self, callback: Callable[[Transfer], None]) -> None:
        """Call ``callback(self)`` once over – at once if it already is."""
        with self._lock:
            if not self.done:
                self._callbacks.append(callback)
                return
        callback(self)

    def finish(self, error: KVConnectError | None = None) -> None:
        """End the transfer (for whoever runs it); a second call is ignored."""
        with self._lock:
            if self.done:
                return
            self.error = error
            self._over.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # one listener's mistake must not keep the others from hearing
                logger.exception("a callback of a transfer failed")


class Pipe(ABC):
    """One end of a point-to-point stream of tensors. See the module for the contract."""

    #: The medium's name: also its module's and its entry point's.
    name: ClassVar[str] = ""
    traits: ClassVar[Traits] = Traits()
    #: Deadline of the default block path. Whoever opens a pipe for an engine sets it to the
    #: `PipeSpec.timeout_s`, unless the class or the opened pipe has its own.
    timeout_s: float = 30.0

    # -- what every pipe writes -------------------------------------------------

    @abstractmethod
    def send_tensor(self, tensor: Tensor | None) -> None:
        """Send one message; return once the memory is the caller's again.

        Args:
            tensor: any shape, strides and dtype, on one of ``traits.devices``; or ``None``.

        Raises:
            TensorRejectedError: it cannot be carried; nothing moved.
            ClosedError, BrokenError, DeadlineError, BusyError: as in the contract.

        """

    @abstractmethod
    def recv_tensor(self) -> Tensor | None:
        """Receive the next message, as a new contiguous tensor on this end's device.

        Raises:
            EndOfPipe: the peer closed and everything it sent was delivered.
            ClosedError, BrokenError, DeadlineError, BusyError: as in the contract.

        """

    @abstractmethod
    def close(self) -> None:
        """Flush and end. Idempotent, callable from any thread."""

    # -- opening ----------------------------------------------------------------

    @classmethod
    def open(cls, spec: PipeSpec) -> Self:
        """Open this end. The default calls the class with the spec."""
        return cls(spec)  # type: ignore[call-arg]

    @classmethod
    def availability(cls) -> Verdict:
        """Say whether this pipe can run here, or why not and what to install.

        Never raises, never creates a CUDA context.
        """
        return YES

    @classmethod
    def descriptor(cls, device: str) -> dict[str, Any]:
        """Describe this process to a peer: what `can_reach` needs, msgpack-able."""
        from kvconnect.pipes import host

        return host.identity()

    @classmethod
    def can_reach(cls, local: Message, remote: Message) -> Verdict:
        """Say whether two ends with these descriptors can be joined. Symmetric."""
        from kvconnect.pipes import host

        return host.within(cls.traits.reach, local, remote)

    @classmethod
    def accepts(cls, memory: PagedMemory) -> Verdict:
        """Say whether the block path can serve this very memory of this process; asked once, in its worker.

        Its device is among `Traits.devices` already.
        """
        return YES

    # -- optional, tensor path ----------------------------------------------------

    def abort(self) -> None:
        """End at once without flushing; never blocks. The default closes."""
        self.close()

    def send_tensors(self, tensors: Sequence[Tensor | None]) -> None:
        """Send several messages, in order."""
        for tensor in tensors:
            self.send_tensor(tensor)

    def recv_tensor_into(self, out: Tensor) -> None:
        """Receive the next message into ``out``, whose shape and dtype must be the message's.

        A message that does not fit is consumed and raises `TensorRejectedError`.
        """
        from kvconnect.errors import TensorRejectedError

        got = self.recv_tensor()
        if got is None or got.shape != out.shape or got.dtype != out.dtype:
            what = "None" if got is None else f"{tuple(got.shape)} {got.dtype}"
            raise TensorRejectedError(f"received {what}, expected {tuple(out.shape)} {out.dtype}")
        out.copy_(got)

    # -- optional, block path -----------------------------------------------------

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """Make ``local`` this end's paged memory and learn the other end's layout.

        Called once on each end before `read_blocks`; both layouts have the same
        `PagedLayout.shape`. The peer may read this end's blocks from now on.
        The default serves and asks over ``channel`` and streams through
        `send_tensor` and `recv_tensor`, which belong to the block path from then on.

        Raises:
            HandshakeError: the layouts do not fit each other; nothing is attached.
            BusyError: this end is attached already.

        """
        from kvconnect.pipes.stream import BlockStream

        if self._stream is not None:
            raise BusyError("this pipe is attached to paged memory already")
        self._stream = BlockStream(self, local, remote, channel, self.timeout_s)

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to copy the peer's blocks ``remote`` into this end's blocks ``local``.

        Both have the same number of ids in every group; copies are whole blocks, opaque bytes.

        Raises:
            ClosedError, BrokenError: the pipe is not usable.
            HandshakeError: ids are out of range or do not pair up.

        """
        return self._attached().read(remote, local)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to copy this end's blocks ``local`` into the peer's blocks ``remote``."""
        return self._attached().write(local, remote)

    _stream: BlockStream | None = None

    def _attached(self) -> BlockStream:
        if self._stream is None:
            raise ClosedError("attach() this pipe to paged memory before moving blocks")
        return self._stream
