"""Schedules of hand-overs and faults, drawn by hypothesis; what must hold is checked all along and at the end.

``KVCONNECT_SCHEDULES`` is how many are drawn, ``KVCONNECT_SECONDS`` for how long at most, ``KVCONNECT_STRIKES``
how often each cell of the table is to be struck at least: cells that the schedules met more rarely are struck
one by one afterwards. ``KVCONNECT_SEED`` repeats the choices; what the machine's threads make of them may differ.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.faults import cells
from tests.faults.cells import ENDS, FAULTS, PHASES, HandOver, judge, possible
from tests.faults.world import ENOUGH_S, SITES, NotReachedError, World

#: Schedules of one seed: so many have to be drawn again to meet a failure again.
BATCH = 25
#: Of a batch's schedules that ended well, with the engines that they began with: by site. They begin the next.
_kept: dict[str, World] = {}

#: No job takes longer, even on a busy machine; its process ends then, and with it the test.
_HANGS_S = 900.0
#: Where, when and what.
_CELLS = [(site, phase, fault) for site in SITES for phase in PHASES for fault in FAULTS if possible(site, fault)]

Struck = Counter[tuple[str, str]]


class Schedule(RuleBasedStateMachine):
    """Any number of hand-overs under way at once, and anything that strikes."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.under_way: list[HandOver] = []
        #: Whether both engines are there, as far as what was drawn says: choices must depend on choices only.
        self.both_up = self.strangers = False

    @initialize(first=st.sampled_from(_CELLS), strangers=st.sampled_from([False, False, True]))
    def start(self, first: tuple[str, cells.Phase, cells.Fault], strangers: bool) -> None:
        site, phase, fault = first
        self.world = None if strangers else _kept.pop(site, None)
        if self.world is None:
            self.world = World(site)
            if not strangers:
                self.world.note_holdings()
        self.strangers = strangers
        self.world.added.clear()
        self.world.patience_s = 0.25
        self.strike(phase, fault)

    @property
    def w(self) -> World:
        assert self.world is not None
        return self.world

    @precondition(lambda self: self.both_up)
    @rule(cell=st.sampled_from(_CELLS))
    def strike_again(self, cell: tuple[str, cells.Phase, cells.Fault]) -> None:
        _, phase, fault = cell
        if possible(self.w.site, fault):
            self.strike(phase, fault)

    def strike(self, phase: cells.Phase, fault: cells.Fault) -> None:
        """Begin a hand-over, bring it to a phase if it gets there, and have a fault strike."""
        self.both_up = fault not in ENDS
        hand_over = HandOver(self.w)
        self.under_way.append(hand_over)
        try:
            phase(hand_over)
        except NotReachedError:
            return  # earlier faults, or an open pipe, are in the way
        fault(self.w)
        cells.struck[phase.__name__, fault.__name__] += 1

    @rule(number=st.integers(0, 9))
    def go_on(self, number: int) -> None:
        """Let a hand-over go on."""
        if self.under_way:
            self.under_way[number % len(self.under_way)].open_gates()

    @rule(seconds=st.sampled_from([0.3, 3.0, 12.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        """Let time pass, in steps that let others act."""
        for _ in range(10):
            self.w.clocks.advance(seconds / 10)
            self.w.step()

    @rule()
    def heal(self) -> None:
        self.w.heal()
        self.both_up = True

    @invariant()
    def nobody_saw_what_must_not_be(self) -> None:
        if self.world is not None:
            self.world.step()

    def teardown(self) -> None:
        world = self.world
        if world is None:
            return
        try:
            self._end(world)
        except BaseException:
            world.close()
            raise
        if world.intact and not self.strangers and world.site not in _kept:
            _kept[world.site] = world
        else:
            world.close()

    def _end(self, world: World) -> None:
        world.patience_s = 10.0
        for hand_over in self.under_way:
            hand_over.open_gates()
        world.heal()
        for name in list(world.added):
            world.until(lambda name=name: world.outcome(name), f"the end of {name}", ENOUGH_S)
        world.assert_at_rest()
        world.assert_serves()
        world.assert_at_rest()
        world.assert_nothing_left()


def draw(number: int, count: int) -> None:
    """Draw ``count`` schedules by the seed ``number``."""
    try:
        run_state_machine_as_test(
            seed(number)(type("Schedule", (Schedule,), {})),
            settings=settings(
                max_examples=count,
                stateful_step_count=8,
                deadline=None,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                phases=(Phase.explicit, Phase.generate),  # what is found is real; to shrink it takes minutes
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        while _kept:
            _kept.popitem()[1].close()


def strike_one(phase: str, fault: str, site: str) -> None:
    """Strike one cell, in a world of its own."""
    world = World(site)
    try:
        judge(world, getattr(cells, phase), getattr(cells, fault))
    finally:
        world.close()


def _told(job: Callable[..., None], *args: object) -> tuple[Struck, str]:
    """Do a job in a process of the pool; return what was struck, and what failed."""
    cells.struck.clear()
    faulthandler.dump_traceback_later(_HANGS_S, exit=True, file=sys.__stderr__)
    try:
        job(*args)
    except BaseException:  # noqa: BLE001 - the parent is to hear of anything
        return Counter(cells.struck), traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return Counter(cells.struck), ""


Job = tuple[str, Callable[..., None], tuple[object, ...]]


def _do(jobs: Iterator[Job]) -> None:
    """Do jobs in as many processes as there are cores, and count what they strike; raise the first failure."""
    size = int(os.environ.get("KVCONNECT_WORKERS", "0")) or min(2, os.cpu_count() or 1)
    under_way: dict[Future[tuple[Struck, str]], str] = {}
    failures: list[str] = []
    with ProcessPoolExecutor(size, get_context("fork")) as pool:
        for name, job, args in jobs:
            under_way[pool.submit(_told, job, *args)] = name
            if len(under_way) >= size:
                failures += _ended(under_way)
            if failures:
                break
        while under_way:
            failures += _ended(under_way)
    assert not failures, "\n\n".join(failures)


def _ended(under_way: dict[Future[tuple[Struck, str]], str]) -> list[str]:
    """Wait for the end of a job; return what failed, with what repeats it."""
    failures = []
    for done in wait(under_way, return_when=FIRST_COMPLETED).done:
        name = under_way.pop(done)
        struck, failure = done.result()
        cells.struck.update(struck)
        if failure:
            failures.append(f"{failure}\nagain: {name}")
    return failures


def _batches() -> Iterator[Job]:
    count, limit_s = int(os.environ.get("KVCONNECT_SCHEDULES", "8")), float(os.environ.get("KVCONNECT_SECONDS", "3600"))
    first, until = (
        int(os.environ.get("KVCONNECT_SEED", "0")) or random.SystemRandom().getrandbits(32),
        time.monotonic() + limit_s,
    )
    for begun in range(0, count, BATCH):
        if time.monotonic() > until:
            return
        number, size = first + begun // BATCH, min(BATCH, count - begun)
        cells.drawn += size
        yield f"KVCONNECT_SEED={number} KVCONNECT_SCHEDULES={size}", draw, (number, size)


def _missing() -> Iterator[Job]:
    least = int(os.environ.get("KVCONNECT_STRIKES", "0"))
    for phase in PHASES:
        for fault in FAULTS:
            sites = [site for site in SITES if possible(site, fault)]
            for number in range(cells.struck[phase.__name__, fault.__name__], least):
                names = phase.__name__, fault.__name__, sites[number % len(sites)]
                yield f"test_cells.py -k '{'-'.join(names[:2])}' at {names[2]}", strike_one, names


@pytest.mark.timeout(0)
def test_any_schedule_ends_in_right_bytes_or_a_reason_and_in_free_blocks() -> None:
    before = os.times()
    _do(_batches())
    spent = [now - then for now, then in zip(os.times(), before, strict=True)]
    cells.took = spent[4], sum(spent[:4])
    _do(_missing())
    least = int(os.environ.get("KVCONNECT_STRIKES", "0"))
    rare = [cell for cell in cells.all_cells() if cells.struck[cell] < least]
    assert not rare, f"struck less than {least} times: {rare}"
