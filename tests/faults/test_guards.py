"""That the table catches something: with one guard of the product taken away, a cell or a scenario fails.

Engines are forked, so that what is patched here is patched in them. What no fault of the table
brings about (two takers, a ticket that was tampered with) is tried between buffers, without vLLM.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import closing
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from kvconnect import control
from kvconnect.buffers import channels, ledger, links, mover, peers, promise, renewal
from kvconnect.buffers.base import Claim, Want
from kvconnect.buffers.lender import Lender
from kvconnect.buffers.ticket import Ticket
from kvconnect.connectors.worker import WorkerHalf
from kvconnect.errors import LoadError
from kvconnect.pipes import tcp_meeting
from tests.buffers.engines import Engine, engines, eventually, group, key, meet
from tests.faults import cells
from tests.faults.cells import judge
from tests.faults.world import World

Patch = Callable[[pytest.MonkeyPatch], None]


def promises_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promise.Promise, "holds", lambda *_: True)


def clocks_of_hosts_are_taken_for_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promise.Promise, "_is_of_our_clock", lambda *_: True)


def owners_always_confirm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lender, "_release", lambda *_: {"answer": "ok"})


def owners_always_vouch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lender, "_claim", lambda self, _: {"state": "ok", **self._lease()})


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


def leases_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger.Ledger, "expire", lambda *_: None)


def resets_end_what_is_claimed(patch: pytest.MonkeyPatch) -> None:
    def clear(self: ledger.Ledger) -> bool:
        for entry in list(self._entries.values()):
            self._end(entry, "cleared")
        return True

    patch.setattr(ledger.Ledger, "clear", clear)


def questions_have_no_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(control.ControlClient, "_expire", lambda *_: None)


def failures_pass_for_loads(patch: pytest.MonkeyPatch) -> None:
    finish = WorkerHalf._finish

    def blind(self: WorkerHalf, result: Any) -> None:
        finish(self, dataclasses.replace(result, error=None))

    patch.setattr(WorkerHalf, "_finish", blind)


def peers_that_failed_are_met_for_every_request(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(peers, "RETRY_S", 0.0)


def peers_that_failed_are_never_met_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(peers, "RETRY_S", 1e9)


def dead_pipes_are_not_opened_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(links.Links, "failed", lambda self, link, _, **__: self.drop(link))


def dead_connections_are_not_asked_anew(patch: pytest.MonkeyPatch) -> None:
    released = mover.Mover._released
    patch.setattr(mover.Mover, "_released", lambda *args, again: released(*args, again=again and False))


def entries_are_given_to_anybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger.Ledger, "_open_to", lambda *_: True)


def blocks_of_others_may_be_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mover, "_check_owned", lambda _: None)


def owners_do_not_look_which_blocks_were_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger.Entry, "digest", mock.ANY)


# -- what is seen of them ---------------------------------------------------------------------

Scenario = Callable[[World], None]


def cell(phase: cells.Phase, fault: cells.Fault) -> Scenario:
    """One cell of the table."""
    return lambda world: judge(world, phase, fault)


def promised(h: cells.HandOver) -> None:
    """`cells.planned`, with P's promise: a claim that P heard only after the fault would be refused, guard or not."""
    cells.claimed(h)
    h.plan()


def a_peer_that_cannot_be_reached_costs_one_time_out(world: World) -> None:
    world.ask.stall()
    assert world.hand_over() == "computed"
    prompt = world.prompt()
    world.add("second", prompt, world.offer(prompt))
    world.until(lambda: world.outcome("second"), "the end of the second", 1.0)


def a_peer_that_could_not_be_reached_is_met_again(world: World) -> None:
    world.ask.stall()
    assert world.hand_over() == "computed"
    world.heal()
    world.assert_serves()


def a_pipe_that_died_unheard_is_opened_anew(world: World) -> None:
    world.note_holdings()
    how = cells.strike(world, cells.planned, cells.cut_data)
    assert how == "loaded", f"it was {how}; {world.facts()}"


def a_connection_that_died_before_the_last_word_is_asked_anew(world: World) -> None:
    world.note_holdings()
    how = cells.strike(world, cells.released, cells.cut_control)
    assert how == "loaded", f"it was {how}; {world.facts()}"


def an_entry_is_one_takers(_: World) -> None:
    options = {"group": group()}
    with engines(**options) as (p, one), closing(Engine("D2", consumes=True, **options)) as two:
        ticket = p.offer()
        found = [d.find("r", Want(key(1), ticket=ticket)) for d in (one, two)]
        claims = [claim for claim in found if isinstance(claim, Claim)]
        eventually(lambda: all(claim.promise.question.done() for claim in claims))
        held = sum(claim.promise.holds() for claim in claims)
        assert held == 1, f"the entry was taken {held} times"


def only_blocks_of_the_claim_are_read(_: World) -> None:
    with engines() as (p, d):
        meet(p, d)
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        refused = d.read(claim, remote=((1, 2, 40),))
        with contextlib.suppress(LoadError):
            refused.wait(8)
        assert refused.error, "blocks of others were read"


def a_ticket_that_was_tampered_with_is_of_no_use(_: World) -> None:
    with engines() as (p, d):
        meet(p, d)
        real = Ticket.from_wire(p.offer())
        claim = d.find("r", Want(key(1), ticket=dataclasses.replace(real, blocks=((1, 2, 40),)).to_wire()))
        if isinstance(claim, Claim):
            read = d.read(claim)
            with contextlib.suppress(LoadError):
                read.wait(8)
            assert read.error, "blocks of others were read"


#: For each guard: what shows that it is missing, where, and what that then says.
GUARDS: dict[Patch, tuple[Scenario, str, str]] = {
    promises_never_end: (cell(promised, cells.stop_d), "tcp", "wrong bytes"),
    clocks_of_hosts_are_taken_for_one: (cell(promised, cells.jump_p), "tcp apart", "wrong bytes"),
    owners_always_confirm: (cell(promised, cells.stop_d), "tcp", "wrong bytes"),
    owners_always_vouch: (cell(cells.planned, cells.stop_d), "tcp", "wrong bytes"),
    nothing_is_summed: (cell(cells.moving, cells.corrupt_data), "tcp", "wrong bytes"),
    failures_pass_for_loads: (cell(cells.moving, cells.stall_data), "tcp", "wrong bytes"),
    loads_have_no_deadline: (cell(cells.moving, cells.stall_data), "tcp", "the end of"),
    questions_have_no_deadline: (cell(cells.moved, cells.stall_control), "tcp apart", "the end of"),
    blocks_are_not_waited_for: (cell(cells.moving, cells.stall_data), "tcp", "while it was free"),
    loads_are_reported_twice: (cell(cells.planned, cells.nothing), "tcp", "step: AssertionError"),
    nobody_looks_after_pipes: (cell(cells.claimed, cells.kill_d), "tcp", "they look after their pipe"),
    nobody_renews: (cell(cells.claimed, cells.queue), "tcp", "it was computed"),
    owners_are_not_told: (cell(cells.claimed, cells.nothing), "tcp", "every block free"),
    leases_never_end: (cell(cells.claimed, cells.kill_d), "tcp", "every block free"),
    resets_end_what_is_claimed: (cell(promised, cells.reset_p), "tcp", "wrong bytes"),
    peers_that_failed_are_never_met_again: (
        a_peer_that_could_not_be_reached_is_met_again,
        "tcp",
        "new requests are not loaded",
    ),
    peers_that_failed_are_met_for_every_request: (
        a_peer_that_cannot_be_reached_costs_one_time_out,
        "tcp",
        "the end of the second",
    ),
    dead_pipes_are_not_opened_anew: (a_pipe_that_died_unheard_is_opened_anew, "tcp", "it was computed"),
    dead_connections_are_not_asked_anew: (
        a_connection_that_died_before_the_last_word_is_asked_anew,
        "tcp apart",
        "it was computed",
    ),
    entries_are_given_to_anybody: (an_entry_is_one_takers, "tcp", "taken 2 times"),
    blocks_of_others_may_be_read: (only_blocks_of_the_claim_are_read, "tcp", "were read"),
    owners_do_not_look_which_blocks_were_read: (a_ticket_that_was_tampered_with_is_of_no_use, "tcp", "were read"),
}


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_without_one_guard_something_fails_and_says_what(guard: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, site, complaint = GUARDS[guard]
    guard(monkeypatch)
    with closing(World(site)) as world, pytest.raises(AssertionError, match=complaint):
        scenario(world)


@pytest.mark.parametrize(
    ("scenario", "site"),
    [
        pytest.param(scenario, site, id=scenario.__name__)
        for scenario, site, _ in GUARDS.values()
        if scenario.__name__ != "<lambda>"  # cells have tests of their own
    ],
)
def test_with_all_guards_in_place_nothing_fails(scenario: Scenario, site: str) -> None:
    with closing(World(site)) as world:
        scenario(world)
