"""The two ends of one direction of an NCCL pipe, as state machines that one thread at a time steps.

The end that receives orders chunk after chunk (`kvconnect.pipes.nccl_plan`), and both
enqueue them in that order; nothing here waits. What a device does is behind `Wire`, what
the other end hears goes through `Tell`.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from kvconnect.errors import BrokenError, ClosedError, HandshakeError, KVConnectError, LoadError
from kvconnect.paging import BlockIds
from kvconnect.pipes.base import Message
from kvconnect.pipes.nccl_loop import Pace
from kvconnect.pipes.nccl_plan import WINDOW_SLOTS, Chunk, Key, Plan, Source, counts, cut, read_row

log = logging.getLogger(__name__)

#: Chunks that whoever brings work launches himself: they last until the thread that goes on is awake.
AT_ONCE = 2
#: Where nothing moves for so long, the other end is asked whether it is still there.
LOOK_S = 1.0


@dataclass(frozen=True)
class Move:
    """A chunk as the device sees it.

    Args:
        group: the KV-cache group.
        ids: this end's blocks; ``None`` to let what is received go.
        nbytes: bytes on the wire.

    """

    group: int
    ids: Sequence[int] | None
    nbytes: int


class Wire(Protocol):
    """One direction on this end's device. Called by one thread at a time; never blocks. Raises `BrokenError`."""

    slot_bytes: int

    def settled(self) -> bool:
        """Whether the other end has been met, so that `launch` may be called; goes on with that, if not."""
        ...

    def launch(self, move: Move) -> Callable[[], bool]:
        """Enqueue a chunk behind those before it; what is returned tells when the device has done it.

        Raises:
            HandshakeError: it is too large.

        """
        ...

    def abort(self) -> None:
        """Give up what waits for the other end. Returns at once."""
        ...

    def at_rest(self) -> bool:
        """After `abort`: whether the device does nothing any more. Then gives everything back, once."""
        ...


class Tell(Protocol):
    """How a line reaches the rest of its end, and the other one."""

    def call(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Ask the other end."""
        ...

    def end(self, error: KVConnectError) -> None:
        """Hear that the line cannot go on. May be called again."""
        ...


def ending(error: KVConnectError) -> KVConnectError:
    """Return ``error`` as what ends a pipe."""
    if isinstance(error, (BrokenError, ClosedError)):
        return error
    broken = BrokenError(str(error))
    broken.__cause__ = error
    return broken


class Line(ABC):
    """One end of a direction. All methods belong to one thread at a time; `ended` may be waited for."""

    #: How it waits for the device, once the ends have met.
    _waiting = Pace.WAITING

    def __init__(self, tell: Tell, timeout_s: float) -> None:
        self._tell, self._timeout_s = tell, timeout_s
        self._wire: Wire | None = None
        #: Whether the ends have met over the wire.
        self._met = False
        self._due: deque[tuple[Move, Chunk | None]] = deque()
        self._running: deque[tuple[Callable[[], bool], Chunk | None]] = deque()
        self._stamp: float | None = None
        self._asked = 0.0
        self.error: KVConnectError | None = None
        #: Set when it was ended and the device does nothing any more.
        self.ended = threading.Event()

    def wired(self, wire: Wire) -> None:
        """Go on over ``wire``."""
        self._wire = wire
        if self.error is not None:
            wire.abort()
            self.ended.clear()

    def start(self) -> None:
        """Launch the first chunks that wait; tell nobody that anything is over. Raises as `step` does."""
        for _ in range(AT_ONCE):
            if self.error is not None or self._wire is None or not self._met or not self._launch(self._wire):
                return

    def step(self, now: float) -> Pace:
        """Do what can be done; raise a `KVConnectError` if the line cannot go on."""
        if self.error is not None:
            return self._wind_up()
        if not self._busy():
            self._stamp = None
            return Pace.IDLE
        if self._stamp is None:
            self._stamp = self._asked = now
        if self._work():
            self._stamp = self._asked = now
            return Pace.MOVED
        self._look(now, self._stamp)
        return self._waiting if self._met else Pace.WAITING

    def fail(self, error: KVConnectError) -> None:
        """End; whoever waits hears ``error`` once the device does nothing any more."""
        if self.error is not None:
            return
        log.debug("%s ends: %s", type(self).__name__, error)
        self.error = error = ending(error)
        self._due.clear()
        if self._wire is not None:
            self._wire.abort()
        self._tell.end(error)

    def _wind_up(self) -> Pace:
        if self._wire is not None and not self._wire.at_rest():
            return Pace.WAITING
        self._wire = None
        if not self.ended.is_set():
            self._release()
            self.ended.set()
        return Pace.IDLE

    def _work(self) -> bool:
        wire = self._wire
        # What went wrong shows where it is asked, so also while nothing is to be launched.
        if wire is None or not wire.settled():
            return False
        self._met = True
        return self._retire() | self._launch(wire)

    def _launch(self, wire: Wire) -> bool:
        """Enqueue the next chunk, if there is one: one at a time, so that other lines get theirs."""
        self._order(wire.slot_bytes)
        if not self._due:
            return False
        move, chunk = self._due.popleft()
        self._running.append((wire.launch(self._current(move, chunk)), chunk))
        return True

    def _retire(self) -> bool:
        moved = False
        while self._running and self._running[0][0]():
            _, chunk = self._running.popleft()
            self._over(chunk)
            moved = True
        return moved

    def _look(self, now: float, stamp: float) -> None:
        if now - stamp > self._timeout_s:
            raise BrokenError(f"nothing moved for {self._timeout_s} s")
        if now - self._asked > LOOK_S:
            self._asked = now
            self._say("nccl.alive", {})

    def _say(self, op: str, body: Message) -> None:
        """Tell the other end; a line whose other end cannot be told ends."""

        def heard(answer: Future[dict[str, Any]]) -> None:
            error = answer.exception()
            if error is not None:
                failed = BrokenError(f"the other end cannot go on: {error}")
                failed.__cause__ = error
                self._tell.end(failed)

        self._tell.call(op, body).add_done_callback(heard)

    def _busy(self) -> bool:
        # The ends meet by looking, so an end that has nothing to do looks, too.
        return bool(self._due or self._running or (self._wire is not None and not self._met))

    def _current(self, move: Move, chunk: Chunk | None) -> Move:
        return move

    @abstractmethod
    def _order(self, slot_bytes: int) -> None:
        """Decide what comes next, at the end that does."""

    @abstractmethod
    def _over(self, chunk: Chunk | None) -> None:
        """Hear that the device has done a chunk."""

    @abstractmethod
    def _release(self) -> None:
        """Tell whoever waits that the line has ended."""


@dataclass(eq=False)
class Arrival:
    """A transfer at the end that receives.

    Args:
        key: its name.
        ids: this end's blocks.
        over: called once, with its error or ``None``.
        ask: what the sending end has to know of it, if that does not know it already.

    """

    key: Key
    ids: BlockIds
    over: Callable[[KVConnectError | None], None]
    ask: Message | None = None
    #: Chunks ordered, and not in place yet.
    under_way: int = 0
    stopped: KVConnectError | None = None


class Receiver(Line):
    """The end that receives, and decides on the order."""

    def __init__(self, tell: Tell, timeout_s: float, block_bytes: Sequence[int], meet: Callable[[], None]) -> None:
        """Call ``meet`` when a communicator is wanted; `wired` brings it."""
        super().__init__(tell, timeout_s)
        self._block_bytes, self._meet = block_bytes, meet
        self._plan = Plan()
        self._new: list[Arrival] = []
        self._arrivals: dict[Key, Arrival] = {}
        self._called = False
        self._ordered = 0
        self._bytes = 0
        self._drops: list[list[int]] = []

    def add(self, arrival: Arrival) -> None:
        """Have a transfer done; it has at least one byte."""
        if self.error is not None:
            arrival.over(self.error)
            return
        if arrival.key in self._arrivals:
            arrival.over(HandshakeError(f"transfer {arrival.key[1]} is running already"))
            return
        self._arrivals[arrival.key] = arrival
        self._new.append(arrival)
        if not self._called:
            self._called = True
            self._meet()

    def stop(self, key: Key) -> bool:
        """Give a transfer up: no more of it is ordered, and what was not launched goes into staging memory only."""
        arrival = self._arrivals.get(key)
        if arrival is None:
            return False
        arrival.stopped = arrival.stopped or LoadError("the transfer was cancelled")
        if arrival in self._new:
            self._new.remove(arrival)
            # The sending end knows of a write, but not yet of a read.
            known = arrival.ask is None
        else:
            known = self._plan.drop(key)
        if known:
            self._drops.append([int(key[0]), key[1]])
        self._finish_if_done(arrival)
        return True

    def _busy(self) -> bool:
        return bool(self._arrivals or self._drops) or super()._busy()

    def _order(self, slot_bytes: int) -> None:
        for arrival in self._new:
            self._plan.add(cut(arrival.key, counts(arrival.ids), self._block_bytes, slot_bytes))
        asks = [arrival.ask for arrival in self._new if arrival.ask is not None]
        self._new.clear()
        rows: list[list[int]] = []
        while self._bytes < WINDOW_SLOTS * slot_bytes and (chunk := self._plan.next()) is not None:
            arrival = self._arrivals[chunk.key]
            arrival.under_way += 1
            self._bytes += chunk.nbytes
            ids = arrival.ids[chunk.group][chunk.start : chunk.start + chunk.count]
            self._due.append((Move(chunk.group, ids, chunk.nbytes), chunk))
            rows.append(chunk.row())
        if asks or rows or self._drops:
            log.debug("ordered: chunks %d to %d", self._ordered, self._ordered + len(rows))
            self._say("nccl.orders", {"first": self._ordered, "asks": asks, "rows": rows, "drops": self._drops})
            self._ordered += len(rows)
            self._drops = []

    def _current(self, move: Move, chunk: Chunk | None) -> Move:
        arrival = None if chunk is None else self._arrivals.get(chunk.key)
        if arrival is None or arrival.stopped is not None:
            return Move(move.group, None, move.nbytes)
        return move

    def _over(self, chunk: Chunk | None) -> None:
        if chunk is None:
            return
        arrival = self._arrivals[chunk.key]
        arrival.under_way -= 1
        self._bytes -= chunk.nbytes
        self._finish_if_done(arrival)

    def _finish_if_done(self, arrival: Arrival) -> None:
        if arrival.under_way == 0 and arrival not in self._new and arrival.key not in self._plan:
            del self._arrivals[arrival.key]
            arrival.over(arrival.stopped)

    def _release(self) -> None:
        arrivals, self._arrivals = list(self._arrivals.values()), {}
        for arrival in arrivals:
            arrival.over(self.error)


class Sender(Line):
    """The end that sends what the other one orders, and is told by it when that has arrived."""

    # What was sent frees slots, in the device's own order; a look beside a busy engine costs that one time.
    _waiting = Pace.PATIENT

    def __init__(
        self, tell: Tell, timeout_s: float, block_bytes: Sequence[int], released: Callable[[], None] = lambda: None
    ) -> None:
        """Call ``released`` when the line was ended and touches no block any more."""
        super().__init__(tell, timeout_s)
        self._block_bytes, self._released = block_bytes, released
        self._sources: dict[Key, Source] = {}
        self._next = 0

    @property
    def known(self) -> int:
        """Number of transfers that are not ordered to their ends."""
        return len(self._sources)

    def know(self, key: Key, ids: BlockIds) -> None:
        """Be ready to send this end's blocks ``ids`` as transfer ``key``."""
        if key in self._sources:
            raise HandshakeError(f"transfer {key[1]} is running already")
        self._sources[key] = Source.of(ids, self._block_bytes)

    def forget(self, key: Key) -> None:
        """Hear that no more of a transfer will be ordered."""
        self._sources.pop(key, None)

    def ordered(self, first: int, rows: Sequence[Any]) -> None:
        """Send these chunks next; raise `HandshakeError` if they are not what may follow."""
        if first != self._next:
            raise HandshakeError(f"the other end orders chunk {first}, where {self._next} is next")
        self._next += len(rows)
        for row in rows:
            self._due.append((self._move(row), None))

    def _move(self, row: Any) -> Move:
        key, group, start, count = read_row(row)
        source = self._sources.get(key)
        if source is None:
            raise HandshakeError(f"the other end orders a chunk of transfer {key[1]}, which is not running")
        ids = source.ids[group][start : start + count] if group < len(source.ids) else []
        nbytes = len(ids) * self._block_bytes[group] if ids else 0
        if len(ids) != count or not nbytes:
            raise HandshakeError(f"blocks {start} to {start + count} of group {group} were ordered, of {len(ids)}")
        source.left -= count
        if source.left <= 0:
            del self._sources[key]
        return Move(group, ids, nbytes)

    def _order(self, slot_bytes: int) -> None:
        pass

    def _over(self, chunk: Chunk | None) -> None:
        pass

    def _release(self) -> None:
        self._sources.clear()
        self._released()
