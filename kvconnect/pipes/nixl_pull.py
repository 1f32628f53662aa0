"""One running read of a peer's blocks: in runs straight into place, or portion by portion through staging memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from kvconnect.errors import BrokenError, KVConnectError, LoadError
from kvconnect.paging import BlockIds, IoVec, Pieces, spans
from kvconnect.pipes import turns
from kvconnect.pipes.base import Message
from kvconnect.pipes.flows import pack
from kvconnect.pipes.nixl_agent import Read
from kvconnect.pipes.nixl_choice import Mode
from kvconnect.pipes.nixl_place import Place
from kvconnect.pipes.nixl_staging import DEPTH, Blocks, Slot, StagedMemory, failed, portions, whole

OnOver = Callable[["Pull"], None]


class End(Protocol):
    """What a pull needs of its end of the pipe."""

    shared: StagedMemory
    timeout_s: float
    portion_bytes: int

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def peer_name(self) -> str:
        """Return the other end's agent; raise `BrokenError` if it is unknown."""


@dataclass(frozen=True)
class Plan:
    """What to read.

    Args:
        mode: how.
        remote: the peer's blocks.
        local: this end's.
        place: the peer's kind of memory.
        pieces: both streams, cut at each other's seams: the peer's and ours.

    """

    mode: Mode
    remote: BlockIds
    local: BlockIds
    place: Place
    pieces: tuple[IoVec, IoVec]


@dataclass(eq=False)
class _Portion:
    number: int
    remote: Blocks
    local: Blocks
    nbytes: int
    slot: Slot | None = None


@dataclass
class _State:
    """How far a pull is: parts under way, whether more are to begin, whether none will, whether that was told."""

    flying: int = 0
    more: bool = True
    over: bool = False
    reported: bool = False


class Pull:
    """A read under way. It calls ``on_over`` once, after the last access to local blocks."""

    def __init__(self, end: End, number: int, nbytes: int, on_over: OnOver) -> None:
        self.number, self.nbytes = number, nbytes
        self.error: KVConnectError | None = None
        self.stamp = self.begun = time.monotonic()
        self.plan: Plan | None = None
        self._end, self._on_over = end, on_over
        self._lock = threading.Lock()
        self._parts: Iterator[Callable[[], None]] = iter(())
        self._state = _State()
        self._asked: dict[int, _Portion] = {}
        #: Portions that are read into staging memory; given up, they may end late without harm.
        self._reading: dict[int, _Portion] = {}

    # -- from outside ----------------------------------------------------------------

    def start(self, plan: Plan) -> None:
        """Begin, unless it was given up before."""
        with self._lock:
            if self.error is not None:
                return
            self.plan = plan
        self.stamp = self.begun = time.monotonic()
        self._end.tell("nixl.begin", {"transfer": self.number}).add_done_callback(self._told)
        if plan.mode == "runs":
            self._parts = self._runs(plan)
            self._advance()
        else:
            self._parts = self._portions(plan)
            turns.shared().add(self._open_landing)

    def fail(self, error: KVConnectError) -> None:
        """Give up: over once nothing of it touches local memory any more."""
        with self._lock:
            self.error = self.error or error
            self._state.more = False
            asked, self._asked = list(self._asked.values()), {}
            reading, self._reading = list(self._reading.values()), {}
            confirming = self._state.over
        for portion in asked:
            self._portion_over(portion, None)
        for _ in reading:
            self._part_over(None)  # its slot comes back when it has landed
        if confirming:
            self._report()
        else:
            self._finish_if_over()

    def gathered(self, number: int, address: int, error: str | None) -> None:
        """The peer has gathered a portion, or could not."""
        with self._lock:
            portion = self._asked.pop(number, None)
        if portion is None or portion.slot is None:
            return
        self.stamp = time.monotonic()
        if error is not None:
            self._portion_over(portion, LoadError(f"the other end could not gather: {error}"))
            return
        local = whole(portion.slot.tensor[: portion.nbytes])
        remote = local.copy()
        remote[0, 0] = address
        with self._lock:
            self._reading[number] = portion
        try:
            self._read(local, remote, lambda failure: self._landed(portion, failure))
        except KVConnectError as refused:
            self._landed(portion, refused)

    # -- parts -----------------------------------------------------------------------

    def _runs(self, plan: Plan) -> Iterator[Callable[[], None]]:
        theirs, ours = (Pieces(iov) for iov in plan.pieces)
        for start, stop in spans(self.nbytes, self._end.portion_bytes):
            remote, local = theirs.cut(start, stop), ours.cut(start, stop)
            yield lambda local=local, remote=remote: self._read(local, remote, self._part_over)  # type: ignore[misc]

    def _portions(self, plan: Plan) -> Iterator[Callable[[], None]]:
        layout, pool = self._end.shared.memory.layout, self._end.shared.landing
        cut = portions(layout, plan.remote, plan.local, self._end.portion_bytes)
        for number, (remote, local) in enumerate(cut):
            portion = _Portion(number, remote, local, layout.nbytes(local))
            yield lambda portion=portion: pool.take(lambda slot: self._ask(portion, slot))  # type: ignore[misc]

    def _open_landing(self) -> bool:
        try:
            self._end.shared.landing.open()
        except Exception as error:  # noqa: BLE001 - the device's allocator may raise anything; the transfer hears of it
            self.fail(failed(error))
            return False
        self._advance()
        return False

    def _advance(self) -> None:
        """Begin parts up to `DEPTH`."""
        depth = DEPTH[self._end.shared.kind]
        while True:
            with self._lock:
                if not self._state.more or self._state.flying >= depth:
                    break
                part = next(self._parts, None)
                if part is None:
                    self._state.more = False
                    break
                self._state.flying += 1
            try:
                part()
            except Exception as error:  # noqa: BLE001 - whatever it is, this transfer ends with it
                self._part_over(failed(error))
        self._finish_if_over()

    def _ask(self, portion: _Portion, slot: Slot) -> None:
        portion.slot = slot
        with self._lock:
            given_up = self.error is not None
            if not given_up:
                self._asked[portion.number] = portion
        if given_up:
            self._portion_over(portion, None)
            return
        body = {
            "transfer": self.number,
            "portion": portion.number,
            "groups": pack(portion.remote),
            "nbytes": portion.nbytes,
        }
        self._end.tell("nixl.gather", body).add_done_callback(self._told)

    def _told(self, answer: Future[dict[str, Any]]) -> None:
        error = answer.exception()
        if error is not None:
            self.fail(error if isinstance(error, KVConnectError) else BrokenError(f"the channel failed: {error!r}"))

    def _read(self, local: IoVec, remote: IoVec, on_over: Callable[[KVConnectError | None], None]) -> None:
        plan = self.plan
        if plan is None:
            raise BrokenError("a transfer went on that was not begun")
        peer, shared = self._end.peer_name(), self._end.shared
        places = (shared.place, local), (plan.place, remote)
        shared.agent.read(Read(peer, *places, on_over, shared))

    def _landed(self, portion: _Portion, failure: KVConnectError | None) -> None:
        with self._lock:
            given_up = self._reading.pop(portion.number, None) is None
        if given_up:
            if portion.slot is not None:
                self._end.shared.landing.give(portion.slot)
            return
        self._end.tell("nixl.taken", {"transfer": self.number, "portion": portion.number})
        if failure is not None or self.error is not None:
            self._portion_over(portion, failure)
        else:
            turns.shared().add(lambda: self._scatter(portion))

    def _scatter(self, portion: _Portion) -> bool:
        failure: KVConnectError | None = None
        shared = self._end.shared
        try:
            if self.error is None and portion.slot is not None:
                shared.stager.scatter(portion.slot.tensor[: portion.nbytes], shared.memory, portion.local)
        except Exception as error:  # noqa: BLE001 - kernels may raise anything; this transfer ends with it
            failure = failed(error)
        self._portion_over(portion, failure)
        return False

    def _portion_over(self, portion: _Portion, error: KVConnectError | None) -> None:
        slot, portion.slot = portion.slot, None
        if slot is not None:
            self._end.shared.landing.give(slot)
        self._part_over(error)

    def _part_over(self, error: KVConnectError | None) -> None:
        with self._lock:
            self._state.flying -= 1
            self.stamp = time.monotonic()
        if error is not None:
            self.fail(error)
        self._advance()

    def _finish_if_over(self) -> None:
        with self._lock:
            if self._state.over or self._state.more or self._state.flying:
                return
            self._state.over = True
        # The bytes count only if the peer still vouches for its blocks now that they are here.
        answer = self._end.tell("nixl.end", {"transfer": self.number})
        if self.error is not None:
            self._report()
        else:
            answer.add_done_callback(self._confirmed)

    def _confirmed(self, answer: Future[dict[str, Any]]) -> None:
        error = answer.exception()
        if error is not None and self.error is None:
            self.error = error if isinstance(error, KVConnectError) else BrokenError(f"the channel failed: {error!r}")
        self._report()

    def _report(self) -> None:
        with self._lock:
            first, self._state.reported = not self._state.reported, True
        if first:
            self._on_over(self)
