"""Sending and receiving the chunks of a block stream, on threads that all pipes of a process share.

On one pipe at most one thread sends and one receives (clause 4 of the pipe
contract). A thread calls `Pipe.recv_tensor` only for a chunk that was announced,
that is whose sender is in its send already. So receiving threads are never all
held by pipes on which nothing comes, and senders and receivers cannot starve
each other. A peer that stalls in the middle of a chunk holds one thread, at
most until the pipe's deadline.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.errors import BrokenError, ClosedError, DeadlineError, EndOfPipe, KVConnectError
from kvconnect.paging import PagedMemory
from kvconnect.pipes.base import Channel, Pipe
from kvconnect.pipes.flows import TAG_BYTES, Flow, Key, read_tag, write_tag
from kvconnect.pipes.turns import CHUNK_BYTES, Step, Turns

log = logging.getLogger(__name__)

#: Threads that send, and as many that receive, for all pipes of a process.
THREADS = 4
#: Bytes of a chunk in memory of a device. Each costs the host a few waits for the device, in which that
#: copies far more than a CPU; each sending thread holds one.
DEVICE_CHUNK_BYTES = 8 << 20
#: A transfer that rested this long makes a thread listen on the pipe itself.
LISTEN_S = 1.0


class Owner(Protocol):
    """What the two halves below tell the stream that they belong to."""

    def settle(self, flow: Flow) -> None:
        """``flow`` ended while it was copied, and now nobody copies any more."""

    def end(self, flow: Flow, error: KVConnectError | None) -> None:
        """``flow`` is over."""

    def fail(self, error: KVConnectError) -> None:
        """The pipe does not work any more."""


class ChunkSender:
    """Sends chunks of all flows of one pipe that have credit, by turns."""

    def __init__(self, pipe: Pipe, memory: PagedMemory, channel: Channel, lock: threading.Lock, owner: Owner) -> None:
        self._pipe, self._memory, self._channel, self._lock, self._owner = pipe, memory, channel, lock, owner
        self._ready: deque[Flow] = deque()
        self._active = False

    def grant(self, flow: Flow, chunks: int) -> None:
        """Let ``chunks`` more chunks of ``flow`` go."""
        with self._lock:
            flow.credit += chunks
            flow.stamp = time.monotonic()
            if flow.ended or flow.queued or flow.credit <= 0 or flow.moved == flow.nbytes:
                return
            flow.queued = True
            self._ready.append(flow)
            if self._active:
                return
            self._active = True
        Threads.current().senders.add(_on_own_stream(self._memory.device, self._send_next))

    def _send_next(self) -> bool:
        """Send one chunk of the next flow; return whether another turn is needed."""
        with self._lock:
            flow = self._next()
            if flow is None:
                return False
        start, stop = flow.moved, min(flow.moved + _chunk_bytes(self._memory.device), flow.nbytes)
        chunk = self._gather(flow, start, stop)
        if chunk is None:
            return True
        try:
            self._channel.call("blocks.chunk", {})
            self._pipe.send_tensor(chunk)
        except Exception as error:  # noqa: BLE001 - a third party's pipe may raise anything
            self._owner.fail(ours(error))
            return False
        with self._lock:
            flow.moved, flow.stamp = stop, time.monotonic()
            flow.credit -= 1
            flow.queued = flow.credit > 0 and stop < flow.nbytes and not flow.ended
            if flow.queued:
                self._ready.append(flow)
        if stop == flow.nbytes and flow.transfer is None:
            self._owner.end(flow, None)
        return True

    def _next(self) -> Flow | None:
        while self._ready:
            flow = self._ready.popleft()
            if not flow.ended:
                flow.copying = True
                return flow
            flow.queued = False
        self._active = False
        return None

    def _gather(self, flow: Flow, start: int, stop: int) -> Tensor | None:
        """Return the chunk, or ``None`` if ``flow`` ended meanwhile or cannot be gathered."""
        error: KVConnectError | None = None
        chunk: Tensor | None = None
        try:
            chunk = _scratch(self._memory.device, stop - start + TAG_BYTES)
            paged.gather(self._memory, flow.pieces.cut(start, stop), chunk[: stop - start])
            write_tag(chunk, flow.key, start)
        except Exception as caught:  # noqa: BLE001 - a device without memory, say: it ends this transfer
            error = ours(caught)
        with self._lock:
            flow.copying, ended = False, flow.ended
        if ended:
            self._owner.settle(flow)
        elif error is not None:
            self._owner.end(flow, error)
        return None if ended or error is not None else chunk


class ChunkReceiver:
    """Receives the chunks of one pipe and scatters them into the flows that they belong to."""

    def __init__(
        self,
        pipe: Pipe,
        memory: PagedMemory,
        lock: threading.Lock,
        owner: Owner,
        find: Callable[[Key], Flow | None],
        on_placed: Callable[[Flow], None],
    ) -> None:
        self._pipe, self._memory, self._lock, self._owner = pipe, memory, lock, owner
        self._find, self._on_placed = find, on_placed
        #: Chunks announced and not received; below zero while one has overtaken its announcement.
        self._announced = 0
        self._active = self._listening = False

    def announced(self) -> None:
        """One more chunk is on its way."""
        with self._lock:
            self._announced += 1
            if self._active or self._announced <= 0:
                return
            self._active = True
        self._receive_on_a_thread()

    def listen(self) -> None:
        """Have a thread receive without an announcement, to notice a closed or broken pipe."""
        with self._lock:
            if self._active or self._listening:
                return
            self._listening = True
        Threads.current().listeners.add(_on_own_stream(self._memory.device, self._listen))

    def _receive_on_a_thread(self) -> None:
        Threads.current().receivers.add(_on_own_stream(self._memory.device, self._receive_next))

    def _listen(self) -> bool:
        with self._lock:
            self._listening, active = False, self._active
            self._active = True
        if not active and self._receive_next():
            self._receive_on_a_thread()
        return False

    def _receive_next(self) -> bool:
        """Receive and scatter one chunk; return whether another one was announced."""
        with self._lock:
            expected = self._announced > 0
        try:
            self._place(self._pipe.recv_tensor())
        except DeadlineError as error:
            if expected:
                self._owner.fail(error)  # a chunk that its sender had begun did not come
                return False
            return self._rest(received=0)
        except Exception as error:  # noqa: BLE001 - a third party's pipe may raise anything
            self._owner.fail(ours(error))
            return False
        return self._rest(received=1)

    def _rest(self, received: int) -> bool:
        with self._lock:
            self._announced -= received
            self._active = self._announced > 0
            return self._active

    def _place(self, chunk: Tensor | None) -> None:
        """Scatter a chunk into its flow, or drop it if that has ended."""
        data, key, offset = read_tag(chunk)
        with self._lock:
            flow = self._find(key)
            if flow is None or flow.ended:
                return  # it ended while this chunk was on its way
            if offset != flow.moved or data.nbytes > flow.nbytes - offset:
                raise BrokenError(f"at byte {flow.moved} of {flow.nbytes} came {data.nbytes} bytes for {offset}")
            flow.copying = True
        error: KVConnectError | None = None
        try:
            paged.scatter(data, self._memory, flow.pieces.cut(offset, offset + data.nbytes))
        except Exception as caught:  # noqa: BLE001 - whatever a device raises ends this transfer
            error = ours(caught)
        self._placed(flow, data.nbytes, error)

    def _placed(self, flow: Flow, nbytes: int, error: KVConnectError | None) -> None:
        with self._lock:
            flow.moved += nbytes
            flow.chunks += 1
            flow.copying, flow.stamp = False, time.monotonic()
            ended = flow.ended
        if ended:
            self._owner.settle(flow)
        elif error is not None or flow.moved == flow.nbytes:
            self._owner.end(flow, error)
        else:
            self._on_placed(flow)


class Clocked(Protocol):
    """What `Threads.watch` keeps an eye on."""

    def check_time(self, now: float) -> bool:
        """Look for transfers that rested too long; return whether to look again."""


class Threads:
    """The threads of all block streams of a process."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[Threads | None] = None

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.senders = Turns("kvconnect-blocks-send", THREADS)
        self.receivers = Turns("kvconnect-blocks-recv", THREADS)
        self.listeners = Turns("kvconnect-blocks-listen", 1)
        # With the clock, not when a transfer first rests: how many threads there are shall not depend on load.
        self.listeners.start()
        self._watched: set[Clocked] = set()
        self._changed = threading.Condition()
        threading.Thread(target=self._keep_time, name="kvconnect-blocks-clock", daemon=True).start()

    @classmethod
    def current(cls) -> Threads:
        """Return this process's threads, made anew after a fork."""
        with cls._lock:
            if cls._current is None or cls._current.pid != os.getpid():
                cls._current = cls()
            return cls._current

    @classmethod
    def renew_lock(cls) -> None:
        """Forget a lock that another thread of the parent may have held at the fork."""
        cls._lock = threading.Lock()

    def watch(self, stream: Clocked) -> None:
        """Call ``stream.check_time`` a few times a second for as long as it says so."""
        with self._changed:
            self._watched.add(stream)
            self._changed.notify()

    def _keep_time(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._watched))
                # A clock, not a poll: nothing but the passing of time is waited for.
                self._changed.wait_for(lambda: False, LISTEN_S / 4)
                streams, self._watched = self._watched, set()
            now = time.monotonic()
            resting = {stream for stream in streams if _rests(stream, now)}
            with self._changed:
                self._watched |= resting
            del streams, resting  # an idle clock keeps no stream alive


def _rests(stream: Clocked, now: float) -> bool:
    try:
        return stream.check_time(now)
    except Exception:
        # A bug in one stream must not stop the clock of all others.
        log.exception("a stream's transfers could not be looked at; it is watched no more")
        return False


os.register_at_fork(after_in_child=Threads.renew_lock)

_local = threading.local()


def _chunk_bytes(device: str) -> int:
    return CHUNK_BYTES if device == "cpu" else DEVICE_CHUNK_BYTES


def _scratch(device: str, nbytes: int) -> Tensor:
    """Return this thread's memory for one chunk; free again, on its stream, when the send has returned."""
    buffers: dict[str, Tensor] = _local.__dict__.setdefault("buffers", {})
    if device not in buffers or buffers[device].nbytes < nbytes:
        buffers[device] = torch.empty(max(nbytes, _chunk_bytes(device) + TAG_BYTES), dtype=torch.uint8, device=device)
    return buffers[device][:nbytes]


def _on_own_stream(device: str, step: Step) -> Step:
    """Give ``step`` a stream of its thread's own as the current one, on which it copies and sends or receives."""

    def on_stream() -> bool:
        with paged.own_stream(device):
            return step()

    return step if device == "cpu" else on_stream


def ours(error: BaseException) -> KVConnectError:
    """Return ``error`` as what a transfer may fail with."""
    if isinstance(error, EndOfPipe):
        broken = BrokenError("the other end closed the pipe while blocks were moving")
    elif isinstance(error, KVConnectError):
        return error
    else:
        broken = BrokenError(f"the pipe failed: {error!r}")
    broken.__cause__ = error
    return broken


def again(error: KVConnectError) -> KVConnectError:
    """Return a fresh error like ``error``, to be raised where an old failure shows again."""
    fresh = ClosedError(str(error)) if isinstance(error, ClosedError) else BrokenError(f"the pipe had failed: {error}")
    fresh.__cause__ = error
    return fresh
