"""One engine among many, over real sockets: what each peer costs it, and what happens when it comes back.

The engine in the middle is a process of its own, and so are a few that hold its peers, hundreds each:
the same ends that a connector opens, over ``tcp`` on one host.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.control.engines import Engine, Loaded, Shape, load
from kvconnect import control
from kvconnect.demo.engines import free_port
from kvconnect.loop import Loop

T = TypeVar("T")
_MOST_HOLDERS = 4
_LIMIT_S = 300.0


@dataclass(frozen=True)
class Usage:
    """What a process has used and holds."""

    cpu_s: float
    rss_bytes: int
    descriptors: int
    threads: int
    #: Requests that it has sent, and answered, by operation.
    asked: Counter[str]
    answered: Counter[str]


# -- in a process -------------------------------------------------------------------------


class SharedLoop(Loop):
    """One for all servers and clients of a process with many engines, whose own threads would fight for it."""

    def start(self) -> None:
        """Start the thread, if it has not been started."""
        if self._thread.ident is None:
            super().start()

    def close(self, linger_ms: int = 0) -> None:
        """Go on, for the others."""


_engines: list[Engine] = []
_asked: Counter[str] = Counter()
_answered: Counter[str] = Counter()


def _share() -> None:
    """Have all engines of this process share one loop."""
    shared = SharedLoop("bench-control-crowd")
    vars(control)["Loop"] = lambda *_: shared


def _count() -> None:
    """Count what passes the control channel of this process."""
    handle, call = control.ControlServer.handle, control.ControlClient.call

    def counted_handle(self: control.ControlServer, op: str, handler: control.Handler) -> None:
        def counted(body: dict[str, Any]) -> Any:
            _answered[op] += 1
            return handler(body)

        handle(self, op, counted)

    def counted_call(self: control.ControlClient, endpoint: str, op: str, *rest: Any) -> Any:
        _asked[op] += 1
        return call(self, endpoint, op, *rest)

    control.ControlServer.handle = counted_handle  # type: ignore[method-assign]
    control.ControlClient.call = counted_call  # type: ignore[method-assign,assignment]


def _open(role: str, count: int, shape: Shape, port: int = 0) -> None:
    _engines.extend(Engine(role, shape, port) for _ in range(count))


def _offer(times: int) -> list[Any]:
    """Have every engine offer so often."""
    return [engine.offer() for engine in _engines for _ in range(times)]


def _load(tickets: Sequence[Any]) -> list[Loaded]:
    """Have the engines load the tickets, in turn."""
    return load([(_engines[i % len(_engines)], ticket) for i, ticket in enumerate(tickets)])


def _offer_by(place: int) -> Any:
    """Have one engine offer."""
    return _engines[place].offer()


def _load_by(place: int, ticket: Any) -> Loaded:
    """Have one engine load."""
    [loaded] = load([(_engines[place], ticket)])
    return loaded


def _usage() -> Usage:
    rss = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads, fds = (sum(1 for _ in Path(f"/proc/self/{what}").iterdir()) for what in ("task", "fd"))
    for engine in _engines:
        engine.end.drain_released()
    return Usage(time.process_time(), rss, fds, threads, Counter(_asked), Counter(_answered))


def _close() -> None:
    for engine in _engines:
        engine.close()
    _engines.clear()


# -- outside of it ------------------------------------------------------------------------


class Holder:
    """A process with engines."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare)

    def ask(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have it call a function."""
        return self._pool.submit(call, *arguments)

    def do(self, call: Callable[..., T], *arguments: Any) -> T:
        """Have it call a function, and wait."""
        return self.ask(call, *arguments).result(_LIMIT_S)

    def kill(self) -> None:
        """Kill it as it is."""
        for process in self._pool._processes.values():  # noqa: SLF001 - the pool does not kill
            process.kill()
        self._pool.shutdown(wait=True)

    def close(self) -> None:
        """End its engines and itself."""
        self.do(_close)
        self._pool.shutdown()


class Hub:
    """The engine in the middle, of ``role``, and its peers."""

    def __init__(self, role: str, peers: int, shape: Shape) -> None:
        self.role, self._shape, self._count = role, shape, peers
        other = {"P": "D", "D": "P"}[role]
        self._port = free_port() if role == "P" else 0
        self.middle = Holder(_count)
        self._holders = [Holder(_share) for _ in range(min(_MOST_HOLDERS, 1 + peers // 50))]
        self._open_middle()
        holders = len(self._holders)
        shares = [len(range(i, peers, holders)) for i in range(holders)]
        for future in [h.ask(_open, other, n, shape) for h, n in zip(self._holders, shares, strict=True)]:
            future.result(_LIMIT_S)
        self._shares = shares

    def _open_middle(self) -> None:
        self.middle.do(_open, self.role, 1, self._shape, self._port)

    def round(self) -> tuple[list[Loaded], float]:
        """Have every peer hand one prompt over, all at once; return how it went and how long all of it took."""
        if self.role == "P":
            tickets = self.middle.do(_offer, self._count)
            begun, parts = time.monotonic(), []
            for holder, share in zip(self._holders, self._shares, strict=True):
                mine, tickets = tickets[:share], tickets[share:]
                parts.append(holder.ask(_load, mine))
            done = [one for part in parts for one in part.result(_LIMIT_S)]
        else:
            offers = [holder.ask(_offer, 1) for holder in self._holders]
            tickets = [ticket for offer in offers for ticket in offer.result(_LIMIT_S)]
            begun = time.monotonic()
            done = self.middle.do(_load, tickets)
        return done, time.monotonic() - begun

    def single(self, number: int) -> Loaded:
        """Have one peer hand one prompt over, by itself."""
        holder, place = self._holders[number % len(self._holders)], number // len(self._holders)
        if self.role == "P":
            [ticket] = self.middle.do(_offer, 1)
            return holder.do(_load_by, place, ticket)
        [loaded] = self.middle.do(_load, [holder.do(_offer_by, place)])
        return loaded

    def restart(self) -> None:
        """Kill the one in the middle, and start it again at its address."""
        self.middle.kill()
        self.middle = Holder(_count)
        self._open_middle()

    def usage(self) -> Usage:
        """What the one in the middle uses."""
        return self.middle.do(_usage)

    def close(self) -> None:
        """End all."""
        for holder in [self.middle, *self._holders]:
            holder.close()
