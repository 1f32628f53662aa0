"""The parent: it starts the pairs, lets the contenders of each case take turns, and collects rows.

Not pytest-benchmark: every sample is taken inside one of two other processes, most by
the device's clock, and the contenders of a round alternate. Plain loops say so plainly.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.gpu import cases, rows
from bench.gpu.cases import PAIRS, Case, Entrant
from bench.gpu.memory import BLOCK_BYTES, POOL_BLOCKS, Selection, draw, leading
from bench.gpu.pair import LostError, Pair
from kvconnect import registry
from kvconnect.errors import KVConnectError

#: What the run may take in all; cases that have not begun by then are left out.
BUDGET_S = 200.0
_OVER = "the run's time was over"
_SEED = 20260
_SM_LOOKS = 3


@dataclass
class Book:
    """What was measured, what was not and why, and where it ran."""

    rows: list[rows.Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Where a run takes place: D's and P's device of each pair, and the blocks of every pool."""

    pairs: Mapping[str, tuple[str, str]]
    pool_blocks: int


DEFAULT_PLAN = Plan(PAIRS, POOL_BLOCKS)


class Runner:
    """One run of a list of cases."""

    def __init__(
        self,
        chosen: list[Case],
        *,
        memory: bool,
        quick: bool,
        say: Callable[[str], None],
        plan: Plan = DEFAULT_PLAN,
    ) -> None:
        self.book = Book()
        self._plan = plan
        self._cases, self._memory, self._quick, self._say = chosen, memory, quick, say
        self._began = time.monotonic()
        self._rng = np.random.default_rng(_SEED)
        self._pairs: dict[str, Pair] = {}
        self._connected: dict[tuple[str, str], str | None] = {}
        self._told: set[str] = set()
        self._group = f"bench-gpu-{time.time_ns()}"

    def run(self) -> Book:
        """Measure everything; failures are noted in the book."""
        try:
            self._start()
            if self._memory:
                self._weigh_all(cases.memory(), first=True)
                self._weigh_all(cases.more_memory(), first=False)
            for case in self._cases:
                if self._late():
                    self.book.left_out[case.name] = _OVER
                    continue
                self._say(f"{time.monotonic() - self._began:5.1f} s  {case.name}")
                self._race(case)
        finally:
            for pair in self._pairs.values():
                pair.kill()
        return self.book

    # -- the processes --------------------------------------------------------------

    def _start(self) -> None:
        entrants = [entrant for case in self._cases for entrant in case.entrants]
        if self._memory:
            entrants += [entrant for entrant, _ in cases.memory()]
        wanted = dict.fromkeys(entrant.pair for entrant in entrants)
        plan = self._plan
        self._pairs = {
            name: Pair(name, *plan.pairs[name], plan.pool_blocks) for name in wanted if self._is_usable(name)
        }
        for name, pair in self._pairs.items():
            try:
                self.book.hardware = pair.started()
            except LostError as error:
                self._note(name, error)

    def _is_usable(self, name: str) -> bool:
        pipe, _, _ = name.partition(" hand-over")
        if pipe in cases.PIPES:
            try:
                registry.pipe(pipe)
            except KVConnectError as error:
                self.book.left_out[name] = str(error)
                return False
        return True

    def _connect(self, entrant: Entrant) -> None:
        """Connect a contender when it is first needed; what failed once is not tried again."""
        key = (entrant.pair, entrant.contender)
        if key not in self._connected:
            options = dict(entrant.options)
            if entrant.kind == "hand-over":
                options["group"] = f"{self._group}-{entrant.contender}"
            try:
                self._pairs[entrant.pair].connect(entrant.contender, entrant.kind, options)
            except (RuntimeError, LostError) as error:
                self._connected[key] = str(error)
            else:
                self._connected[key] = None
        why = self._connected[key]
        if why is not None:
            raise RuntimeError(why)

    def _attempt(self, entrant: Entrant, case: str, act: Callable[[], None]) -> bool:
        """Do something with one contender; a failure leaves it out of this case, and no other."""
        if entrant.pair not in self._pairs:
            return False
        try:
            if self._late():
                raise RuntimeError(_OVER)
            act()
        except (RuntimeError, LostError) as error:
            self._note(f"{case}: {entrant.label}", error)
            return False
        return True

    def _note(self, what: str, error: Exception) -> None:
        """Keep what a failure was; say all of it, once."""
        text = str(error)
        self.book.left_out[what] = last_line(text)
        self._say(f"failed: {what}: {last_line(text) if text in self._told else text}")
        self._told.add(text)

    def _late(self) -> bool:
        return time.monotonic() - self._began > BUDGET_S

    # -- samples ----------------------------------------------------------------------

    def _select(self, entrant: Entrant, blocks: int) -> Selection:
        if not entrant.contiguous:
            return draw(self._rng, blocks, self._plan.pool_blocks)
        first = leading(blocks)
        return Selection(first.near, [i + blocks for i in first.far]) if entrant.local else first

    def _move(self, entrant: Entrant, chosen: list[Selection]) -> list[float]:
        """Have one contender move the selections, one after another; return seconds."""
        pair = self._pairs[entrant.pair]
        body = {"name": entrant.contender, "way": entrant.way, "layout": entrant.layout}
        ids = {"near": [one.near for one in chosen], "far": [one.far for one in chosen]}
        if entrant.assisted:
            return list(pair.both("time", {**body, **ids}, {**body, **ids}, far_op="assist")["s"])
        return list(pair.ask(entrant.near, "time", **body, **ids)["s"])

    def _verify(self, entrant: Entrant, blocks: int) -> None:
        self._connect(entrant)
        if not entrant.moves:
            return
        chosen = self._select(entrant, blocks)
        pair = self._pairs[entrant.pair]
        pair.check(lambda: self._move(entrant, [chosen]), entrant.layout, chosen, local=entrant.local)

    def _sample(self, entrant: Entrant, case: Case, into: list[list[float]]) -> None:
        # The first move is not timed: another process had the GPU and the caches before.
        chosen = [self._select(entrant, case.blocks) for _ in range(case.repeats + 1)]
        into.append(self._move(entrant, chosen)[1:])

    def _race(self, case: Case) -> None:
        ready = [e for e in case.entrants if self._attempt(e, case.name, lambda e=e: self._verify(e, case.blocks))]  # type: ignore[misc]
        for entrant in ready:
            if entrant.kind == "pipe":  # some measure themselves in their first transfers
                self._attempt(entrant, case.name, lambda e=entrant: self._sample(e, case, []))  # type: ignore[misc]
        samples: dict[str, list[list[float]]] = {entrant.label: [] for entrant in ready}
        for _ in range(min(2, case.rounds) if self._quick else case.rounds):
            if self._late():
                break
            for index in self._rng.permutation(len(ready)):
                entrant = ready[index]
                if entrant.label in samples:
                    into = samples[entrant.label]
                    if not self._attempt(entrant, case.name, lambda e=entrant, i=into: self._sample(e, case, i)):  # type: ignore[misc]
                        del samples[entrant.label]
        kept = {label: found for label, found in samples.items() if found}
        pieces = {entrant.label: entrant.piece_bytes or case.nbytes for entrant in ready}
        measured = rows.Measured(case.name, case.nbytes, kept, pieces, self._count(case, ready))
        self.book.rows += rows.of_case(measured, case.goals, case.compared)

    def _count(self, case: Case, ready: Iterable[Entrant]) -> dict[str, int]:
        """Count the multiprocessors that our kernel ran on: the most of a few launches."""
        found: dict[str, int] = {}

        def look(entrant: Entrant) -> None:
            for _ in range(_SM_LOOKS):
                chosen = self._select(entrant, case.blocks)
                body = {"name": entrant.contender, "way": entrant.way, "layout": entrant.layout}
                answer = self._pairs[entrant.pair].ask(
                    True, "multiprocessors", **body, near=chosen.near, far=chosen.far
                )
                if answer["count"] is not None:
                    found[entrant.label] = max(found.get(entrant.label, 0), answer["count"])

        for entrant in ready:
            if entrant.kind == "copies" and not entrant.contiguous:
                self._attempt(entrant, f"{case.name}: multiprocessors", lambda e=entrant: look(e))  # type: ignore[misc]
        return found

    def _weigh_all(self, entrants: Iterable[tuple[Entrant, rows.Goal | None]], *, first: bool) -> None:
        for entrant, goal in entrants:
            self._attempt(entrant, cases.MEMORY_CASE, lambda e=entrant, g=goal: self._weigh(e, g, first=first))  # type: ignore[misc]

    def _weigh(self, entrant: Entrant, goal: rows.Goal | None, *, first: bool) -> None:
        """Look at the GPU's free memory before a contender is opened and after its first transfer."""
        pair = self._pairs[entrant.pair]
        free = pair.free()
        self._connect(entrant)
        self._move(entrant, [self._select(entrant, cases.MEMORY_BLOCKS)])
        used = pair.used(free)
        moved = cases.MEMORY_BLOCKS * BLOCK_BYTES
        self.book.rows.append(rows.of_memory(entrant.label, used, moved, goal, first=first))


def select(only: str | None) -> tuple[list[Case], bool]:
    """Return the cases whose names match ``only``, and whether GPU memory is to be looked at."""
    pattern = re.compile(only or "", re.IGNORECASE)
    found = [case for case in cases.all_cases() if pattern.search(case.name)]
    return found, pattern.search(cases.MEMORY_CASE) is not None


def last_line(text: str) -> str:
    """Return the last line of a traceback that is no note: the error itself."""
    lines = [line for line in text.strip().splitlines() if line.strip() and not line.startswith("see docs/")]
    return lines[-1].strip() if lines else ""
