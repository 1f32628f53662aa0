"""The block path of a NIXL pipe: who reads what from whom, and how both ends agree on it.

A read is a `Pull`; a write asks the other end to pull. Over the channel go the ids,
what the peer's agent is called, and two things that NIXL has no word for: that a
read begins (the target's agent has to be progressed meanwhile, and perhaps to gather),
and whether the target still vouches for its blocks when they have arrived. What is
told while bytes move goes by `kvconnect.pipes.nixl_notes`. Handlers never wait.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kvconnect import blocks as paged
from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    DeadlineError,
    HandshakeError,
    KVConnectError,
    LoadError,
)
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes import turns
from kvconnect.pipes.base import Channel, Message, Transfer
from kvconnect.pipes.chunks import Threads
from kvconnect.pipes.flows import count, pack, unpack
from kvconnect.pipes.nixl_agent import Agent
from kvconnect.pipes.nixl_choice import Mode, costs
from kvconnect.pipes.nixl_lending import MAX_REQUESTS, Lending
from kvconnect.pipes.nixl_meeting import Meeting, Target
from kvconnect.pipes.nixl_notes import Note, Notes, What
from kvconnect.pipes.nixl_pull import Plan, Pull
from kvconnect.pipes.nixl_staging import StagedMemory, failed
from kvconnect.pipes.nixl_write import Write

log = logging.getLogger(__name__)


@dataclass
class _Running:
    """Transfers under way at one end, by number."""

    pulls: dict[int, Pull] = field(default_factory=dict)
    #: The remote and local blocks of those that wait for the other end to introduce itself.
    waiting: dict[int, tuple[BlockIds, BlockIds]] = field(default_factory=dict)
    #: What the other end reads for us.
    writes: dict[int, Write] = field(default_factory=dict)
    #: Which of our pulls each of the other end's writes is.
    pulls_for: dict[int, int] = field(default_factory=dict)


class NixlBlocks:
    """One end's block path. Thread-safe.

    Args:
        agent: of this process.
        local: this end's paged memory.
        remote: the other end's layout.
        channel: to the other end.
        mode: ``"runs"``, ``"staged"``, or ``None`` to take whichever is quicker.
        portion_bytes: what is read in one go.
        timeout_s: a transfer on which nothing moves for so long fails.

    Raises:
        HandshakeError: the two layouts' shapes differ.
        UnavailableBackendError: this kind of memory cannot be gathered.
        BrokenError: NIXL refuses the memory.

    """

    def __init__(
        self,
        agent: Agent,
        local: PagedMemory,
        remote: PagedLayout,
        channel: Channel,
        *,
        mode: Mode | None,
        portion_bytes: int,
        timeout_s: float,
    ) -> None:
        paged.check_shapes(local.layout, remote)
        self.shared = StagedMemory.open(agent, local, portion_bytes)
        self.timeout_s = timeout_s
        self.notes = Notes(agent, self)
        self._local, self._remote, self._channel, self._mode = local, remote, channel, mode
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._meeting = Meeting(self, local, remote, self.notes.token)
        self._failure: KVConnectError | None = None
        self._closed = self._left = False
        self._running = _Running()
        self._lent = Lending(self)
        for op, handler in self._handlers().items():
            channel.handle(op, handler)
        self._meeting.introduce()

    # -- asking ---------------------------------------------------------------------

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """As `Pipe.read_blocks`."""
        nbytes = paged.check_pair(self._local.layout, local, self._remote, remote)
        transfer: Transfer

        def over(pull: Pull) -> None:
            self._forget(pull)
            transfer.finish(pull.error)

        pull = Pull(self, next(self._numbers), nbytes, over)
        transfer = Transfer(nbytes, lambda: pull.fail(_cancelled()))
        self._enter(pull, remote, local)
        return transfer

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """As `Pipe.write_blocks`: the other end reads, and says when it has."""
        nbytes = paged.check_pair(self._local.layout, local, self._remote, remote)
        write = Write(self, next(self._numbers), nbytes)
        with self._lock:
            self.check()
            self._running.writes[write.number] = write
        Threads.current().watch(self)
        body = {"transfer": write.number, "from": pack(local), "into": pack(remote), "nbytes": nbytes}
        self.tell("nixl.pull", body).add_done_callback(write.told)
        return write.transfer

    def _enter(self, pull: Pull, remote: BlockIds, local: BlockIds) -> None:
        with self._lock:
            self.check()
            self._running.pulls[pull.number] = pull
            known = self._meeting.target is not None
            if not known:
                self._running.waiting[pull.number] = (remote, local)
        Threads.current().watch(self)
        if known:
            self._start(pull, remote, local)
        else:
            self._meeting.introduce()

    def _start(self, pull: Pull, remote: BlockIds, local: BlockIds) -> bool:
        try:
            target = self.target()
            runs = target.runs.count(remote, local)
            mode = self._mode or costs(target.peer.name, self.shared.place.kind).choose(runs, pull.nbytes)
            portion_bytes = min(target.slot_bytes, self.shared.slots.slot_bytes)
            pull.start(Plan(mode, remote, local, runs, portion_bytes))
        except Exception as error:  # noqa: BLE001 - whatever it is, this transfer ends with it
            pull.fail(failed(error))
        return False

    def _forget(self, pull: Pull) -> None:
        with self._lock:
            self._running.pulls.pop(pull.number, None)
            self._running.waiting.pop(pull.number, None)
        target, plan = self._meeting.target, pull.plan
        if pull.error is None and plan is not None and pull.nbytes and target is not None:
            known = costs(target.peer.name, self.shared.place.kind)
            known.note(plan.mode, plan.runs, pull.nbytes, time.monotonic() - pull.begun)
        self._leave_if_over()

    def forget_write(self, write: Write) -> None:
        """A write is over."""
        with self._lock:
            self._running.writes.pop(write.number, None)

    # -- what a pull needs -------------------------------------------------------------

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; whatever fails is in the future."""
        try:
            return self._channel.call(op, body)
        except Exception as error:  # noqa: BLE001 - a third party's channel that raises has failed, no more
            failure: Future[dict[str, Any]] = Future()
            failure.set_exception(failed(error))
            return failure

    def target(self) -> Target:
        """Return the other end; raise `BrokenError` if it is unknown."""
        return self._meeting.check()

    def met(self) -> None:
        """Begin what waited for the other end."""
        with self._lock:
            waiting = [(self._running.pulls[number], *ids) for number, ids in self._running.waiting.items()]
            self._running.waiting.clear()
        for pull, remote, local in waiting:
            turns.shared().add(partial(self._start, pull, remote, local))

    # -- answering -------------------------------------------------------------------------

    def _handlers(self) -> dict[str, Any]:
        return {
            "nixl.card": self._meeting.on_card,
            "nixl.begin": self._lent.on_begin,
            "nixl.end": self._lent.on_end,
            "nixl.memory": self._meeting.on_memory,
            "nixl.note": self.notes.on_note,
            "nixl.refused": self._on_refused,
            "nixl.pull": self._on_pull,
            "nixl.pulled": self._on_pulled,
            "nixl.stop": self._on_stop,
            "nixl.running": self._on_running,
            "nixl.closed": self._on_closed,
        }

    def noted(self, note: Note) -> None:
        """The other end has told something. On the agent's thread."""
        if note.what is What.TAKEN:
            self._lent.taken(note.transfer, note.portion)
        elif note.what is What.END:
            self._lent.drop(note.transfer)
            if self._failure is None:
                self.notes.send(Note(What.ENDED, note.transfer))
        else:
            pull = self._pull(note.transfer)
            if pull is not None and note.what is What.FULL:
                pull.full(note.portion, note.address)
            elif pull is not None:
                pull.confirmed()

    def _pull(self, number: int) -> Pull | None:
        with self._lock:
            return self._running.pulls.get(number)

    def _on_refused(self, body: dict[str, Any]) -> dict[str, Any]:
        pull = self._pull(count(body, "transfer"))
        if pull is not None:
            pull.fail(LoadError(f"the other end could not go on: {body.get('error')}"))
        return {}

    def _on_pull(self, body: dict[str, Any]) -> dict[str, Any]:
        """The other end writes: read its blocks into ours."""
        self.check()
        theirs, ours, asked = unpack(body.get("from")), unpack(body.get("into")), count(body, "transfer")
        nbytes = paged.check_pair(self._local.layout, ours, self._remote, theirs)
        paged.check_counts(self._local.layout, ours)
        if nbytes != body.get("nbytes"):
            raise HandshakeError(f"these blocks have {nbytes} bytes here, {body.get('nbytes')} at the other end")
        with self._lock:
            if asked in self._running.pulls_for or len(self._running.pulls_for) >= MAX_REQUESTS:
                raise BusyError(f"transfer {asked} runs already, or {MAX_REQUESTS} others do")

        def over(pull: Pull) -> None:
            self._forget(pull)
            with self._lock:
                self._running.pulls_for.pop(asked, None)
            self.tell("nixl.pulled", {"transfer": asked, "error": None if pull.error is None else str(pull.error)})

        pull = Pull(self, next(self._numbers), nbytes, over)
        with self._lock:
            self._running.pulls_for[asked] = pull.number
        turns.shared().add(partial(self._begin_pull, pull, theirs, ours))
        return {}

    def _begin_pull(self, pull: Pull, remote: BlockIds, local: BlockIds) -> bool:
        try:
            self._enter(pull, remote, local)
        except KVConnectError as error:
            pull.fail(error)
        return False

    def _on_pulled(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            write = self._running.writes.get(count(body, "transfer"))
        if write is not None:
            error = body.get("error")
            write.over(None if error is None else LoadError(f"the other end could not go on: {error}"))
        return {}

    def _on_stop(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = count(body, "transfer")
        with self._lock:
            number = self._running.pulls_for.get(asked)
            pull = None if number is None else self._running.pulls.get(number)
        if pull is not None:
            pull.fail(LoadError("the other end gave the transfer up"))
        return {"running": number is not None}

    def _on_running(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return {"running": count(body, "transfer") in self._running.pulls_for}

    def _on_closed(self, body: dict[str, Any]) -> dict[str, Any]:
        self.fail(BrokenError("the other end was closed"))
        return {}

    # -- the end -----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if this block path is over."""
        if self._failure is not None:
            fresh = ClosedError if isinstance(self._failure, ClosedError) else BrokenError
            raise fresh(str(self._failure)) from self._failure

    def fail(self, error: KVConnectError) -> None:
        """End all transfers with ``error``; begin no more."""
        with self._lock:
            self._failure = self._failure or error
            pulls, writes = list(self._running.pulls.values()), list(self._running.writes.values())
        for pull in pulls:
            pull.fail(error)
        for write in writes:
            write.over(error)
        self.shared.agent.soon(self._lent.drop_all)

    def close(self, error: KVConnectError) -> None:
        """End all transfers with ``error``, and tell the other end. Idempotent, never blocks."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self.fail(error)
            self.tell("nixl.closed", {})
            self._leave_if_over()

    end = close

    def _leave_if_over(self) -> None:
        with self._lock:
            if not self._closed or self._running.pulls or self._left:
                return
            self._left = True
        self.notes.end()
        self._meeting.end()
        self.shared.leave()

    def check_time(self, now: float) -> bool:
        """Fail what rested too long; return whether anything runs (see `Threads.watch`)."""
        with self._lock:
            pulls, writes = list(self._running.pulls.values()), list(self._running.writes.values())
        for pull in pulls:
            if now - pull.stamp > self.timeout_s:
                pull.fail(DeadlineError(f"nothing moved for {self.timeout_s} s"))
        for write in writes:
            write.check_time(now)
        return self._lent.rested(now) or bool(pulls or writes)


def _cancelled() -> KVConnectError:
    return LoadError("the transfer was cancelled")


def check_device(local: PagedMemory, device: str) -> None:
    """Raise `HandshakeError` if the pipe was opened for another kind of memory than ``local`` is."""
    if torch.device(local.device).type != torch.device(device).type:
        raise HandshakeError(f"the pipe was opened for {device!r}, the memory is on {local.device!r}")
