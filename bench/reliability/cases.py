"""The faults, one function each: a generator of rows, since some share a restart."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator

import httpx

from bench.reliability.session import Session, Struck
from kvconnect.bench.tables import Row
from tests.vllm import wired
from tests.vllm.clients import leave

Case = Callable[[Session], Iterator[Row]]
#: A byte in the middle of those that are left then.
_DAMAGED = 500_000


def network_reset(s: Session) -> Iterator[Row]:
    """Every connection is reset, and can be made again at once."""
    yield s.recovered(s.strike("network: connections reset", s.w.cut))


def network_silent(s: Session) -> Iterator[Row]:
    """Nothing comes through and nothing is closed, until every request is answered."""
    struck = s.strike("network: silent (packets dropped, half-open)", s.w.stall, over="the network is back")
    s.w.heal()
    struck.over_at = time.monotonic()
    yield s.recovered(struck)


def network_stall(s: Session) -> Iterator[Row]:
    """Nothing comes through for two seconds."""

    def stall() -> None:
        s.w.stall()
        _wait(2.0)
        s.w.heal()

    yield s.recovered(s.strike("network: stalls for 2 s", stall))


def corrupt(s: Session) -> Iterator[Row]:
    """One byte of those under way becomes another."""

    def damage() -> None:
        s.w.data.let_go()
        s.w.data.after(_DAMAGED, "corrupt")
        s.w.data.struck.wait(10)

    yield s.recovered(s.strike("one byte corrupted on the wire", damage))


def producer_killed(s: Session) -> Iterator[Row]:
    """P dies in the middle; then it is started again at the same address, and old tickets are sent."""
    old = s.tickets()
    killed = s.strike("P killed", functools.partial(wired.kill, s.w.p), over="P serves again")
    s.w.heal()
    s.w.restart(s.w.p)
    killed.over_at = time.monotonic()
    restarted = s.ask("P restarted at the same address, tickets of before", old)
    restarted.over_at, restarted.over = killed.over_at, killed.over
    # What the kill left, if anything, is in both.
    row = s.recovered(restarted)
    yield s.row(killed) | {key: row[key] for key in ("recovered_s", "free_after_s", "leaked_blocks")}
    yield row


def producer_stopped(s: Session) -> Iterator[Row]:
    """P hangs until every request is answered."""
    struck = s.strike("P stopped", functools.partial(_signal, s, "p", signal.SIGSTOP), over="P goes on")
    _signal(s, "p", signal.SIGCONT)
    struck.over_at = time.monotonic()
    yield s.recovered(struck)


def consumer_killed(s: Session) -> Iterator[Row]:
    """D dies in the middle, and is started again once P has its blocks back."""
    struck = s.strike("D killed", functools.partial(wired.kill, s.w.d), over="D serves again")
    free_after_s = s.producer_free_after(struck)
    s.w.heal()
    s.w.restart(s.w.d)
    struck.over_at = time.monotonic()
    yield s.recovered(struck) | {"free_after_s": round(free_after_s, 1)}


def consumer_stopped(s: Session) -> Iterator[Row]:
    """D hangs in the middle for longer than its lease, and P gives its blocks to others."""
    seconds = s.fleet.plan.lease_s + 5.0

    def hang() -> None:
        _signal(s, "d", signal.SIGSTOP)
        _wait(seconds)
        s.tickets()
        _signal(s, "d", signal.SIGCONT)

    yield s.recovered(s.strike(f"D stopped for {seconds:g} s, past its lease", hang))


def disconnect(s: Session) -> Iterator[Row]:
    """A client closes its connection in the middle of its load, while others go on."""
    gone = s.tickets(1)[0]
    leaves = functools.partial(leave, s.w.d, gone.prompt, 0.5, kv_transfer_params=gone.params)
    yield s.recovered(s.strike("a client disconnects while all load", leaves))


def abort(s: Session) -> Iterator[Row]:
    """Every request is aborted through vLLM's own API in the middle of its load."""

    def strike() -> None:
        s.fleet.http.post(s.w.d.url + "/abort_requests", json={}).raise_for_status()

    yield s.recovered(s.strike("abort by vLLM's API in the middle of the loads", strike))


def rejection(s: Session) -> Iterator[Row]:
    """D's API refuses what P has prefilled."""
    struck = Struck("D's API rejects the request")
    for ticket in s.tickets():
        began = time.monotonic()
        try:
            s.fleet.ask(s.w.d, ticket.prompt, kv_transfer_params=ticket.params, max_tokens=100_000)
        except httpx.HTTPError as error:
            struck.answers.append(error)
        struck.waits_s.append(time.monotonic() - began)
    struck.over_at = time.monotonic()
    yield s.recovered(struck)


def _signal(s: Session, which: str, number: signal.Signals) -> None:
    wired.signalled([s.w.p if which == "p" else s.w.d], number)


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)


#: In the order in which they run: what needs no restart first.
CASES: tuple[Case, ...] = (
    disconnect,
    abort,
    rejection,
    network_reset,
    network_stall,
    corrupt,
    network_silent,
    producer_stopped,
    consumer_stopped,
    producer_killed,
    consumer_killed,
)
