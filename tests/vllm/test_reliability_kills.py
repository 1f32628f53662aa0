"""Requests while the producer is killed and started again, in `make test-full` only.

``KVCONNECT_ENGINE_REQUESTS`` requests (300) are spread over three kills, ``KVCONNECT_ENGINE_KILL_S``
seconds (150) apart.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from kvconnect.demo.client import EXTERNAL_TOKENS, Prompt
from tests.vllm import wired
from tests.vllm.clients import complaints, held, poke, until
from tests.vllm.fleet import unique
from tests.vllm.schedules import LENGTHS
from tests.vllm.wired import Wired

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

REQUESTS = int(os.environ.get("KVCONNECT_ENGINE_REQUESTS", "300"))
KILL_S = float(os.environ.get("KVCONNECT_ENGINE_KILL_S", "150"))
KILLS, CLIENTS = 3, 2
START_S = 420.0


@pytest.fixture(scope="module", params=["recompute", "fail"])
def wires(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """One fleet a policy."""
    folder = tmp_path_factory.mktemp(f"kills-{request.param}")
    with wired.running(folder, START_S, failure_policy=request.param) as wires:
        yield wires


@dataclass
class Traffic:
    """Clients that do what a router does: ask P for a ticket, if it answers, and D for the text."""

    w: Wired
    seconds: float
    sent: Iterator[int] = field(default_factory=itertools.count)
    how: Counter[str] = field(default_factory=Counter)
    #: Requests that D answered with an error, and with what.
    failed: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        fleet = self.w.fleet
        self.prompts = [fleet.prompt(tokens, seed, max_tokens=12) for seed, tokens in enumerate(LENGTHS)]
        self.right = [fleet.reference(prompt).texts for prompt in self.prompts]

    def client(self) -> None:
        """Send requests evenly until they are all sent."""
        began = time.monotonic()
        while (number := next(self.sent)) < REQUESTS:
            threading.Event().wait(max(0.0, began + number * self.seconds / REQUESTS - time.monotonic()))
            prompt = replace(self.prompts[number % len(LENGTHS)], salt=unique("traffic"))
            self.ask(number % len(LENGTHS), prompt, self.ticket(prompt))

    def ticket(self, prompt: Prompt) -> Mapping[str, Any] | None:
        """Return P's ticket, if it is there to give one."""
        try:
            return self.w.fleet.ticket(self.w.p, prompt)
        except httpx.HTTPError:
            return None

    def ask(self, number: int, prompt: Prompt, params: Mapping[str, Any] | None) -> None:
        """Have D answer, and note how it went."""
        name = unique("request")
        try:
            answer = self.w.fleet.ask(self.w.d, prompt, request_id=name, kv_transfer_params=params)
        except httpx.HTTPError as error:
            with self._lock:
                self.failed[name] = str(error)
            return
        with self._lock:
            self.how["with a ticket" if params else "without a ticket"] += 1
            if answer.texts != self.right[number]:
                self.wrong.append(name)


def kill_in_the_middle(traffic: Traffic) -> None:
    """Kill P while its bytes are on their way to D, see what becomes of that load, and start P again."""
    w = traffic.w
    number = LENGTHS.index(900)
    prompt = replace(traffic.prompts[number], salt=unique("struck"))
    params = w.fleet.ticket(w.p, prompt)
    w.data.after(300_000, "hold")
    thread = threading.Thread(target=traffic.ask, args=(number, prompt, params), name="struck-client")
    thread.start()
    assert w.data.struck.wait(30)
    wired.kill(w.p)
    w.heal()
    thread.join(90)
    assert not thread.is_alive()
    w.restart(w.p)


def test_requests_while_a_producer_is_killed_and_restarted(wires: Wired, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = wires.fleet
    fails = fleet.plan.failure_policy == "fail"
    traffic = Traffic(wires, KILL_S * (KILLS + 0.5))
    clients = [threading.Thread(target=traffic.client, name=f"client-{number}") for number in range(CLIENTS)]
    before = fleet.metric(wires.d, EXTERNAL_TOKENS)
    for client in clients:
        client.start()
    for _ in range(KILLS):
        killed_at = time.monotonic()
        kill_in_the_middle(traffic)
        threading.Event().wait(max(0.0, killed_at + KILL_S - time.monotonic()))
    for client in clients:
        client.join(KILL_S + 120.0)
        assert not client.is_alive()
    fetched = fleet.metric(wires.d, EXTERNAL_TOKENS) - before
    with capsys.disabled():
        sys.stdout.write(
            f"\n{REQUESTS + KILLS} requests, P killed {KILLS} times, policy {fleet.plan.failure_policy}: "
            f"{dict(traffic.how)}, {len(traffic.failed)} failed, {fetched:.0f} tokens fetched\n"
        )
    assert traffic.wrong == []
    assert sum(traffic.how.values()) + len(traffic.failed) == REQUESTS + KILLS
    assert fetched > 0
    reasons = why_failed(wires, traffic.failed)
    if fails:
        # Those whose bytes were on their way, and maybe others; each with its reason in D's log.
        assert len(traffic.failed) >= KILLS
        assert all(reasons.values()), reasons
    else:
        assert traffic.failed == {}
    for engine in fleet.engines:
        assert complaints(engine) == []
    until(lambda: at_rest(wires), fleet.plan.lease_s + 20.0, "every block is free")


def at_rest(w: Wired) -> bool:
    """Whether every block is free on both sides, but for the one of a hand-over just made."""
    poke(w.fleet)
    return held(w.fleet, w.d) == 0 and held(w.fleet, w.p) <= 1


def why_failed(w: Wired, failed: Mapping[str, str]) -> dict[str, str]:
    """Return what D's log says of each failed request."""
    said = re.findall(r"could not load the KV of (\S+): (.+)", w.d.log.read_text(errors="replace"))
    return {name: next((why for request, why in said if name in request), "") for name in failed}
