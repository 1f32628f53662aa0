"""Which of several pipes to a peer moves blocks fastest: measured with the first load that is large enough.

The load is cut into slices. Each pipe reads some of them, one, then two, then four at
once, until it has had long enough, and each of these twice: what comes first pays for
connections, buffers and calibration. The pipe whose best is the best reads the rest.
So no memory is needed, and what a pipe has read stays read. The first pipe reads on
while the others are opened: if that takes longer, they are measured with the next large
load. Other loads go by the first pipe meanwhile. A pipe that cannot be opened, fails or
hangs is passed over, each within a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from kvconnect.buffers.choice import Candidate, told
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.lines import Line, Lines
from kvconnect.errors import BrokenError, ClosedError, DeadlineError, KVConnectError, LoadError
from kvconnect.paging import BlockIds, PagedLayout
from kvconnect.pipes.base import Traits, Transfer

#: Slices are at least this large, so that they take longer than their beginning and end.
_SLICE_BYTES = 1 << 20
#: For each pipe: one, two and four.
_LEAST_SLICES = 7
#: A pipe has been measured when it has read for so long, or so much.
_ENOUGH_S = 0.1
_ENOUGH_BYTES = 256 << 20
#: How long a pipe that was ended may take to let go of the blocks before others wait no longer for the verdict.
_LET_GO_S = 1.0


class Slices:
    """One load in equal slices, some of which have been read."""

    def __init__(self, layout: PagedLayout, remote: BlockIds, local: BlockIds) -> None:
        self._layout, self._remote, self._local = layout, remote, local
        blocks = max((len(ids) for ids in local), default=0)
        paired = [len(ids) for ids in remote] == [len(ids) for ids in local]
        #: None if the blocks do not pair up: that is for a pipe to refuse.
        self.count = min(blocks, layout.nbytes(local) // _SLICE_BYTES) if paired else 0
        self._left = list(range(self.count))

    @property
    def left(self) -> int:
        """How many are not read yet."""
        return len(self._left)

    def take(self, count: int) -> list[int]:
        """Take up to ``count`` slices that are not read yet."""
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def give_back(self, slices: Sequence[int]) -> None:
        """These were not read after all."""
        self._left = sorted([*self._left, *slices])

    def blocks(self, slices: Sequence[int]) -> tuple[BlockIds, BlockIds]:
        """Return the owner's block ids of ``slices``, and ours."""
        return self._of(self._remote, slices), self._of(self._local, slices)

    def nbytes(self, slices: Sequence[int]) -> int:
        """Return how many bytes ``slices`` have."""
        return self._layout.nbytes(self._of(self._local, slices))

    def _of(self, groups: BlockIds, slices: Sequence[int]) -> BlockIds:
        return [
            [number for i in slices for number in ids[len(ids) * i // self.count : len(ids) * (i + 1) // self.count]]
            for ids in groups
        ]


@dataclass(frozen=True)
class Outcome:
    """What a trial has found.

    Args:
        best: the line to keep, or ``None`` if none is of use.
        rates: of the pipes that were measured, in bytes a second.
        failures: why the others were not, by name.
        seconds: that it took.

    """

    best: Line | None
    rates: Mapping[str, float]
    failures: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What a trial needs of its surroundings.

    Args:
        lines: opens and ends pipes.
        crew: for what waits.
        turn: held while a trial measures, so that those of one worker do not disturb each other.
        layout: of this worker's memory.
        theirs: the peer worker's description.
        limit_s: how long each pipe may take to be opened and measured.

    """

    lines: Lines
    crew: Crew
    turn: threading.Lock
    layout: PagedLayout
    theirs: Mapping[str, Any]
    limit_s: float


@dataclass(eq=False)
class _Load:
    """The load that pipes are tried with."""

    nbytes: int
    slices: Slices
    rates: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    #: What moves now; and what has not let go of its blocks though its line was ended.
    moving: Transfer | None = None
    held: list[Transfer] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the transfer that stands for all of it."""
        self.whole = Transfer(self.nbytes, self.cancel)

    def start(self, lines: Lines, line: Line, slices: Sequence[int]) -> Transfer:
        """Start to read ``slices`` over ``line``."""
        self.moving = moving = lines.read(line, *self.slices.blocks(slices))
        if self.whole.cancelled:
            moving.cancel()
        return moving

    def cancel(self) -> None:
        """Have what moves cancelled."""
        if self.moving is not None:
            self.moving.cancel()


class Trial:
    """Stands in for the pipe of a link until it is known which one that should be."""

    def __init__(
        self,
        setting: Setting,
        opened: list[Line],
        traits: Traits,
        rivals: Sequence[Candidate],
        over: Callable[[Outcome], None],
        *,
        in_use: bool = False,
    ) -> None:
        """Try the one line in ``opened``, whose pipe has these ``traits``, and ``rivals`` against each other.

        What is opened is added to ``opened``, for whoever ends them all. ``over`` is called
        from a thread of the crew when the best is known; the other lines are ended here,
        that one, if it is ``in_use`` by others, not before `let_go`.
        """
        self._setting, self._opened, self._rivals, self._over = setting, opened, rivals, over
        self._first = self._best = opened[0]
        #: A load that is the trial is only handed to a thread; others go by the first pipe as they would without.
        self.traits = traits
        self._lock = threading.Lock()
        self._busy = int(in_use)  # loads over the first line beside the trial's
        self._trying: Transfer | None = None
        self._decided = self._ended = False
        self._opening: Future[None] | None = None
        self._unopened: dict[str, str] = {}

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Read as a pipe does. The first load that is large enough is the trial."""
        slices = Slices(self._setting.layout, remote, local)
        large = slices.count >= _LEAST_SLICES * (1 + len(self._rivals))
        if self._decided or not large or not self._setting.turn.acquire(blocking=False):
            return self._forward(remote, local)
        load = _Load(self._setting.layout.nbytes(local), slices)
        self._trying = load.whole
        if not self._setting.crew.submit(lambda: self._try(load)):
            self._setting.turn.release()
            raise ClosedError("the buffer was closed")
        return load.whole

    def is_trial(self, transfer: Transfer | None) -> bool:
        """Whether the pipes are tried with this load: it has time limits of its own."""
        return transfer is not None and transfer is self._trying

    def let_go(self) -> None:
        """Nobody else uses the first line any more."""
        self._left(self._first)

    def end(self) -> None:
        """End all lines; a trial under way fails."""
        self._ended = True
        for line in self._opened:
            self._setting.lines.end(line)

    def _forward(self, remote: BlockIds, local: BlockIds) -> Transfer:
        with self._lock:
            line, pipe = self._best, self._best.pipe
            self._busy += line is self._first
        try:
            if pipe is None:
                raise ClosedError("the pipe was closed")
            moving = pipe.read_blocks(remote, local)
        except BaseException:  # counted before it began, so that a line with a load to come is not ended
            self._left(line)
            raise
        moving.add_done_callback(lambda _: self._left(line))
        return moving

    def _left(self, line: Line) -> None:
        """A load is over that went by ``line``: the first one, if it has lost, ends with the last of them."""
        with self._lock:
            self._busy -= line is self._first
            over = self._best is not self._first and not self._busy
        if over:
            self._setting.lines.end(self._first)

    # -- on the crew: may block -----------------------------------------------------------

    def _try(self, load: _Load) -> None:
        began = time.monotonic()
        try:
            if not self._decided and self._compare(load):  # a load that came just before may have decided
                self._decide(load, time.monotonic() - began)
        finally:
            self._setting.turn.release()
        self._complete(load)

    def _compare(self, load: _Load) -> bool:
        """Measure each pipe; return whether it is known now which one is the best."""
        if self._opening is None:
            self._opening = self._setting.crew.call(self._open_rivals)
        share = load.slices.count // (1 + len(self._rivals))
        with self._limited(load, self._first) as until:
            self._measure(load, self._first, share, until)
        while self._works(load) and not self._opening.done() and load.slices.left and not load.whole.cancelled:
            self._read_on(load)
        if self._works(load):
            if not self._opening.done():
                return False
        else:
            wait([self._opening], self._setting.limit_s * len(self._rivals))
        for line in self._opened[1:]:
            if self._works(load) and load.slices.left < _LEAST_SLICES:
                return False
            with self._limited(load, line) as until:
                self._measure(load, line, share, until)
        load.failures.update(self._unopened)
        return not load.whole.cancelled and not self._ended

    def _read_on(self, load: _Load) -> None:
        """Have the first pipe move what it moves in a short time: the load need not wait until the others are open."""
        slices_a_second = load.rates[self._first.name] * load.slices.count / load.nbytes
        slices = load.slices.take(max(1, int(slices_a_second * _ENOUGH_S)))
        with self._limited(load, self._first) as until:
            self._move(load, self._first, slices, until)

    def _works(self, load: _Load) -> bool:
        return self._first.name in load.rates

    def _open_rivals(self) -> None:
        for rival in self._rivals:
            try:
                line = self._setting.lines.open(rival, self._setting.theirs, self._setting.limit_s)
            except KVConnectError as error:
                self._unopened[rival.name] = f"it cannot be opened: {error}"
                continue
            self._opened.append(line)
            if self._ended:
                self._setting.lines.end(line)

    @contextlib.contextmanager
    def _limited(self, load: _Load, line: Line) -> Iterator[float]:
        """Say when the pipe's time is over; one that fails is out."""
        try:
            yield time.monotonic() + self._setting.limit_s
        except KVConnectError as error:
            if not load.whole.cancelled:
                load.rates.pop(line.name, None)
                load.failures[line.name] = str(error)
                self._setting.lines.end(line)

    def _measure(self, load: _Load, line: Line, share: int, until: float) -> None:
        """Find how many bytes a second the line moves at its best, with up to ``share`` slices."""
        best, count, spent, moved = 0.0, 1, 0.0, 0
        while spent < _ENOUGH_S and moved < _ENOUGH_BYTES and (slices := load.slices.take(min(count, share))):
            nbytes = load.slices.nbytes(slices)
            took = []
            for _ in range(2):  # for the first of its size a pipe makes connections and buffers
                began = time.monotonic()
                self._move(load, line, slices, until)
                took.append(time.monotonic() - began)
            # What these took does not count: a pipe that is slow to get ready is measured as long as others.
            best, spent, moved = max(best, nbytes / min(took)), spent + 2 * min(took), moved + 2 * nbytes
            share, count = share - len(slices), 2 * count
        load.rates[line.name] = best

    def _move(self, load: _Load, line: Line, slices: Sequence[int], until: float) -> None:
        moving = load.start(self._setting.lines, line, slices)
        try:
            moving.wait(max(0.0, until - time.monotonic()))
        except KVConnectError:
            load.slices.give_back(slices)
            if moving.done:
                raise
        else:
            return
        self._setting.lines.end(line)
        with contextlib.suppress(KVConnectError):  # it is of no interest any more how it ends
            moving.wait(_LET_GO_S)
        load.held.append(moving)
        raise DeadlineError(f"it did not move {moving.nbytes} bytes within its {self._setting.limit_s:.3g} s")

    def _decide(self, load: _Load, seconds: float) -> None:
        name = max(load.rates, key=load.rates.__getitem__, default=None)
        best = next((line for line in self._opened if line.name == name), None)
        for line in self._opened[1:]:
            if line is not best:
                self._setting.lines.end(line)
        with self._lock:
            self._decided, self._best = True, best or self._first
            over = best is not self._first and not self._busy
        if over:
            self._setting.lines.end(self._first)
        self._over(Outcome(best, load.rates, load.failures, seconds))

    def _complete(self, load: _Load) -> None:
        """Have the best line read the rest – once no other can touch the blocks any more."""
        for held in load.held:
            if not held.done:
                held.add_done_callback(lambda _: self._complete(load))
                return
        rest = load.slices.take(load.slices.count)
        if load.failures and not load.rates:
            load.whole.finish(BrokenError(f"no pipe works ({told(load.failures)})"))
        elif load.whole.cancelled or not rest:
            load.whole.finish(LoadError("the load was cancelled") if load.whole.cancelled else None)
        else:
            moving = load.start(self._setting.lines, self._best, rest)
            moving.add_done_callback(lambda over: load.whole.finish(over.error))
