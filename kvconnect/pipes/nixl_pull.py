"""One running read of a peer's blocks: in runs straight into place, or portion by portion through staging memory.

All of it happens on the agent's thread, so that there are no locks: whatever another
thread wants of a read is done there in its turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kvconnect.errors import KVConnectError
from kvconnect.paging import BlockIds, IoVec
from kvconnect.pipes.base import Message
from kvconnect.pipes.flows import pack
from kvconnect.pipes.nixl_agent import Read
from kvconnect.pipes.nixl_choice import Mode
from kvconnect.pipes.nixl_meeting import Target
from kvconnect.pipes.nixl_notes import Note, Notes, What
from kvconnect.pipes.nixl_staging import DEPTH, Blocks, Slot, StagedMemory, Use, failed, portions, whole
from kvconnect.pipes.nixl_thread import Then

if TYPE_CHECKING:
    from torch import Tensor

OnOver = Callable[["Pull"], None]


class End(Protocol):
    """What a pull needs of its end of the pipe."""

    shared: StagedMemory
    notes: Notes
    timeout_s: float

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def target(self) -> Target:
        """Return the other end; raise `BrokenError` if it is unknown."""


@dataclass(frozen=True)
class Plan:
    """What to read.

    Args:
        mode: how.
        remote: the peer's blocks.
        local: this end's.
        runs: in how many runs they lie.
        portion_bytes: what is read in one go.

    """

    mode: Mode
    remote: BlockIds
    local: BlockIds
    runs: int
    portion_bytes: int


@dataclass
class _State:
    """How far a read is."""

    #: Portions that have not arrived; reads under way; reads and copies that touch local blocks right now.
    left: int = 0
    reading: int = 0
    touching: int = 0
    #: The peer knows of it.
    heard: bool = False
    #: Everything is here, and the peer was asked whether it counts; or it was given up, and the peer was told.
    ended: bool = False
    confirmed: bool = False
    reported: bool = False


class Pull:
    """A read under way. It calls ``on_over`` once, after the last access to local blocks, on the agent's thread."""

    def __init__(self, end: End, number: int, nbytes: int, on_over: OnOver) -> None:
        self.number, self.nbytes = number, nbytes
        self.error: KVConnectError | None = None
        self.stamp = self.begun = time.monotonic()
        self.plan: Plan | None = None
        self._end, self._on_over = end, on_over
        self._state = _State()
        #: The peer's and our blocks of what is to be read straight into place.
        self._direct: Iterator[tuple[Blocks, Blocks]] = iter(())
        #: Our blocks of the portions that nothing was heard of.
        self._staged: dict[int, Blocks] = {}

    # -- from any thread ---------------------------------------------------------------

    def start(self, plan: Plan) -> None:
        """Begin, unless it was given up before."""
        self.stamp = self.begun = time.monotonic()
        # Before the peer hears of it: its first note may be here before this thread goes on.
        self._soon(partial(self._begin, plan))
        groups = pack(plan.remote) if plan.mode == "staged" else []
        body = {"transfer": self.number, "groups": groups, "portion_bytes": plan.portion_bytes}
        answer = self._end.tell("nixl.begin", body)
        answer.add_done_callback(lambda answer: self._soon(partial(self._heard, answer.exception())))

    def fail(self, error: KVConnectError) -> None:
        """Give up: over once nothing of it touches local memory any more."""
        self._soon(partial(self._fail, error))

    def _soon(self, step: Callable[[], None]) -> None:
        self._end.shared.agent.soon(step)

    # -- the beginning -------------------------------------------------------------------

    def _begin(self, plan: Plan) -> None:
        if self.error is not None:
            return
        self.plan = plan
        self._end.shared.agent.watch(self, self._end.timeout_s)
        layout = self._end.shared.memory.layout
        ours = list(portions(layout, plan.local, plan.portion_bytes))
        self._state.left = len(ours)
        if not ours:
            self._arrived()
        elif plan.mode == "staged":
            self._staged = dict(enumerate(ours))
            try:
                self._end.shared.slots.expect()
                self._end.shared.slots.open()
            except Exception as error:  # noqa: BLE001 - the device's allocator may raise anything
                self._fail(failed(error))
        else:
            self._direct = zip(portions(layout, plan.remote, plan.portion_bytes), ours, strict=True)
            self._read_on()

    def _heard(self, error: BaseException | None) -> None:
        self._state.heard = True
        if error is not None:
            self._fail(failed(error))

    def _read(self, local: IoVec, remote: IoVec, then: Then, *, again: bool = False) -> None:
        target, shared = self._end.target(), self._end.shared

        def over(error: KVConnectError | None) -> None:
            self._state.reading -= 1
            then(error)
            self._say_if_given_up()

        shared.agent.read(Read(target.peer.name, (shared.place, local), (target.place, remote), over, shared, again))
        self._state.reading += 1

    # -- straight into place ---------------------------------------------------------------

    def _read_on(self) -> None:
        try:
            while self._state.touching < DEPTH and (blocks := next(self._direct, None)) is not None:
                remote, local = self._end.target().runs.cut(*blocks)
                self._read(local, remote, self._run_over)
                self._state.touching += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, this transfer ends with it
            self._fail(failed(error))

    def _run_over(self, error: KVConnectError | None) -> None:
        self._touched(error)
        if error is None:
            self._read_on()
            self._arrived_one()

    # -- through staging memory --------------------------------------------------------------

    def full(self, number: int, address: int) -> None:
        """The peer has gathered a portion."""
        self._state.heard = True
        self._end.shared.slots.take(Use.LANDING, partial(self._fetch, number, address))

    def _fetch(self, number: int, address: int, slot: Slot) -> None:
        blocks = self._staged.pop(number, None)
        if blocks is None:  # it was given up
            self._end.shared.slots.give(slot)
            return
        source = slot.tensor[: self._end.shared.memory.layout.nbytes(blocks)]
        local = whole(source)
        remote = local.copy()
        remote[0, 0] = address
        then = partial(self._landed, number, blocks, slot, source)
        try:
            # It touches no blocks: given up, it may end late without harm.
            self._read(local, remote, then, again=True)
        except KVConnectError as error:
            then(error)

    def _landed(self, number: int, blocks: Blocks, slot: Slot, source: Tensor, error: KVConnectError | None) -> None:
        shared = self._end.shared
        self._end.notes.send(Note(What.TAKEN, self.number, number))
        if error is None and self.error is None:
            try:
                shared.agent.follow(shared.stager.scatter(source, shared.memory, blocks), partial(self._placed, slot))
            except Exception as caught:  # noqa: BLE001 - kernels may raise anything; this transfer ends with it
                error = failed(caught)
            else:
                self._state.touching += 1
                self._arrived_one()
                return
        shared.slots.give(slot)
        if error is not None:
            self._fail(error)

    def _placed(self, slot: Slot, error: KVConnectError | None) -> None:
        self._end.shared.slots.give(slot)
        self._touched(error)

    # -- the end -----------------------------------------------------------------------------

    def _touched(self, error: KVConnectError | None) -> None:
        self._state.touching -= 1
        if error is not None:
            self._fail(error)
        self._report_if_over()

    def _arrived_one(self) -> None:
        self.stamp = time.monotonic()
        self._state.left -= 1
        if self._state.left == 0:
            self._arrived()

    def _arrived(self) -> None:
        """Ask whether the bytes count: only if the peer still vouches for its blocks now that they are here."""
        if self._state.ended:
            return
        self._state.ended = True
        if self._state.heard and self._end.shared.agent.eager:
            self._end.notes.send(Note(What.END, self.number))
        # By the channel as well, which knows when nobody is there to answer.
        answer = self._end.tell("nixl.end", {"transfer": self.number})
        answer.add_done_callback(lambda answer: self._soon(partial(self.confirmed, answer.exception())))

    def confirmed(self, error: BaseException | None = None) -> None:
        """The peer vouches for its blocks, or does not. Second answers, and any not asked for, are ignored."""
        if not self._state.ended:
            return
        if error is not None and not self._state.confirmed:
            self._fail(failed(error))
        self._state.confirmed = True
        self._report_if_over()

    def _fail(self, error: KVConnectError) -> None:
        if self._state.reported:
            return
        self.error = self.error or error
        self._direct, self._staged = iter(()), {}
        self._say_if_given_up()
        self._report_if_over()

    def _say_if_given_up(self) -> None:
        """Tell the peer, once nothing is read of it: its agent has to be progressed until then."""
        if self.error is not None and not self._state.ended and not self._state.reading:
            self._state.ended = True
            self._end.tell("nixl.end", {"transfer": self.number})

    def _report_if_over(self) -> None:
        over = self.error is not None or self._state.confirmed
        if over and not self._state.touching and not self._state.reported:
            self._state.reported = True
            self._end.shared.agent.unwatch(self)
            self._on_over(self)
