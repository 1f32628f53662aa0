"""Real engines that meet through wires, in `make test-full` only: what strikes between them, and a producer that dies.

``KVCONNECT_ENGINE_SCHEDULES`` (24) is how many schedules are drawn, ``KVCONNECT_ENGINE_SEED`` (0) the first
one's seed; a failure names its own.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.vllm import wired
from tests.vllm.clients import complaints, held, leave, poke, until
from tests.vllm.fleet import BLOCK, unique
from tests.vllm.schedules import Schedules
from tests.vllm.wired import Wired

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

LEASE_S = 4.0
#: Short, so that a schedule is over soon.
DEADLINES = {"connect_timeout_s": 2.0, "lookup_timeout_s": 1.0, "transfer_timeout_s": 5.0, "release_timeout_s": 2.0}
START_S = 420.0


@pytest.fixture(scope="module", params=["tcp", "shm"])
def wires(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """One fleet a pipe."""
    folder = tmp_path_factory.mktemp(f"wired-{request.param}")
    more = {"content_lookup": False, **DEADLINES}
    with wired.running(folder, START_S, pipe=request.param, lease_s=LEASE_S, extra_config=more) as wires:
        at_rest(wires)  # a first request takes longer than the clients below have patience
        yield wires


@pytest.fixture(autouse=True)
def nothing_lost(wires: Wired) -> Iterator[None]:
    """After each: all is well, and every block free within a lease."""
    yield
    wires.heal()
    at_rest(wires)


def at_rest(w: Wired) -> None:
    """Assert that hand-overs work, every block is free within a lease, and no engine has complained."""
    until(functools.partial(loaded, w), 30.0, "a hand-over that is fetched")
    fleet = w.fleet

    def free() -> bool:
        poke(fleet)
        return held(fleet, w.d) == 0 and held(fleet, w.p) <= 1

    until(free, LEASE_S + 3, "every block is free")
    for engine in fleet.engines:
        assert complaints(engine) == []


def loaded(w: Wired) -> bool:
    """Hand a new prompt over; whether it was fetched. The answer is right in any case."""
    prompt = w.fleet.prompt(100, 1, salt=unique("next"))
    answer, fetched = w.fleet.fetched(w.d, lambda: w.fleet.by_ticket(prompt))
    assert answer.texts == w.fleet.reference(prompt).texts
    return fetched >= 99


# -- clients that leave, at phases --------------------------------------------------------


def seen(w: Wired) -> Any:
    """D has asked for the KV; P has not heard it."""
    rule = w.ask.rule("hello claim", "hold", times=9)
    return rule.met, rule


def moving(w: Wired) -> Any:
    """Some bytes have come."""
    w.data.after(300_000, "hold")
    return w.data.struck, w.data


def moved(w: Wired) -> Any:
    """All have; whether P vouches for them is not known."""
    rule = w.ask.rule("claim release", "hold", replies=True, times=9)
    return rule.met, rule


def decoding(w: Wired) -> Any:
    """P has not heard that D has it all."""
    rule = w.ask.rule("release", "hold", times=9)
    return rule.met, rule


@pytest.mark.parametrize("phase", [seen, moving, moved, decoding])
def test_a_client_that_leaves_a_consumer_at_a_phase(wires: Wired, phase: Callable[[Wired], Any]) -> None:
    if phase is moving and not wires.carries_data:
        pytest.skip("shm has no wire for its bytes")
    fleet = wires.fleet
    prompt = fleet.prompt(30 * BLOCK, 3, salt=unique("leaves"), max_tokens=200)
    params = fleet.ticket(wires.p, prompt)
    met, gate = phase(wires)
    thread = threading.Thread(
        target=leave, args=(wires.d, prompt, 0.5), kwargs={"kv_transfer_params": params}, name="test-client"
    )
    thread.start()
    assert met.wait(10)
    thread.join(10)
    gate.let_go()
    wires.heal()
    until(lambda: not fleet.busy(wires.d), DEADLINES["transfer_timeout_s"] + 5, "D is idle, every block free")


# -- schedules -----------------------------------------------------------------------------


def test_random_schedules_end_in_right_answers_and_free_blocks(
    wires: Wired, capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(os.environ.get("KVCONNECT_ENGINE_SCHEDULES", "24")) // 2  # half of them over each pipe
    first = int(os.environ.get("KVCONNECT_ENGINE_SEED", "0"))
    drawn = Schedules(wires)
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            seen[drawn.run(seed)] += 1
            at_rest(wires)
        except BaseException as error:
            error.add_note(
                f"schedule: KVCONNECT_ENGINE_SEED={seed} KVCONNECT_ENGINE_SCHEDULES=2; before it: {dict(seen)}"
            )
            raise
    with capsys.disabled():
        sys.stdout.write(f"\n{count} schedules on real engines: {dict(seen.most_common())}\n")
