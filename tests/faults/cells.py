"""The table: at which phase of a hand-over which fault strikes.

A phase brings a hand-over to a point and keeps it there; a fault strikes; then everything
that lasts is healed, and `World` checks what must hold.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.connectors.headless import BLOCKS
from tests.faults.copies import CopyGate
from tests.faults.wires import DataWire, Rule
from tests.faults.world import ENOUGH_S, LEASE_S, D, NotReachedError, P, World, pause

#: How long P may take to notice, on a busy machine, that its leases are over.
_NOTICES_S = 2.0


@dataclass
class HandOver:
    """One hand-over under way."""

    world: World
    prompt: list[int] = field(init=False)
    gates: list[Rule | DataWire | CopyGate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = self.world.prompt()
        self.params = self.world.offer(self.prompt)

    @property
    def name(self) -> str:
        return f"d{self.prompt[0]}"

    def add(self) -> None:
        self.world.add(self.name, self.prompt, self.params)

    def gate(self, rule: Rule) -> Rule:
        self.gates.append(rule)
        return rule

    def open_gates(self) -> None:
        for gate in self.gates:
            gate.let_go()

    def plan(self) -> None:
        """Have D plan the load, and not start it."""
        for _ in range(100):
            if self.world.d.call("plan"):
                return
            self.world.step()
        raise NotReachedError(f"no load was planned; {self.world.facts()}")


# -- phases: each leaves a hand-over just there ---------------------------------------------


def offered(_: HandOver) -> None:
    """P has lent the blocks; D has not heard of them."""


def seen(h: HandOver) -> None:
    """D has seen the request and asked P, who has not heard it."""
    gate = h.gate(h.world.ask.rule("hello claim", "hold", times=9))
    h.add()
    h.world.wait(gate.met.is_set, "a question of D's")


def claimed(h: HandOver) -> None:
    """P has granted the claim; D's engine has not stepped."""

    def taken() -> int:
        return int(h.world.p.call("facts")["stats"]["taken"])

    before = taken()
    h.add()
    h.world.wait(lambda: taken() > before, "the claim")


def planned(h: HandOver) -> None:
    """D has given blocks to the load, which its worker has not begun."""
    h.add()
    h.plan()


def opening(h: HandOver) -> None:
    """D's worker has asked for a pipe."""
    gate = h.gate(h.world.to_p.rule("pipe.open", "hold"))
    h.add()
    h.world.until(gate.met.is_set, "the question for a pipe")


def moving(h: HandOver) -> None:
    """Some bytes have moved."""
    if h.world.pipe == "tcp":
        h.world.data.after(40_000, "hold")
        h.gates.append(h.world.data)
        h.add()
        h.world.until(h.world.data.struck.is_set, "bytes")
    else:
        h.world.copies.after(3)
        h.gates.append(h.world.copies)
        h.add()
        h.world.until(lambda: h.world.copies.held, "copies")


def moved(h: HandOver) -> None:
    """The bytes are in place; whether P vouches for them is not known."""
    h.gate(h.world.ask.rule("claim release", "hold", replies=True, times=9))
    h.add()
    h.world.until(lambda: h.world.d.call("facts")["moved"], "the bytes")


def confirmed(h: HandOver) -> None:
    """D's worker knows that the load is good; its scheduler does not."""
    moved(h)
    h.open_gates()
    h.world.wait(lambda: h.world.d.call("facts")["over"], "the confirmation")


def released(h: HandOver) -> None:
    """D decodes, unless it waits for the answer of another host; P does not know yet."""
    gate = h.gate(h.world.ask.rule("release", "hold"))
    h.add()
    h.world.until(lambda: gate.met.is_set() and (h.world.apart or h.world.outcome(h.name)), "the load")


def finished(h: HandOver) -> None:
    """D's request has ended; P has not stepped since."""
    h.world.p.stop()
    try:
        h.add()
        h.world.until(lambda: h.world.outcome(h.name), "the end", 60.0)
    finally:
        h.world.p.go_on()


Phase = Callable[[HandOver], None]
PHASES: tuple[Phase, ...] = (
    offered,
    seen,
    claimed,
    planned,
    opening,
    moving,
    moved,
    confirmed,
    released,
)

# -- faults -----------------------------------------------------------------------------------


def nothing(_: World) -> None:
    """All is well."""


def kill_p(w: World) -> None:
    w.p.kill()


def kill_d(w: World) -> None:
    w.d.kill()


def restart_p(w: World) -> None:
    w.p.kill()
    w.restart(P)


def stop_p(w: World) -> None:
    """Longer than any deadline."""
    w.p.stop()


def stop_d(w: World) -> None:
    """Past its lease; P's blocks are free, spoilt and lent again meanwhile."""
    w.d.stop()
    pass_lease(w)
    w.offer(w.prompt())
    w.d.go_on()


def pass_lease(w: World) -> None:
    """P's lease ends, whatever D does."""
    for _ in range(12):
        w.clocks.advance(LEASE_S / 10)
        w.step()


def cut_control(w: World) -> None:
    for wire in (w.ask, w.to_p, w.to_d):
        wire.cut()


def stall_control(w: World) -> None:
    """Half open: nothing arrives, nothing is closed."""
    for wire in (w.ask, w.to_p, w.to_d):
        wire.stall()


def cut_data(w: World) -> None:
    w.data.cut()


def cut_data_later(w: World) -> None:
    w.data.after(70_000, "cut")


def stall_data(w: World) -> None:
    w.data.stall()


def corrupt_data(w: World) -> None:
    w.data.after(30_000, "corrupt")


def lose(w: World) -> None:
    """Lose the next answer to each operation that matters."""
    w.ask.rule("claim release renew hello", "lose", replies=True, times=2)
    w.to_p.rule("pipe.open pipe.ready pipe.call", "lose", replies=True)


def lose_questions(w: World) -> None:
    w.ask.rule("claim release renew abandon", "lose", times=2)


def repeat(w: World) -> None:
    """Every message comes twice."""
    for wire, ops in (
        (w.ask, "hello claim release renew abandon"),
        (w.to_p, "pipe.open pipe.ready pipe.call pipe.close"),
    ):
        wire.rule(ops, "repeat", times=99)
        wire.rule(ops, "repeat", replies=True, times=99)


def reorder(w: World) -> None:
    """Messages overtake each other."""
    w.ask.rule("claim release renew abandon", "swap", times=3)
    w.ask.rule("claim release renew abandon", "swap", replies=True, times=3)


def jump_p(w: World) -> None:
    """P's clock jumps past every lease that it gave, and it writes over what it has lent."""
    w.clocks.advance(1.5 * LEASE_S, only=P)
    limit = time.monotonic() + _NOTICES_S
    while w.p.call("step").free < BLOCKS - 1 and time.monotonic() < limit:
        pause(0.002)


def jump_d(w: World) -> None:
    """D's clock jumps."""
    w.clocks.advance(1.5 * LEASE_S, only=D)


def queue(w: World) -> None:
    """D is busy with others for three leases."""
    for _ in range(36):
        w.clocks.advance(LEASE_S / 12)
        w.p.call("step")
        pause(0.02)  # for renewals


def abort(w: World) -> None:
    """The client of the latest request goes away."""
    if w.added:
        w.d.call("abort", w.added[-1])


def shut_p(w: World) -> None:
    """P shuts down in good order."""
    w.p.call("close")
    w.p.kill()


def shut_d(w: World) -> None:
    w.d.call("close")
    w.d.kill()


def reset_p(w: World) -> None:
    """P's cache is reset, and what that frees is written over."""
    w.p.call("reset")


Fault = Callable[[World], None]
#: Whatever strikes, these end in a load: nothing was lost.
HARMLESS = frozenset({nothing, repeat, queue})

FAULTS: tuple[Fault, ...] = (
    nothing,
    kill_p,
    kill_d,
    restart_p,
    stop_p,
    stop_d,
    cut_control,
    stall_control,
    cut_data,
    cut_data_later,
    stall_data,
    corrupt_data,
    lose,
    lose_questions,
    repeat,
    reorder,
    jump_p,
    jump_d,
    abort,
    shut_p,
    shut_d,
    reset_p,
)

#: Faults of the bytes, which `shm` has none of: no wire carries them.
OF_DATA = frozenset({cut_data, cut_data_later, stall_data, corrupt_data})
#: Clocks that part, which those of one host cannot: they are one.
OF_CLOCKS = frozenset({jump_p, jump_d})
#: After these an engine is not there until `World.heal`.
ENDS = frozenset({kill_p, kill_d, stop_p, shut_p, shut_d})


def possible(site: str, fault: Fault) -> bool:
    """Whether engines that are placed so can be struck by a fault."""
    return not (site == "shm" and fault in OF_DATA) and (site == "tcp apart" or fault not in OF_CLOCKS)


#: How often each cell was struck in this run, and how many schedules were drawn.
struck: Counter[tuple[str, str]] = Counter()
drawn = 0
#: What they took: seconds, and seconds of CPU time.
took = 0.0, 0.0


def strike(world: World, phase: Phase, fault: Fault) -> str | None:
    """Bring a new hand-over to a phase, have the fault strike, and see it to its end.

    Returns how D's request did; ``None`` if D did not live to tell.
    """
    hand_over = HandOver(world)
    phase(hand_over)
    fault(world)
    hand_over.open_gates()
    struck[phase.__name__, fault.__name__] += 1
    if phase is offered and world.d.alive:
        hand_over.add()
    how = None
    if world.d.alive and world.added:
        how = str(world.until(lambda: world.outcome(hand_over.name), f"the end of {hand_over.name}", ENOUGH_S))
    world.heal()
    return how


def judge(world: World, phase: Phase, fault: Fault) -> None:
    """Strike one cell, and check all that must hold afterwards."""
    if phase is not opening:
        world.note_holdings()
    how = strike(world, phase, fault)
    assert how == "loaded" or fault not in HARMLESS, f"it was {how}; {world.facts()}"
    if how == "computed" and fault is not shut_d:
        facts = world.d.call("facts")
        causes = [name for name in (*facts["counters"], *facts["stats"]) if "miss_" in name or "_failed_" in name]
        assert causes, f"nothing says why it was computed; {world.facts()}"
    world.assert_at_rest()
    world.assert_serves()
    world.assert_at_rest()
    world.assert_nothing_left()


def all_cells() -> list[tuple[str, str]]:
    """Return the names of every phase and fault."""
    return [(phase.__name__, fault.__name__) for phase in PHASES for fault in FAULTS]


def coverage() -> dict[str, Any]:
    """Return how often each cell was struck, as plain data."""
    counts = {
        phase.__name__: {fault.__name__: struck[phase.__name__, fault.__name__] for fault in FAULTS} for phase in PHASES
    }
    least = min(struck[cell] for cell in all_cells())
    return {
        "schema": 1,
        "schedules": drawn,
        "seconds": round(took[0], 1),
        "cpu_seconds": round(took[1], 1),
        "least": least,
        "struck": counts,
    }


def table() -> str:
    """Return the cells and how often each was struck, as text."""
    width = max(len(fault.__name__) for fault in FAULTS)
    lines = [" " * width + "".join(f" {phase.__name__:>9}" for phase in PHASES)]
    for fault in FAULTS:
        cells = "".join(f" {struck[phase.__name__, fault.__name__]:>9}" for phase in PHASES)
        lines.append(f"{fault.__name__:<{width}}{cells}")
    lines.append(f"each cell at least {min(struck[cell] for cell in all_cells())} times")
    if drawn:
        each = took[1] / drawn
        lines.append(f"{drawn} schedules in {took[0]:.0f} s, {each:.2f} s of CPU time each")
    return "\n".join(lines)
