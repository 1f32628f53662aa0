"""D is stopped in the middle of a read, in real time, until P's blocks are another prompt's; then it goes on."""

from __future__ import annotations

from contextlib import closing

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from kvconnect.buffers.promise import Promise
from kvconnect.testing.engine import BLOCKS
from tests.faults import cells
from tests.faults.cells import HandOver, judge
from tests.faults.clocks import RealTime
from tests.faults.world import P, World


@pytest.mark.parametrize(("policy", "end"), [("recompute", "computed"), ("fail", "error")])
@pytest.mark.parametrize("pipe", ["tcp", "shm"])
def test_what_a_stopped_reader_read_of_reused_blocks_is_not_decoded_from(pipe: str, policy: str, end: str) -> None:
    with closing(World(pipe, policy, RealTime(), lease_s=2.0)) as world:
        load = HandOver(world)
        cells.moving(load)
        world.d.stop()
        world.until(lambda: world.last[P].free == BLOCKS - 1, "the end of P's lease")
        world.offer(world.prompt())  # written over what D reads, if `Subject` had not yet
        load.open_gates()
        world.d.go_on()
        assert world.until(lambda: world.outcome(load.name), "the end") == end, world.facts()
        told = "\n".join(world.d.call("facts")["log"])
        assert "the owner's lease on the blocks had ended" in told, told
        world.assert_serves()


def test_it_would_be_decoded_from_if_promises_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Promise, "holds", lambda *_: True)
    with closing(World("shm")) as world, pytest.raises(AssertionError, match="wrong bytes"):
        judge(world, cells.moving, cells.stop_d)
