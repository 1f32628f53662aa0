"""One fault at a time between two engines: what became of the requests, and when all was well again."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.reliability.report import ENGINES
from kvconnect.bench.tables import Row
from kvconnect.demo import client as api
from kvconnect.demo.client import EXTERNAL_TOKENS, Answer, Prompt
from tests.vllm.clients import held, poke, until
from tests.vllm.fleet import unique
from tests.vllm.wired import Wired

#: Requests under way when a fault strikes, and their length: several blocks' bytes before and after it.
REQUESTS, TOKENS = 4, 900
#: How much of the first one's bytes has passed when a fault strikes in the middle.
MIDDLE_BYTES = 300_000
#: Nothing may take longer.
LIMIT_S = 120.0


@dataclass(frozen=True)
class Ticket:
    """A prompt, and what its prefill returned."""

    prompt: Prompt
    params: Mapping[str, Any]


@dataclass
class Struck:
    """What became of the requests of one case. Times are `time.monotonic`."""

    case: str
    engines: str = ENGINES
    answers: list[Answer | Exception] = field(default_factory=list)
    #: Seconds from asking D to its answer.
    waits_s: list[float] = field(default_factory=list)
    right: int = 0
    #: Answers that are the beginning of the right one.
    cut_short: int = 0
    fetched: int = 0
    #: When the cause was over, and what that was.
    over_at: float = 0.0
    over: str = ""


class Session:
    """Two engines, undisturbed at the beginning and at the end of each case."""

    def __init__(self, w: Wired) -> None:
        self.w = w
        self.fleet = w.fleet
        self._right: dict[int, tuple[str, ...]] = {}

    def tickets(self, count: int = REQUESTS) -> list[Ticket]:
        """Have P prefill prompts, and take their tickets."""
        prompts = [self.fleet.prompt(TOKENS, seed, salt=unique("struck")) for seed in range(count)]
        for seed in range(count):
            if seed not in self._right:
                self._right[seed] = self.fleet.reference(prompts[seed]).texts
        return [Ticket(prompt, self.fleet.ticket(self.w.p, prompt)) for prompt in prompts]

    def strike(self, case: str, do: Callable[[], object], *, over: str = "") -> Struck:
        """Send requests to D, have ``do`` strike in the middle of P's bytes, and wait for all answers.

        ``over`` names what ends the cause, if it is over with the last answer and not with ``do``.
        """
        struck = Struck(case, over=over)
        tickets = self.tickets()
        self.w.data.after(MIDDLE_BYTES, "hold")
        with concurrent.futures.ThreadPoolExecutor(len(tickets), thread_name_prefix="clients") as pool:
            before = self._fetched_tokens()
            asked = [pool.submit(self._ask, ticket) for ticket in tickets]
            if not self.w.data.struck.wait(LIMIT_S):
                raise TimeoutError("no bytes came by")
            until(lambda: self._at_d() == len(tickets), LIMIT_S, "all requests are at D")
            do()
            struck.over_at = time.monotonic()
            self.w.data.let_go()
            self._gather(struck, [future.result(LIMIT_S) for future in asked])
        struck.fetched = self._fetched(before)
        return struck

    def ask(self, case: str, tickets: Sequence[Ticket]) -> Struck:
        """Send requests with tickets of before."""
        struck = Struck(case)
        before = self._fetched_tokens()
        self._gather(struck, self.fleet.together([functools.partial(self._ask, ticket) for ticket in tickets]))
        struck.fetched = self._fetched(before)
        return struck

    def recovered(self, struck: Struck) -> Row:
        """Wait until a new request is fetched, then until every block is free; return the case's row."""
        while not self._loaded():
            if time.monotonic() - struck.over_at > LIMIT_S:
                raise TimeoutError(f"{struck.case}: new requests are not fetched")
            threading.Event().wait(0.1)
        recovered_s = time.monotonic() - struck.over_at
        leaked, freed_s = self._leaked(struck)
        return self.row(struck) | {
            "recovered_s": round(recovered_s, 2),
            "free_after_s": round(freed_s, 1),
            "leaked_blocks": leaked,
        }

    def row(self, struck: Struck) -> Row:
        """Return what became of the requests of a case."""
        errors = sorted({str(answer) for answer in struck.answers if isinstance(answer, Exception)})
        return {
            "case": struck.case,
            "engines": struck.engines,
            "asked": len(struck.answers),
            "right": struck.right,
            "cut_short": struck.cut_short,
            "fetched": struck.fetched,
            "failed": sum(isinstance(answer, Exception) for answer in struck.answers),
            "errors": errors,
            "slowest_s": round(max(struck.waits_s, default=0.0), 2),
            "over": struck.over,
        }

    def producer_free_after(self, struck: Struck) -> float:
        """Wait until P has all blocks back without a D that could take any; return the seconds since the strike."""
        for pokes in itertools.count(1):
            threading.Event().wait(1.0)
            # So that it takes a step; it keeps one block of each for a while.
            self.fleet.ask(self.w.p, Prompt([5], max_tokens=1))
            passed = time.monotonic() - struck.over_at
            if held(self.fleet, self.w.p) <= pokes or passed > self.fleet.plan.lease_s + 20.0:
                break
        return passed

    def _leaked(self, struck: Struck) -> tuple[int, float]:
        """Wait until every block is free on both sides; return those that are not within a lease, and how long."""
        while True:
            poke(self.fleet)
            # The block of the hand-over just made may be counted, P's as of its latest step.
            left = held(self.fleet, self.w.d) + max(0, held(self.fleet, self.w.p) - 1)
            passed = time.monotonic() - struck.over_at
            if not left or passed > self.fleet.plan.lease_s + 20.0:
                return left, passed
            threading.Event().wait(0.5)

    def _at_d(self) -> int:
        found = api.metrics(self.fleet.http, self.w.d.url)
        return round(found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"])

    def _ask(self, ticket: Ticket) -> tuple[Prompt, Answer | Exception, float]:
        began = time.monotonic()
        found: Answer | Exception
        try:
            found = self.fleet.ask(self.w.d, ticket.prompt, kv_transfer_params=ticket.params)
        except httpx.HTTPError as error:
            found = error
        return ticket.prompt, found, time.monotonic() - began

    def _gather(self, struck: Struck, found: Sequence[tuple[Prompt, Answer | Exception, float]]) -> None:
        for number, (_, answer, wait_s) in enumerate(found):
            struck.answers.append(answer)
            struck.waits_s.append(wait_s)
            if isinstance(answer, Answer):
                (right,) = self._right[number]
                struck.right += answer.text == right
                struck.cut_short += answer.text != right and right.startswith(answer.text)

    def _loaded(self) -> bool:
        prompt = self.fleet.prompt(100, 1, salt=unique("next"))
        answer, fetched = self.fleet.fetched(self.w.d, lambda: self.fleet.by_ticket(prompt))
        if answer.texts != self.fleet.reference(prompt).texts:
            raise AssertionError("an answer is not one engine's")
        return fetched >= 99

    def _fetched_tokens(self) -> float:
        return self.fleet.metric(self.w.d, EXTERNAL_TOKENS)

    def _fetched(self, before: float) -> int:
        """Return how many requests' tokens were fetched; 0 of an engine that is gone."""
        try:
            return round((self._fetched_tokens() - before) / TOKENS)
        except httpx.HTTPError:
            return 0
