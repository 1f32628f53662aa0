"""The block path of a shared-memory pipe: straight from paged memory to paged memory.

Once both ends are attached they know each other's base addresses, and whoever
asks for a transfer carries it out alone: ``process_vm_readv`` or ``writev``
between the two canonical streams, a chunk at a time, by turns with all other
transfers of the process. If either end may not read the other, both use the
default block path instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvconnect import blocks as paged
from kvconnect.errors import BrokenError, ClosedError, DeadlineError, HandshakeError, KVConnectError, LoadError
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory, Pieces, place, spans
from kvconnect.pipes import huge_pages, turns
from kvconnect.pipes.base import Channel, Transfer
from kvconnect.pipes.chunks import Threads, again
from kvconnect.pipes.peer_memory import PeerMemory, SharedCopy, unexpected, useful_threads
from kvconnect.pipes.stream import BlockStream

log = logging.getLogger(__name__)

_OP = "shm.memory"

#: Bytes that one transfer copies before it is another's turn: 0.2 ms of copying. Smaller
#: steps cost 10 % (kernel entries), larger ones gain nothing.
_STEP_BYTES = 2 << 20


class Guard(Protocol):
    """What the block path asks of its pipe."""

    def enter(self) -> None:
        """Keep what the pipe holds until `leave`; raise `ClosedError` if it was closed."""

    def leave(self) -> None:
        """Undo `enter`."""

    def check_open(self) -> None:
        """Raise `ClosedError` if this end was closed."""

    def check_peer(self, *, closely: bool) -> None:
        """Raise `BrokenError` if the other end is not there any more.

        Looking ``closely`` includes the proof that the memory is the peer's.
        """


@dataclass(frozen=True)
class Word:
    """What an end says of itself: can it read the other, is its stream up, where is its memory."""

    direct: bool
    streams: bool
    bases: npt.NDArray[np.uint64]

    @classmethod
    def read(cls, body: Mapping[str, Any], regions: int) -> Word:
        """Check a peer's word; raise `HandshakeError` if it is malformed."""
        bases = body.get("bases")
        if not isinstance(bases, list) or len(bases) != regions:
            raise HandshakeError(f"the peer should have told {regions} base addresses, got {bases!r}")
        if not all(isinstance(base, int) and 0 <= base < 1 << 64 for base in bases):
            raise HandshakeError("a base address of the peer is not an address")
        return cls(bool(body.get("direct")), bool(body.get("streams")), np.asarray(bases, dtype=np.uint64))


@dataclass(eq=False)
class _Ask:
    transfer: Transfer
    local: BlockIds
    remote: BlockIds
    reads: bool
    #: When it has waited for the peer's attaching too long, by `time.monotonic`.
    until: float
    #: The stream's transfer that carries this one out.
    inner: Transfer | None = None


class ShmBlocks:
    """The block path of one end.

    Args:
        peer: the other end's memory, or ``None`` if it may not be read from here.
        local: this end's paged memory.
        remote: the other end's layout.
        channel: to tell each other where the memory is.
        guard: the pipe.
        make_stream: makes the default block path, when that has to serve instead.
        timeout_s: how long a transfer waits for the peer to attach.

    """

    def __init__(
        self,
        peer: PeerMemory | None,
        local: PagedMemory,
        remote: PagedLayout,
        channel: Channel,
        guard: Guard,
        make_stream: Callable[[], BlockStream],
        *,
        timeout_s: float,
    ) -> None:
        paged.check_shapes(local.layout, remote)
        self._peer, self._local, self._remote, self._channel, self._guard = peer, local, remote, channel, guard
        huge_pages.collapse(local)
        self._make_stream, self._timeout_s = make_stream, timeout_s
        self._lock = threading.Lock()
        self._theirs: Word | None = None
        #: Why no transfer can begin any more; every later ask is told.
        self._ended: KVConnectError | None = None
        self._waiting: list[_Ask] = []
        self._stream = make_stream() if peer is None else None
        channel.handle(_OP, self._on_word)
        # Whoever attaches second is heard by the first, and gets its answer.
        self._tell()

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to copy the peer's blocks ``remote`` into ``local``; as `Pipe.read_blocks`."""
        return self._begin(local, remote, reads=True)

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to copy ``local`` into the peer's blocks ``remote``; as `Pipe.write_blocks`."""
        return self._begin(local, remote, reads=False)

    def close(self) -> None:
        """Fail what has not begun and begin no more; transfers under way see that the pipe is closed."""
        self._end(ClosedError("this end was closed"))
        if self._stream is not None:
            self._stream.close()

    # -- who can do what ----------------------------------------------------------

    def _word(self) -> dict[str, Any]:
        return {
            "direct": self._peer is not None,
            "streams": self._stream is not None,
            "bases": self._local.bases.tolist(),
        }

    def _tell(self) -> None:
        self._channel.call(_OP, self._word()).add_done_callback(self._answered)

    def _answered(self, answer: Future[dict[str, Any]]) -> None:
        error = answer.exception()
        if error is None:
            try:
                self._learn(answer.result())
            except KVConnectError as malformed:
                self._end(malformed)
        elif isinstance(error, (BrokenError, ClosedError, DeadlineError)):
            with self._lock:
                # A peer that has told us by itself got our word as the answer.
                known = self._ready()
            if not known:
                self._end(error)
        else:
            # It is not attached yet, and will tell us when it is.
            log.debug("the peer does not answer yet: %s", error)

    def _on_word(self, body: dict[str, Any]) -> dict[str, Any]:
        self._learn(body)
        return self._word()

    def _learn(self, body: Mapping[str, Any]) -> None:
        word = Word.read(body, len(self._remote.region_bytes))
        with self._lock:
            if self._ended is not None:
                raise BrokenError(f"this end moves no blocks any more: {self._ended}")
            # An answer may be older than a call that overtook it.
            streams = word.streams or (self._theirs is not None and self._theirs.streams)
            self._theirs = Word(word.direct, streams, word.bases)
            fall_back = not (self._peer is not None and word.direct) and self._stream is None
            if fall_back:
                self._stream = self._make_stream()
            asks, self._waiting = (self._waiting, []) if self._ready() else ([], self._waiting)
        if fall_back:
            self._tell()
        for ask in asks:
            self._start_late(ask)

    def _ready(self) -> bool:
        if self._theirs is None:
            return False
        return self._theirs.streams if self._stream is not None else True

    # -- transfers ----------------------------------------------------------------

    def _begin(self, local: BlockIds, remote: BlockIds, *, reads: bool) -> Transfer:
        nbytes = paged.check_pair(self._local.layout, local, self._remote, remote)
        self._guard.check_open()
        transfer = Transfer(nbytes, lambda: self._cancelled(ask))
        ask = _Ask(transfer, local, remote, reads, time.monotonic() + self._timeout_s)
        with self._lock:
            if self._ended is not None:
                raise again(self._ended)
            waits = not self._ready()
            if waits:
                self._waiting.append(ask)
        if waits:
            Threads.current().watch(self)
            return transfer
        if self._stream is not None:
            return self._stream.read(remote, local) if reads else self._stream.write(local, remote)
        self._move(ask)
        return transfer

    def _start_late(self, ask: _Ask) -> None:
        """Start a transfer that was asked for before the peer was attached."""
        try:
            if self._stream is None:
                self._move(ask)
                return
            stream = self._stream
            inner = stream.read(ask.remote, ask.local) if ask.reads else stream.write(ask.local, ask.remote)
        except KVConnectError as error:
            ask.transfer.finish(error)
        except Exception as error:  # noqa: BLE001 - this is the channel's thread, but the asker must hear of it
            ask.transfer.finish(unexpected("the start of a transfer", error))
        else:
            ask.inner = inner
            inner.add_done_callback(lambda over: ask.transfer.finish(over.error))
            if ask.transfer.cancelled:
                inner.cancel()

    def _move(self, ask: _Ask) -> None:
        """Copy here and now, by turns."""
        peer, theirs, guard, transfer = self._peer, self._theirs, self._guard, ask.transfer
        if peer is None or theirs is None:
            raise BrokenError("the peer's memory is not known")
        # What was read from a stranger is found out in the end, what was written to one cannot be undone.
        guard.check_peer(closely=not ask.reads)
        here, there = Pieces(self._local.iovec(ask.local)), Pieces(place(self._remote, theirs.bases, ask.remote))
        chunks = spans(here.nbytes, _STEP_BYTES)
        copy = peer.read if ask.reads else peer.write
        if not chunks:
            transfer.finish()
            return

        def check() -> None:
            guard.check_open()
            if not ask.reads:
                # A peer that has closed may use its blocks again: not one chunk more goes there.
                guard.check_peer(closely=False)
            if transfer.cancelled:
                raise LoadError("the transfer was cancelled")

        def end(error: KVConnectError | None) -> None:
            try:
                # Only now is it certain that the memory was the peer's until the last byte.
                guard.check_peer(closely=True)
            except KVConnectError as gone:
                error = error or gone
            except Exception as bug:  # noqa: BLE001 - without this look, what was copied is worth nothing
                error = error or unexpected("the look at the peer", bug)
            try:
                guard.leave()
            finally:
                transfer.finish(error)

        guard.enter()
        work = SharedCopy(len(chunks), lambda i: copy(here.cut(*chunks[i]), there.cut(*chunks[i])), check, end)
        for _ in range(min(len(chunks), useful_threads())):
            turns.shared().add(work.step)

    def _end(self, error: KVConnectError) -> None:
        """Fail what waits for the peer, and whatever is asked for from now on."""
        with self._lock:
            self._ended = self._ended or error
            asks, self._waiting = self._waiting, []
        for ask in asks:
            ask.transfer.finish(error)

    def check_time(self, now: float) -> bool:
        """Fail what has waited for the peer too long; return whether anything still waits (for `Threads`)."""
        with self._lock:
            late = [ask for ask in self._waiting if ask.until <= now]
            self._waiting = [ask for ask in self._waiting if ask.until > now]
            more = bool(self._waiting)
        for ask in late:
            ask.transfer.finish(DeadlineError(f"the peer did not attach its memory within {self._timeout_s} s"))
        return more

    def _cancelled(self, ask: _Ask) -> None:
        """Somebody gave up ``ask``; one that is being copied here sees that by itself."""
        with self._lock:
            waits = ask in self._waiting
            if waits:
                self._waiting.remove(ask)
        if waits:
            ask.transfer.finish(LoadError("the transfer was cancelled"))
        elif ask.inner is not None:
            ask.inner.cancel()
