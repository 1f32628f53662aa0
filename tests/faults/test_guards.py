"""That the table catches something: with one guard of the product taken away, a cell fails.

Engines are forked, so that what is patched here is patched in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from kvconnect.buffers import channels, mover, promise, renewal
from kvconnect.buffers.lender import Lender
from kvconnect.connectors.worker import WorkerHalf
from kvconnect.pipes import tcp_meeting
from tests.faults import cells
from tests.faults.cells import judge
from tests.faults.world import World

Patch = Callable[[pytest.MonkeyPatch], None]


def promises_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promise.Promise, "holds", lambda *_: True)


def owners_always_confirm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lender, "_release", lambda *_: {"answer": "ok"})


def owners_always_vouch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lender, "_claim", lambda self, _: {"state": "ok", "lease_ms": self._lease_ms})


def nothing_is_summed(patch: pytest.MonkeyPatch) -> None:
    parse = tcp_meeting.TcpOptions.parse
    patch.setattr(tcp_meeting.TcpOptions, "parse", lambda options: dataclasses.replace(parse(options), checksum=False))


def loads_have_no_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mover.Mover, "_limit", lambda *_: None)


def blocks_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mover.Mover, "_stop", lambda self, read, error: self._finish(read, error))


def loads_are_reported_twice(patch: pytest.MonkeyPatch) -> None:
    finish = WorkerHalf._finish

    def twice(self: WorkerHalf, result: object) -> None:
        finish(self, result)  # type: ignore[arg-type]
        self._twice = [*getattr(self, "_twice", []), result]  # type: ignore[attr-defined]
        if len(self._twice) > 1:  # type: ignore[attr-defined]
            finish(self, self._twice[-2])  # type: ignore[attr-defined]

    patch.setattr(WorkerHalf, "_finish", twice)


def nobody_looks_after_pipes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(channels.Channels, "_watch", lambda *_: None)


def nobody_renews(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(renewal.Renewal, "add", lambda *_: None)


def owners_are_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mover.Mover, "release", lambda self, _: self._client.call("127.0.0.1:1", "release", {}, 1.0))
    patch.setattr(renewal.Renewal, "end", lambda *_: None)
    patch.setattr(renewal.Renewal, "drop", lambda *_: None)


#: For each guard: a cell, and what it then says.
GUARDS: dict[Patch, tuple[cells.Phase, cells.Fault, str]] = {
    promises_never_end: (cells.planned, cells.stop_d, "wrong bytes"),
    owners_always_confirm: (cells.planned, cells.stop_d, "wrong bytes"),
    owners_always_vouch: (cells.planned, cells.stop_d, "wrong bytes"),
    nothing_is_summed: (cells.moving, cells.corrupt_data, "wrong bytes"),
    loads_have_no_deadline: (cells.moving, cells.stall_data, "the end of"),
    blocks_are_not_waited_for: (cells.moving, cells.stall_data, "while it was free"),
    loads_are_reported_twice: (cells.planned, cells.nothing, "step: AssertionError"),
    nobody_looks_after_pipes: (cells.claimed, cells.kill_d, "all that was not held"),
    nobody_renews: (cells.claimed, cells.queue, "it was computed"),
    owners_are_not_told: (cells.claimed, cells.nothing, "every block free"),
}


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_without_one_guard_a_cell_of_the_table_fails(guard: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    guard(monkeypatch)
    phase, fault, complaint = GUARDS[guard]
    world = World()
    try:
        with pytest.raises(AssertionError, match=complaint):
            judge(world, phase, fault)
    finally:
        world.close()
