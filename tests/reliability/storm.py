"""A storm: requests keep coming while their producer is killed and restarted again and again.

One `Storm` is a router, a producer P and a consumer D over a real pipe, on the real clock.
P and D are processes of their own without a model (`tests.faults.engine`): they "compute"
recognisable bytes, compare each block that was loaded with what it must be, and overwrite every
block that is free. What the router does is what routers do: P prefills, D gets P's ticket; while
there is no P, D gets the request alone.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvconnect.testing.engine import BLOCK, BLOCKS
from kvconnect.testing.leaks import Holdings
from tests.faults.engine import EngineDiedError, Report
from tests.reliability.parties import (
    CONNECT_S,
    LEASE_S,
    LOOKUP_S,
    RELEASE_S,
    TRANSFER_S,
    Mortal,
    eventually,
    pause,
    start,
)

#: For machines that have much else to do; what it took is told.
_BUSY_S = 10.0
#: Nothing may keep a request longer than all its deadlines one after another, and its turn behind others.
ENOUGH_S = CONNECT_S + LOOKUP_S + TRANSFER_S + RELEASE_S + _BUSY_S
#: A restarted P that gives tickets is loaded from within this: its new incarnation is asked at once.
RECOVERED_S = CONNECT_S + LOOKUP_S + _BUSY_S
#: A P that is to be killed is given so long for D to have a load under way.
_AIM_S = 2.0
#: Requests at D at once, so few that none is preempted; and those that come together.
_AT_ONCE, _BURST = 5, 4
_TICK_S, _TELL_S = 0.002, 10.0
#: Threads of pools of fixed size, each made when it is first needed.
LATE = re.compile(r"thread 'kvconnect-(read-starts|block-sums|pipe-\w+)-[0-3]'")
_storms = itertools.count()


@dataclass
class Tally:
    """How it went."""

    requests: int = 0
    kills: int = 0
    #: Kills that struck while D had a load under way.
    under_way: int = 0
    #: "loaded"; "recomputed" and "error": it had a ticket; "alone": it had none, for there was no P.
    how: Counter[str] = field(default_factory=Counter)
    longest_wait_s: float = 0.0
    #: From the moment that a restarted P answered to the end of the first request loaded from it.
    recoveries_s: list[float] = field(default_factory=list)
    #: D's counters of misses and failed loads.
    reasons: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """Return all of it in one line."""
        recoveries = ", ".join(f"{seconds:.2f}" for seconds in self.recoveries_s)
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(self.reasons.items()))
        return (
            f"{self.requests} requests: {self.how['loaded']} fetched, {self.how['recomputed']} recomputed, "
            f"{self.how['error']} failed, {self.how['alone']} without a ticket; longest wait "
            f"{self.longest_wait_s:.2f} s; P killed {self.kills} times ({self.under_way} during a load)"
            + (f"; loaded again {recoveries} s after its return" if recoveries else "")
            + (f"; {reasons}" if reasons else "")
        )


@dataclass
class _Request:
    """One request at D."""

    name: str
    prompt: list[int]
    ticket: Any
    #: How often P had been killed when it gave the ticket; ``None``: there was no P.
    life: int | None
    since: float = 0.0


class Storm:
    """P and D, and whoever sends them requests."""

    def __init__(self, pipe: str, policy: str, requests: int, lasting_s: float, kills_s: tuple[float, float]) -> None:
        """``kills_s``: when P is killed for the first time, and how often after that."""
        self.name = f"{pipe}, {policy}"
        self.tally = Tally()
        self._policy, self._count = policy, requests
        self._gap_s, self._kills_s = lasting_s / requests, kills_s
        self._dice = random.Random(self.name)  # noqa: S311 - lengths of prompts
        self._numbers = itertools.count(1)
        self._tickets: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._at_d: dict[str, _Request] = {}
        self._failure: BaseException | None = None
        self._report = Report({}, 0, [])
        group = f"storm-{os.getpid()}-{next(_storms)}"
        self._p = Mortal(group, pipe, policy)
        self._d = start("D", group, pipe, policy)

    def run(self, say: Callable[[str], None]) -> None:
        """Let the storm pass; every check that can fail is made here."""
        began = time.monotonic()
        threading.Thread(target=self._feed, name=f"storm {self.name}", daemon=True).start()
        held = {"D": self._endure(say, began)}
        self._settled()
        self._serves_again()
        pause(LEASE_S)  # by then it has asked D whether their pipe is there, over a connection of its own
        held |= {"P": self._p.call("holdings")}
        self._serves_again()
        self._settled()
        self._nothing_left(held)
        stats = self._d.call("facts")["stats"]
        self.tally.reasons = {name: n for name, n in stats.items() if n and re.search("miss_|_failed_", name)}
        say(f"{self.name}: over after {time.monotonic() - began:.0f} s: {self.tally.line()}")

    def close(self) -> None:
        self._p.close()
        self._d.close()

    def _endure(self, say: Callable[[str], None], began: float) -> Holdings | None:
        """Serve all requests, and kill P in time; return what D held when nothing had struck yet."""
        told, kill_at, held = began, began + self._kills_s[0], None
        while self.tally.requests < self._count:
            now = time.monotonic()
            if now > kill_at and (self._report.loading or now > kill_at + _AIM_S):
                held = held or self._d.call("holdings")
                self.tally.under_way += bool(self._report.loading)
                self._p.kill()
                self.tally.kills = self._p.kills
                kill_at += self._kills_s[1]
            if now > told + _TELL_S:
                say(f"{self.name}: {now - began:.0f} s, {self.tally.line()}")
                told = now
            self._step()
        return held

    # -- the router ---------------------------------------------------------------------

    def _feed(self) -> None:
        began = time.monotonic()
        try:
            for number in range(self._count):
                due = began + number // _BURST * _BURST * self._gap_s
                while (left := due - time.monotonic()) > 0 or not self._has_room():
                    self._step_p()
                    pause(min(max(left, 0.005), 0.05))
                self._prefill()
        except BaseException as error:  # noqa: BLE001 - handed to the storm's own thread
            self._failure = error

    def _has_room(self) -> bool:
        return self._tickets.qsize() + len(self._at_d) < _AT_ONCE

    def _step_p(self) -> int:
        """Have P take a step; return how many blocks are free there."""
        try:
            report = self._p.call("step")
        except EngineDiedError:
            return 0
        assert not report.wrong, report.wrong
        return int(report.free)

    def _prefill(self) -> None:
        number = next(self._numbers)
        # Never one more than whole blocks: the last token is D's to compute, and its block would not be loaded.
        tokens = self._dice.randrange(1, 12) * BLOCK - self._dice.randrange(BLOCK - 1)
        prompt = list(range(number, number + tokens))
        life = self._p.kills
        try:
            ticket = self._p.call("offer", f"p{number}", prompt)
        except EngineDiedError:
            ticket = None
        self._tickets.put(_Request(f"d{number}", prompt, ticket, life if ticket else None))

    def _step(self) -> None:
        """Give D what it has room for, and have it take one step."""
        if self._failure is not None:
            raise self._failure
        while len(self._at_d) < _AT_ONCE and not self._tickets.empty():
            request = self._tickets.get()
            request.since = time.monotonic()
            self._at_d[request.name] = request
            self._d.call("add", request.name, request.prompt, request.ticket)
        self._report = report = self._d.call("step")
        assert not report.wrong, report.wrong
        for name in self._at_d.keys() & report.outcomes.keys():
            self._ended(self._at_d.pop(name), report.outcomes[name])
        now = time.monotonic()
        late = [request.name for request in self._at_d.values() if now > request.since + ENOUGH_S]
        assert not late, f"{late} hang; {self._d.call('facts')}"
        pause(_TICK_S)

    def _ended(self, request: _Request, how: str) -> None:
        now, tally, p = time.monotonic(), self.tally, self._p
        if how == "computed":
            how = "alone" if request.life is None else "recomputed"
        allowed = {"loaded", "recomputed", "alone", *(["error"] if self._policy == "fail" else [])}
        assert how in allowed, f"{request.name} was {how}"
        lives = request.life == p.kills and request.since > p.since + (RECOVERED_S if p.kills else 0)
        assert how == "loaded" or not lives, f"{request.name} was {how} though its P lives; {self._d.call('facts')}"
        tally.requests += 1
        tally.how[how] += 1
        tally.longest_wait_s = max(tally.longest_wait_s, now - request.since)
        if how == "loaded" and request.life == p.kills == len(tally.recoveries_s) + 1:
            tally.recoveries_s.append(now - p.since)

    # -- afterwards ---------------------------------------------------------------------

    def _settled(self) -> None:
        """Within a lease every block is free on both sides."""

        def free() -> list[int]:
            self._step()
            return [self._report.free, self._step_p()]

        eventually(lambda: free() == [BLOCKS - 1] * 2, LEASE_S + 1.0, lambda: f"free are {free()}")

    def _serves_again(self) -> None:
        """New requests are loaded from the P that is there now; D was never restarted."""
        tally, until = self.tally, max(time.monotonic(), self._p.since + RECOVERED_S)
        while self.tally is tally or self.tally.how["loaded"] < _BURST:
            assert self.tally is tally or time.monotonic() < until, self.tally.line()
            self.tally = Tally()
            for _ in range(_BURST):
                self._prefill()
            while self.tally.requests < _BURST:
                self._step()
        self.tally = tally
        late = [seconds for seconds in tally.recoveries_s if seconds > RECOVERED_S]
        assert not late, f"loaded only {late} s after P's return"

    def _nothing_left(self, held: dict[str, Holdings | None]) -> None:
        """D holds no more than before P was killed, and P no more than after its last return."""

        def left() -> list[str]:
            now = {"P": self._p.call("holdings"), "D": self._d.call("holdings")}
            return [
                f"{who}: {line}"
                for who, before in held.items()
                if before is not None
                for line in now[who].more_than(before)
                if not LATE.search(line)
            ]

        def over() -> bool:
            self._step()
            self._step_p()
            pause(0.1)
            return not left()

        eventually(over, 3 * LEASE_S, lambda: f"left behind: {left()}")


def run_all(storms: Sequence[Storm], say: Callable[[str], None], within_s: float) -> None:
    """Let all storms pass at once, each in a thread of its own; raise what went wrong in the first that fails."""
    failures: list[AssertionError] = []
    lock = threading.Lock()

    def tell(line: str) -> None:
        with lock:
            say(line)

    def run(storm: Storm) -> None:
        try:
            storm.run(tell)
        except Exception as error:  # noqa: BLE001 - raised by the test's own thread
            failures.append(AssertionError(f"{storm.name}: {error} ({storm.tally.line()})"))
            failures[-1].__cause__ = error

    threads = [threading.Thread(target=run, args=(storm,), name=storm.name, daemon=True) for storm in storms]
    for thread in threads:
        thread.start()
    until = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if failures:
        raise failures[0]
    hanging = [thread.name for thread in threads if thread.is_alive()]
    assert not hanging, f"not over within {within_s:g} s: {hanging}"
