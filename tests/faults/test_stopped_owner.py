"""P hangs in the middle of a load, in real time: D does not wait for it until the load's own deadline."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from tests.faults import cells
from tests.faults.cells import HandOver
from tests.faults.clocks import RealTime
from tests.faults.world import TRANSFER_S, World

_LEASE_S = 1.0


def test_a_load_from_a_peer_that_hangs_is_given_up_when_it_no_longer_answers() -> None:
    with closing(World("tcp", clocks=RealTime(), lease_s=_LEASE_S)) as world:
        load = HandOver(world)
        cells.moving(load)
        world.p.stop()
        begun = time.monotonic()
        assert world.until(lambda: world.outcome(load.name), "the end") == "computed", world.facts()
        assert time.monotonic() - begun < TRANSFER_S, "it was given up at its own deadline only"
        told = "\n".join(world.d.call("facts")["log"])
        assert f"within {TRANSFER_S:g} s" not in told, told
