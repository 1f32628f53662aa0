"""Schedules of hand-overs and faults, drawn by hypothesis; what must hold is checked all along and at the end.

``KVCONNECT_SCHEDULES`` is how many are drawn. ``--hypothesis-seed`` (printed where one fails)
repeats the choices; what the machine's threads make of them may differ.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from hypothesis import HealthCheck, Phase, settings
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
from tests.faults.cells import FAULTS, OF_DATA, PHASES, HandOver
from tests.faults.world import ENOUGH_S, NotReachedError, World

#: Not among those drawn: a clock of P's alone that runs ahead (see README.md).
DRAWN = tuple(fault for fault in FAULTS if fault is not cells.jump_p)


class Schedule(RuleBasedStateMachine):
    """Any number of hand-overs under way at once, and anything that strikes."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.under_way: list[HandOver] = []

    @initialize(pipe=st.sampled_from(["tcp", "shm"]), noted=st.booleans())
    def start(self, pipe: str, noted: bool) -> None:
        self.world = World(pipe)
        if noted:  # else the first hand-over is of strangers
            self.world.note_holdings()
        self.world.patience_s = 0.5

    @property
    def w(self) -> World:
        assert self.world is not None
        return self.world

    def both_up(self) -> bool:
        return self.world is not None and all(e.alive and not e.stopped for e in self.world.engines)

    @precondition(both_up)
    @rule(phase=st.sampled_from(PHASES), fault=st.sampled_from(DRAWN))
    def strike(self, phase: cells.Phase, fault: cells.Fault) -> None:
        """Begin a hand-over, bring it to a phase if it gets there, and have a fault strike."""
        if self.w.pipe == "shm" and fault in OF_DATA:
            return
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

    @invariant()
    def nobody_saw_what_must_not_be(self) -> None:
        if self.world is not None:
            self.world.step()

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            self._end(self.world)
        finally:
            self.world.close()

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


@pytest.mark.timeout(0)
def test_any_schedule_ends_in_right_bytes_or_a_reason_and_in_free_blocks() -> None:
    run_state_machine_as_test(
        Schedule,
        settings=settings(
            max_examples=int(os.environ.get("KVCONNECT_SCHEDULES", "8")),
            stateful_step_count=8,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            phases=(Phase.explicit, Phase.generate),  # what is found is real; to shrink it takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
