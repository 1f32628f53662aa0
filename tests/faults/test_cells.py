"""The most dangerous cells of the table, one by one: a phase of a hand-over, and what strikes there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from tests.faults import cells
from tests.faults.cells import strike
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


def cells_of(pipe: str) -> list[tuple[cells.Phase, cells.Fault]]:
    """Return the cells that there are for a pipe."""
    return [(p, f) for p in cells.PHASES for f in cells.FAULTS if pipe == "tcp" or f not in cells.OF_DATA]


@pytest.mark.parametrize("fault", cells.FAULTS[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("phase", cells.PHASES, ids=lambda p: p.__name__)
def test_whatever_strikes_nothing_is_lost_and_nobody_waits(
    world: World, phase: cells.Phase, fault: cells.Fault
) -> None:
    if world.pipe == "shm" and fault in cells.OF_DATA:
        pytest.skip("no wire carries shm's bytes")
    strike(world, phase, fault)
    world.assert_at_rest()
    world.assert_serves()
    world.assert_at_rest()
