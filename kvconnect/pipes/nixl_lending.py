"""What one end does for the other one's reads: progress the agent, gather portions, vouch for the blocks.

The other end names all blocks at once. Portions are gathered ahead into whatever slots
there are, up to `DEPTH`, and told of one by one; a slot is free again when the other end
has read it.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from kvconnect import blocks as paged
from kvconnect.errors import BusyError, DeadlineError, HandshakeError, KVConnectError
from kvconnect.pipes.base import Message
from kvconnect.pipes.chunks import Threads
from kvconnect.pipes.flows import count, unpack
from kvconnect.pipes.nixl_notes import Note, Notes, What
from kvconnect.pipes.nixl_staging import DEPTH, Blocks, Slot, StagedMemory, Use, failed, portions

#: What the other end may have running here at once; the rest of its requests is refused.
MAX_REQUESTS: Final = 1024


class Lender(Protocol):
    """What lending needs of its end of the pipe."""

    shared: StagedMemory
    notes: Notes
    timeout_s: float

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def check(self) -> None:
        """Raise if this end's block path is over."""

    def check_time(self, now: float) -> bool:
        """See `Threads.watch`."""


@dataclass(eq=False)
class _Lent:
    """A read of the other end: portions to be gathered, and slots that wait for it to read them."""

    transfer: int
    portions: deque[tuple[int, Blocks]]
    slots: dict[int, Slot] = field(default_factory=dict)
    #: Portions that have a slot, or wait for one.
    held: int = 0
    over: bool = False
    stamp: float = field(default_factory=time.monotonic)


class Lending:
    """All reads of one other end. But for `on_begin` and `rested`, on the agent's thread."""

    def __init__(self, end: Lender) -> None:
        self._end = end
        self._lent: dict[int, _Lent] = {}
        #: Reads that wait until the other end knows the memory that slots lie in; none once it does.
        self._unknown: list[_Lent] | None = []

    def on_begin(self, body: dict[str, Any]) -> dict[str, Any]:
        """A read begins, of the blocks named if they are to be gathered."""
        end = self._end
        end.check()
        transfer, blocks = count(body, "transfer"), unpack(body.get("groups"))
        layout, portion_bytes = end.shared.memory.layout, count(body, "portion_bytes")
        layout.check(blocks)
        paged.check_counts(layout, blocks)
        if portion_bytes > end.shared.slots.slot_bytes:
            raise HandshakeError(f"portions of {portion_bytes} bytes do not fit into {end.shared.slots.slot_bytes}")
        if transfer in self._lent or len(self._lent) >= MAX_REQUESTS:
            raise BusyError(f"transfer {transfer} runs already, or {MAX_REQUESTS} others do")
        cut = deque(enumerate(portions(layout, blocks, portion_bytes)))
        end.shared.agent.soon(partial(self._begin, _Lent(transfer, cut)))
        return {}

    def _begin(self, lent: _Lent) -> None:
        if lent.transfer in self._lent or len(self._lent) >= MAX_REQUESTS:
            return  # asked for twice before this thread got to the first: the slots of that one must not be lost
        self._lent[lent.transfer] = lent
        self._end.shared.agent.watch((self, lent.transfer), self._end.timeout_s)
        if not lent.portions:
            return
        Threads.current().watch(self._end)
        if self._unknown is None:
            self._go_on(lent)
            return
        self._unknown.append(lent)
        if len(self._unknown) == 1:
            self._introduce()

    def _introduce(self) -> None:
        """Tell of the memory that slots lie in, before the first of them."""
        shared = self._end.shared
        try:
            memory = shared.agent.card(shared.place, shared.slots.open())
        except Exception as error:  # noqa: BLE001 - the device's allocator may raise anything; the other end hears of it
            self._introduced(failed(error))
            return
        self._end.tell("nixl.memory", memory).add_done_callback(
            lambda answer: shared.agent.soon(partial(self._introduced, answer.exception()))
        )

    def _introduced(self, error: BaseException | None) -> None:
        waiting, self._unknown = self._unknown or [], None if error is None else []
        for lent in waiting:
            if error is None:
                self._go_on(lent)
            else:
                self._refuse(lent, error)

    # -- portions --------------------------------------------------------------------------

    def _go_on(self, lent: _Lent) -> None:
        while lent.portions and lent.held < DEPTH and not lent.over:
            lent.held += 1
            self._end.shared.slots.take(Use.LENDING, partial(self._gather, lent, *lent.portions.popleft()))

    def _gather(self, lent: _Lent, number: int, blocks: Blocks, slot: Slot) -> None:
        shared = self._end.shared
        if lent.over:
            shared.slots.give(slot)
            return
        try:
            nbytes = shared.memory.layout.nbytes(blocks)
            is_over = shared.stager.gather(shared.memory, blocks, slot.tensor[:nbytes])
        except Exception as error:  # noqa: BLE001 - kernels may raise anything; the other end hears of it
            shared.slots.give(slot)
            self._refuse(lent, error)
            return
        shared.agent.follow(is_over, partial(self._gathered, lent, number, slot))

    def _gathered(self, lent: _Lent, number: int, slot: Slot, error: KVConnectError | None) -> None:
        if lent.over or error is not None:
            self._end.shared.slots.give(slot)
        else:
            lent.slots[number] = slot
            self._end.notes.send(Note(What.FULL, lent.transfer, number, slot.address))
        if error is not None:
            self._refuse(lent, error)

    def taken(self, transfer: int, number: int) -> None:
        """A portion was read."""
        lent = self._lent.get(transfer)
        slot = None if lent is None else lent.slots.pop(number, None)
        if lent is None or slot is None:
            return
        lent.stamp = time.monotonic()
        lent.held -= 1
        self._end.shared.slots.give(slot)
        self._go_on(lent)

    # -- ends ------------------------------------------------------------------------------

    def _refuse(self, lent: _Lent, error: BaseException) -> None:
        if not lent.over:
            self._end.tell("nixl.refused", {"transfer": lent.transfer, "error": str(failed(error))})
            self.drop(lent.transfer)

    def on_end(self, body: dict[str, Any]) -> dict[str, Any]:
        """A read is over; the answer vouches for what was read. On the channel's thread."""
        self._end.shared.agent.soon(partial(self.drop, count(body, "transfer")))
        self._end.check()
        return {}

    def drop(self, transfer: int) -> None:
        """A read is over; unknown ones are ignored."""
        lent = self._lent.pop(transfer, None)
        if lent is None:
            return
        lent.over = True
        self._end.shared.agent.unwatch((self, transfer))
        for slot in lent.slots.values():
            self._end.shared.slots.give(slot)

    def drop_all(self) -> None:
        """The pipe is over."""
        for transfer in list(self._lent):
            self.drop(transfer)

    def rested(self, now: float) -> bool:
        """Take slots back from an end that does not read them; return whether any read is under way. Any thread."""
        for lent in list(self._lent.values()):
            if lent.slots and now - lent.stamp > self._end.timeout_s:
                late = DeadlineError(f"a portion was not read within {self._end.timeout_s} s")
                self._end.shared.agent.soon(partial(self._refuse, lent, late))
        return bool(self._lent)
