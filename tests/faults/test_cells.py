"""The most dangerous cells of the table, one by one: a phase of a hand-over, and what strikes there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from tests.faults import cells
from tests.faults.cells import judge, strike
from tests.faults.world import World


@pytest.fixture(params=["tcp", "shm"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    found = World(request.param)
    yield found
    found.close()


def test_without_a_fault_every_phase_ends_in_a_load(world: World) -> None:
    for phase in cells.PHASES:
        if phase is not cells.opening:  # the pipe is open by then
            assert strike(world, phase, cells.nothing) == "loaded", f"{phase.__name__}: {world.facts()}"
            world.assert_at_rest()


def is_sound(phase: cells.Phase, fault: cells.Fault) -> bool:
    """Whether the cell is known to hold; see README.md for the one that does not."""
    return (phase, fault) != (cells.claimed, cells.jump_p)


CELLS = [
    pytest.param(
        phase,
        fault,
        id=f"{phase.__name__}-{fault.__name__}",
        marks=[] if is_sound(phase, fault) else pytest.mark.xfail(reason="P's clock alone jumps: see README.md"),
    )
    for phase in cells.PHASES
    for fault in cells.FAULTS[1:]
]


@pytest.mark.parametrize(("phase", "fault"), CELLS)
def test_whatever_strikes_nothing_is_lost_and_nobody_waits(
    world: World, phase: cells.Phase, fault: cells.Fault
) -> None:
    if world.pipe == "shm" and fault in cells.OF_DATA:
        pytest.skip("no wire carries shm's bytes")
    judge(world, phase, fault)
