"""The most dangerous cells of the table, one by one: a phase of a hand-over, and what strikes there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from tests.faults import cells
from tests.faults.cells import judge, strike
from tests.faults.world import SITES, World


@pytest.fixture(params=SITES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    found = World(request.param)
    yield found
    found.close()


def test_without_a_fault_every_phase_ends_in_a_load(world: World) -> None:
    for phase in cells.PHASES:
        if phase is not cells.opening:  # the pipe is open by then
            assert strike(world, phase, cells.nothing) == "loaded", f"{phase.__name__}: {world.facts()}"
            world.assert_at_rest()


def test_a_request_that_queues_for_three_leases_is_loaded(world: World) -> None:
    judge(world, cells.claimed, cells.queue)


#: Struck in every run; the others are slow only because they are many.
DANGEROUS = {
    (cells.offered, cells.kill_p),
    (cells.seen, cells.stall_control),
    (cells.claimed, cells.restart_p),
    (cells.claimed, cells.repeat),
    (cells.claimed, cells.jump_p),
    (cells.planned, cells.stop_d),
    (cells.planned, cells.abort),
    (cells.opening, cells.lose),
    (cells.opening, cells.cut_control),
    (cells.moving, cells.jump_p),
    (cells.moving, cells.kill_p),
    (cells.moving, cells.kill_d),
    (cells.moving, cells.stop_d),
    (cells.moving, cells.stall_data),
    (cells.moving, cells.corrupt_data),
    (cells.moved, cells.restart_p),
    (cells.moved, cells.stall_control),
    (cells.released, cells.lose_questions),
}


def marks(phase: cells.Phase, fault: cells.Fault) -> list[pytest.MarkDecorator]:
    """Return what pytest is to know of a cell."""
    return [] if (phase, fault) in DANGEROUS else [pytest.mark.slow]


CELLS = [
    pytest.param(phase, fault, id=f"{phase.__name__}-{fault.__name__}", marks=marks(phase, fault))
    for phase in cells.PHASES
    for fault in cells.FAULTS[1:]
]


@pytest.mark.parametrize(("phase", "fault"), CELLS)
def test_whatever_strikes_nothing_is_lost_and_nobody_waits(
    world: World, phase: cells.Phase, fault: cells.Fault
) -> None:
    if not cells.possible(world.site, fault):
        pytest.skip("no wire carries shm's bytes, and one host has one clock")
    judge(world, phase, fault)
