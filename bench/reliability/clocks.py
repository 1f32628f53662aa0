"""Clocks that jump, between halves of engines without a model, over a real pipe: no real clock is ours to move."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

from kvconnect.bench.tables import Row
from tests.faults.cells import HandOver, moving
from tests.faults.world import ENOUGH_S, LEASE_S, D, World, warm_up

#: Past every lease.
_JUMP_S = 1.5 * LEASE_S
ENGINES = f"halves of two engines without a model, `tcp`, lease {LEASE_S:g} s"


def rows() -> Iterator[Row]:
    """Measure each jump."""
    warm_up()
    yield _row("D's clock jumps past the lease", lambda w: w.clocks.advance(_JUMP_S, only=D))
    yield _row("both clocks jump past the lease (the host slept)", lambda w: w.clocks.advance(_JUMP_S))


def _row(case: str, jump: Callable[[World], None]) -> Row:
    world = World("tcp")
    try:
        world.assert_serves()
        began = time.monotonic()
        hand_over = HandOver(world)
        moving(hand_over)
        jump(world)
        over_at = time.monotonic()
        hand_over.open_gates()
        how = world.until(functools.partial(world.outcome, hand_over.name), "the end of the request", ENOUGH_S)
        answered_at = time.monotonic()
        while world.hand_over() != "loaded":
            world.clocks.advance(1.0)
        recovered_at = time.monotonic()
        world.assert_at_rest()  # or it raises: within a lease of the engines' clocks
    finally:
        world.close()
    return {
        "case": case,
        "engines": ENGINES,
        "asked": 1,
        "right": int(how in {"loaded", "computed"}),
        "cut_short": 0,
        "fetched": int(how == "loaded"),
        "failed": int(how == "error"),
        "errors": [],
        "slowest_s": round(answered_at - began, 2),
        "over": "",
        "recovered_s": round(recovered_at - over_at, 2),
        "free_after_s": None,
        "leaked_blocks": 0,
    }
