"""The end in a worker process: it reads peers' blocks, and lets peers read its own."""

from __future__ import annotations

import collections
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvconnect.buffers import fields, layouts
from kvconnect.buffers.access import Access
from kvconnect.buffers.base import Claim, EndSettings, WorkerEnd
from kvconnect.buffers.channels import Channels, Side
from kvconnect.buffers.choice import describe_pipes
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.integrity import Integrity
from kvconnect.buffers.links import Link, Links
from kvconnect.buffers.promise import Answer
from kvconnect.buffers.serving import PipeServer
from kvconnect.buffers.station import Station, foreign
from kvconnect.buffers.trial import Trial
from kvconnect.control import ControlClient
from kvconnect.errors import (
    BrokenError,
    ClosedError,
    DeadlineError,
    IntegrityError,
    KVConnectError,
    LoadError,
    StaleError,
)
from kvconnect.loop import Timer
from kvconnect.paging import BlockIds, PagedMemory
from kvconnect.pipes.base import Pipe, Transfer

logger = logging.getLogger(__name__)

#: How long a cancelled transfer may take to let go of its blocks before its pipe is ended.
_LET_GO_S = 5.0
_CLOSE_S = 5.0
#: Pipes are not looked over more often, however short `Config.pipe_idle_s` is.
_LEAST_PAUSE_S = 0.01
#: A promise that lasts this much longer is enough to begin with; one that runs out meanwhile is asked for again.
_ENOUGH_S = 1.0
#: Of each of the six crews, at most. A peer that hangs holds one of them.
_THREADS = 4


@dataclass(eq=False)
class _Read:
    """One load under way."""

    claim: Claim
    remote: BlockIds
    local: BlockIds
    transfer: Transfer
    release: bool
    timer: Timer | None = None
    link: Link | None = None
    retried: bool = False
    #: The owner was asked, before the blocks moved, whether it leaves them as they are.
    question: Answer | None = None
    #: The sum of the owner's blocks, if that is to be compared; and whether it is being compared.
    sum: Answer | None = None
    checking: bool = False
    #: These under the mover's lock: given up; its pipe was asked for the blocks; what moves them.
    stopped: KVConnectError | None = None
    moving: bool = False
    inner: Transfer | None = None

    def mark(self, phase: str) -> None:
        """Note that a phase has ended."""
        self.transfer.phases[phase] = time.monotonic()


class Mover(WorkerEnd):
    """Loads claimed blocks over pipes, and has the owner confirm each load."""

    def __init__(self, settings: EndSettings, rank: int, memory: PagedMemory) -> None:
        """Serve ``memory`` as part ``rank``; waits for nobody.

        Raises:
            ConfigError: the pipe asked for cannot be had, the address cannot be bound, or a key cannot be read.

        """
        options = settings.options
        self._options, self._rank, self._memory = options, rank, memory
        pipes = describe_pipes(settings.pipe.name, memory)
        access = Access(options, settings.clock)
        access.check_pipe(settings.pipe.options)
        self._server, endpoint = access.server("kvconnect-mover-server", fixed_port=False)
        self._client = access.client("kvconnect-mover-client")
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._reads: set[_Read] = set()
        self._closed = False
        self._description = {
            "rank": rank,
            "endpoint": endpoint,
            **pipes,
            "layout": layouts.write(memory.layout),
            "device": memory.device,
        }
        me = Hello.of(settings, secrets.token_hex(8), rank=rank)
        channels = Channels(self._server, self._client, options.transfer_timeout_s, options.lease_s, self._lost)
        # A crew for each: pipes that are slow to open must not keep others from reading or ending.
        jobs = ("read-starts", "pipe-asks", "pipe-opens", "pipe-serves", "pipe-ends", "block-sums")
        crews = [Crew(f"kvconnect-{job}", _THREADS) for job in jobs]
        self._crews = self._starting, asking, opening, serving, ending, summing = crews
        station = Station(settings, me, self._description, memory, self._client, channels)
        self._links = Links(station, asking, opening, ending)
        self._pipes = PipeServer(station, self._server, serving, ending)
        self._integrity = Integrity(station, self._server, summing, self._pipes.serves)
        if options.pipe_idle_s is not None:
            _drop_unused(self._links, self._reads, self._client, options.pipe_idle_s)

    def describe(self) -> dict[str, Any]:
        """Return what peers need to read this worker's blocks."""
        return dict(self._description)

    def read(self, claim: Claim, remote: BlockIds, local: BlockIds, on_done: Callable[[Transfer], None]) -> Transfer:
        """Start a load. See `WorkerEnd.read`.

        ``remote`` must be blocks of the claim: nobody vouches for others.
        """
        return self._start(claim, remote, local, on_done, release=True)

    def fetch(self, claim: Claim, remote: BlockIds, local: BlockIds, on_done: Callable[[Transfer], None]) -> Transfer:
        """Copy blocks as `read` does, but leave the release (and so the confirmation) to the caller."""
        return self._start(claim, remote, local, on_done, release=False)

    def release(self, claim: Claim) -> Answer:
        """Tell the owner that this worker's part has been read; the answer says ``ok`` or ``stale``."""
        return self._tell("release", claim)

    def _tell(self, op: str, claim: Claim) -> Answer:
        body = {"grant": claim.grant, "part": self._rank, **claim.data}
        return self._client.call(claim.data["at"], op, body, self._options.release_timeout_s)

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Cancel what runs, end pipes and threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            reads = list(self._reads)
        for read in reads:
            self._client.soon(lambda read=read: self._stop(read, ClosedError("the buffer was closed")))  # type: ignore[misc]
        deadline = time.monotonic() + _CLOSE_S
        over = [read.transfer for read in reads if not _over(read.transfer, deadline)]
        self._server.close()
        self._pipes.drop_all()
        self._client.soon(self._links.drop_all)
        self._client.flush()
        self._client.close()
        for crew in self._crews:
            crew.close()
        for transfer in over:
            transfer.finish(LoadError("the buffer was closed"))

    # -- reading ------------------------------------------------------------------------

    def _start(
        self,
        claim: Claim,
        remote: BlockIds,
        local: BlockIds,
        on_done: Callable[[Transfer], None],
        *,
        release: bool,
    ) -> Transfer:
        transfer = Transfer(self._memory.layout.nbytes(local), lambda: self._cancelled(read))
        read = _Read(claim, remote, local, transfer, release)
        transfer.add_done_callback(on_done)
        with self._lock:
            refused = self._closed
            if not refused:
                self._reads.add(read)
        link = self._links.at_hand(str(claim.data.get("at")), str(claim.data.get("incarnation")))
        if refused:
            self._finish(read, ClosedError("the buffer was closed"))
        elif link is not None:
            # Each change of threads may wait for the interpreter lock, milliseconds beside a busy engine.
            self._begin(read, link)
        elif not self._client.soon(lambda: self._begin(read)):
            self._finish(read, ClosedError("the buffer was closed"))
        return transfer

    def _cancelled(self, read: _Read) -> None:
        self._client.soon(lambda: self._stop(read, LoadError("the load was cancelled")))

    def _begin(self, read: _Read, link: Link | None = None) -> None:
        try:
            _check_owned(read)
            # A pipeline stage without a layer of the last groups has nothing of them to move.
            groups = self._memory.layout.num_groups
            read.remote, read.local = read.remote[:groups], read.local[:groups]
            self._memory.layout.check(read.local)
        except KVConnectError as error:
            self._finish(read, error)
            return
        if link is None:
            self._limit(read)
            self._link(read)
        else:
            self._linked(read, link)
            self._limit(read)

    def _limit(self, read: _Read) -> None:
        """Give up in time."""
        timeout_s = self._options.transfer_timeout_s
        late = DeadlineError(f"the load did not end within {timeout_s:g} s")
        read.timer = self._client.later(timeout_s, lambda: self._stop(read, late))
        if read.transfer.done:
            read.timer.cancel()

    def _linked(self, read: _Read, link: Link | KVConnectError) -> None:
        if read.transfer.done:
            return
        if isinstance(link, KVConnectError):
            self._finish(read, link)
            return
        read.link, read.transfer.via = link, link.name
        patience_s = self._links.patience_s(link, read.transfer.nbytes)
        if patience_s is not None:
            self._client.later(patience_s, lambda: self._overdue(read, link))
        self._ask(read)
        if link.immediate:
            self._move(read, link.pipe)
            return
        # Placing many blocks takes a while, and a third party's may block: too long for a
        # thread that serves all peers. Reads of one pipe start one after another.
        pipe = link.pipe
        if not self._starting.submit(lambda: self._move(read, pipe), lane=link):
            self._finish(read, ClosedError("the buffer was closed"))

    def _ask(self, read: _Read) -> None:
        """Have the owner promise, while the blocks move, that they stay as they are, unless it has or cannot."""
        promise = read.claim.promise
        if not read.release or promise.foreign or promise.holds(_ENOUGH_S):
            return
        if promise.question is None or promise.question.done():
            promise.ask(lambda: self._tell("claim", read.claim))
        read.question = promise.question

    def _move(self, read: _Read, pipe: Pipe | Trial | None) -> None:
        with self._lock:
            stopped = read.stopped
            read.moving = stopped is None
        if stopped is not None:
            return  # `_stop` has finished it
        begun = time.monotonic()
        if self._options.checksum:
            read.sum = self._integrity.ask(read.link, read.remote)
        try:
            if pipe is None:
                raise ClosedError("the pipe was closed")
            inner = pipe.read_blocks(read.remote, read.local)
        except Exception as error:  # noqa: BLE001 - a third party's may raise anything
            inner = Transfer(0)
            inner.finish(foreign(error))
        read.mark("launched")
        with self._lock:
            read.inner, stopped = inner, read.stopped
        if stopped is not None:
            inner.cancel()
        inner.add_done_callback(lambda _: self._moved(read, inner, begun))

    # Whichever thread this is: one change of threads less before the engine may go on.

    def _moved(self, read: _Read, inner: Transfer, begun: float) -> None:
        if inner.error is None:
            read.mark("moved")
        with self._lock:
            self._counts["microseconds_on_wire"] += int((time.monotonic() - begun) * 1e6)
        if inner.error is not None or read.stopped is not None:
            self._client.soon(lambda: self._failed(read, inner.error))
        elif read.sum is not None:
            read.checking = True
            self._integrity.compare(read.sum, read.local, lambda error: self._compared(read, error))
        else:
            self._compared(read, None)

    def _compared(self, read: _Read, error: KVConnectError | None) -> None:
        if error is not None or not read.release:
            self._finish(read, error)
        else:
            self._confirm(read)

    def _confirm(self, read: _Read) -> None:
        """End a load, its bytes in place, once the owner vouches for them."""
        question, read.question = read.question, None
        if read.stopped is not None:
            self._finish(read, read.stopped)
        elif read.claim.promise.holds():
            self._finish(read, None)
            self.release(read.claim)  # its answer changes nothing
        elif question is not None:
            question.add_done_callback(lambda _: self._confirm(read))  # sooner answered than another one
        else:
            self._release(read)

    def _release(self, read: _Read, *, again: bool = True) -> None:
        self.release(read.claim).add_done_callback(lambda answer: self._released(read, answer, again=again))

    def _released(self, read: _Read, answer: Answer, *, again: bool) -> None:
        try:
            verdict = answer.result().get("answer")
        except BrokenError as error:
            if again and read.stopped is None:
                # Over a new connection, once. Had the owner ended the entry already, it says "stale".
                self._release(read, again=False)
            else:
                self._finish(read, error)
            return
        except KVConnectError as error:
            self._finish(read, error)
            return
        stale = StaleError("the owner's lease on the blocks had ended before they were read")
        self._finish(read, None if verdict == "ok" else stale)

    # -- on the client's thread -----------------------------------------------------------

    def _link(self, read: _Read) -> None:
        try:
            at, incarnation = fields.text(read.claim.data, "at"), fields.text(read.claim.data, "incarnation")
        except KVConnectError as error:
            self._finish(read, error)
            return
        self._links.get(at, incarnation, lambda link: self._linked(read, link))

    def _overdue(self, read: _Read, link: Link) -> None:
        if read.link is link and not read.transfer.done:
            self._links.overdue(link, read.inner)

    def _failed(self, read: _Read, error: KVConnectError | None) -> None:
        failure, link = read.stopped or error, read.link
        again = failure is not None and link is not None and self._links.failed(link, failure, retried=read.retried)
        if again and read.stopped is None:
            read.link = read.inner = None
            read.moving, read.retried = False, True
            self._link(read)
        else:
            self._finish(read, failure)

    def _stop(self, read: _Read, error: KVConnectError) -> None:
        """Give up. A transfer under way keeps its blocks until its pipe has let go of them."""
        if read.transfer.done or read.stopped is not None:
            return
        with self._lock:
            read.stopped = error
            link, inner, moving = read.link, read.inner, read.moving
        if link is None or not moving or read.checking:
            self._finish(read, error)
            return
        if inner is not None:
            inner.cancel()
        # Without ``inner`` the pipe is still starting: only its end can unblock it.
        if inner is None or not inner.done:
            self._client.later(_LET_GO_S, lambda: None if read.transfer.done else self._links.drop(link))

    def _finish(self, read: _Read, error: KVConnectError | None) -> None:
        if read.timer is not None:
            read.timer.cancel()
        with self._lock:
            self._reads.discard(read)
            if read.transfer.done:
                return
            if error is None:
                if read.link is not None:
                    read.link.proved = True
                self._counts.update(loads=1, bytes=read.transfer.nbytes)
            else:
                self._counts[f"failed_{type(error).__name__.removesuffix('Error').lower()}"] += 1
        read.transfer.finish(_as_load_error(read, error))

    def _lost(self, pipe: str, side: Side) -> None:
        if side == "asks":
            self._links.lost(pipe)
        else:
            self._pipes.drop(pipe)


def _drop_unused(links: Links, reads: set[_Read], client: ControlClient, idle_s: float) -> None:
    """From now on, have pipes closed that nobody has used for ``idle_s``."""
    pause_s = max(idle_s / 4, _LEAST_PAUSE_S)

    def look() -> None:
        busy = {read.link for read in list(reads)}
        links.drop_unused(client.clock.now() - idle_s, busy)
        client.later(pause_s, look)

    client.later(pause_s, look)


def _check_owned(read: _Read) -> None:
    """Raise `LoadError` unless all that is to be read belongs to the claim."""
    if len(read.remote) > len(read.claim.blocks):
        raise LoadError(f"the claim has {len(read.claim.blocks)} groups, {len(read.remote)} are to be read")
    for group, (wanted, owned) in enumerate(zip(read.remote, read.claim.blocks, strict=False)):
        if not set(owned).issuperset(wanted):
            raise LoadError(f"blocks of group {group} are to be read that the claim does not cover")


def _as_load_error(read: _Read, error: KVConnectError | None) -> KVConnectError | None:
    if error is None or isinstance(error, (LoadError, DeadlineError, IntegrityError)):
        return error
    failed = LoadError(f"KV could not be read from {read.claim.data.get('at')}: {error}")
    failed.__cause__ = error
    return failed


def _over(transfer: Transfer, deadline: float) -> bool:
    # Its own error is the engine's business; only whether it is over counts here.
    with contextlib.suppress(KVConnectError):
        transfer.wait(max(0.0, deadline - time.monotonic()))
    return transfer.done
