"""Two engines, the wires between them and their clocks: one world for one schedule of faults.

Nothing sleeps here until the engines are surely done: as long as anything passes a wire or an
engine's report changes, the clocks stand still, and as soon as nothing does, they run fast.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvconnect import _plugin
from kvconnect.demo import model
from kvconnect.testing.engine import BLOCKS, SHAPES, Engine
from kvconnect.testing.leaks import Holdings
from tests.faults.clocks import Clocks
from tests.faults.copies import CopyGate
from tests.faults.engine import EngineDiedError, EngineProcess, Report
from tests.faults.wires import ControlWire, DataWire

LEASE_S, CONNECT_S, LOOKUP_S, TRANSFER_S, RELEASE_S = 10.0, 5.0, 2.0, 20.0, 5.0
#: Nothing may keep a request longer than all its deadlines one after another, and what they leave to others.
ENOUGH_S = 2 * (CONNECT_S + LOOKUP_S + TRANSFER_S + RELEASE_S) + 10.0
TOKENS = 100
#: How long nothing may stir, in real time, before the clocks are moved at all, and from then on.
_GRACE_S, _QUIET_S = 0.03, 0.01
_LIMIT_S = 20.0
#: A connection of the control channel that nobody uses lives for so long at most.
_IDLE_S = 450.0
#: Threads of a pool of fixed size, each made when it is first needed.
_CREW = re.compile(r"thread 'kvconnect-(read-starts|pipe-\w+)-[0-3]'")
#: Where P listens, for control and for data: of those that the kernel gives to no connection of its own.
_PORTS = 20001, 20002
_worlds = itertools.count()
P, D = 0, 1
#: Pipe, and whether the engines are on two hosts, as far as their clocks go.
SITES = {"tcp": ("tcp", False), "shm": ("shm", False), "tcp apart": ("tcp", True)}


class NotReachedError(AssertionError):
    """What a schedule waits for has not come about."""


class World:
    """A producer P and a consumer D, met through wires."""

    def __init__(
        self, site: str = "tcp", policy: str = "recompute", clocks: Clocks | None = None, lease_s: float = LEASE_S
    ) -> None:
        self.site, self.policy = site, policy
        self.pipe, self.apart = SITES[site]
        self.clocks, self._lease_s = clocks or Clocks(1 + self.apart), lease_s
        self.copies = CopyGate()
        self._model = str(model.ensure())
        number = next(_worlds)
        self._group = f"faults-{os.getpid()}-{number}"
        # Addresses of its own, so that no other world is in the way of its ports.
        net = f"127.{64 + os.getpid() // 250 % 128}.{os.getpid() % 250}."
        first = 3 * (number % 80) + 1
        self._here, *self._told = (f"{net}{first + i}" for i in range(3))
        self._numbers = itertools.count(1)
        self.last: dict[int, Report] = {}
        #: Requests that D was given, the latest last.
        self.added: list[str] = []
        self.engines: list[EngineProcess] = []
        #: Whether both are the engines that it began with.
        self.intact = True
        #: Real time for what needs no other.
        self.patience_s = _LIMIT_S / 2
        self.complaint: list[str] = []
        #: What each engine held when nothing had struck yet.
        self._held: dict[int, Holdings] = {}
        self.wires: dict[str, ControlWire | DataWire] = {}
        try:
            self.engines += [self._engine(P), self._engine(D)]
            for engine in self.engines:
                engine.begun()
            self.wires["ask"] = ControlWire(self._told[P], self._here, _PORTS[0])
            if self.pipe == "tcp":
                self.wires["data"] = DataWire(self._told[P], self._here, _PORTS[1])
            self._wire_movers(P, D)
        except BaseException:
            self.close()
            raise

    # -- the parts ----------------------------------------------------------------------

    @property
    def p(self) -> EngineProcess:
        return self.engines[P]

    @property
    def d(self) -> EngineProcess:
        return self.engines[D]

    @property
    def ask(self) -> ControlWire:
        """From D's scheduler and worker to P's scheduler."""
        return self._control("ask")

    @property
    def to_p(self) -> ControlWire:
        """From D's worker to P's."""
        return self._control("to_p")

    @property
    def to_d(self) -> ControlWire:
        """From P's worker to D's."""
        return self._control("to_d")

    @property
    def data(self) -> DataWire:
        wire = self.wires["data"]
        assert isinstance(wire, DataWire)
        return wire

    def _control(self, name: str) -> ControlWire:
        wire = self.wires[name]
        assert isinstance(wire, ControlWire)
        return wire

    def _engine(self, which: int) -> EngineProcess:
        hosts = {"bind_host": self._here, "advertise_host": self._told[which]}
        extra: dict[str, Any] = {
            **hosts,
            "group": self._group,
            "content_lookup": False,
            "lease_s": self._lease_s,
            "connect_timeout_s": CONNECT_S,
            "lookup_timeout_s": LOOKUP_S,
            "transfer_timeout_s": TRANSFER_S,
            "release_timeout_s": RELEASE_S,
            "pipe": {"name": self.pipe},
        }
        if which == P:
            extra["port"] = _PORTS[0]
        if self.pipe == "tcp":
            extra["pipe"] |= hosts | ({"port": _PORTS[1]} if which == P else {})
        role = ("kv_producer", "kv_consumer")[which]
        transfer = {"kv_connector": "KvConnect", "kv_role": role, "kv_connector_extra_config": extra}
        transfer |= {"engine_id": "PD"[which], "kv_load_failure_policy": self.policy}
        clock = self.clocks.of(which if self.apart else 0)
        return EngineProcess(self._model, transfer, clock, self.copies if which == D else None, wait=False)

    def _wire_movers(self, *which: int) -> None:
        for side in which:
            name = ("to_p", "to_d")[side]
            if name in self.wires:
                self.wires[name].close()
            self.wires[name] = ControlWire(self._told[side], self._here, self.engines[side].call("facts")["mover"])

    def restart(self, which: int) -> None:
        """Start a killed engine again, at the same address."""
        self.intact = False
        self.engines[which].close()
        self.engines[which] = self._engine(which)
        self.engines[which].begun()
        self._held.pop(which, None)
        if which == D:
            self.added.clear()
        self.last.pop(which, None)
        self._wire_movers(which)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for wire in self.wires.values():
            wire.close()

    # -- time ---------------------------------------------------------------------------

    def step(self) -> None:
        """Let every engine that can take a step."""
        for which, engine in enumerate(self.engines):
            if engine.alive and not engine.stopped:
                self.last[which] = report = engine.call("step")
                assert not report.wrong, report.wrong

    def until(
        self,
        true: Callable[[], Any],
        what: str,
        within_s: float = 0.0,
        tick_s: float = 1.0,
    ) -> Any:
        """Step until something is true; where nothing stirs any more, up to ``within_s`` of the clocks' pass."""
        limit = time.monotonic() + (_LIMIT_S if within_s else self.patience_s)
        left, quiet_s, seen, since = within_s, _GRACE_S, None, time.monotonic()
        while not (answer := true()):
            self.step()
            now, signs = time.monotonic(), self._signs()
            if signs != seen:
                seen, since = signs, now
            elif now - since > quiet_s and left > 0 and self._all_asleep():
                left, quiet_s, since = left - tick_s, _QUIET_S, now
                self.clocks.advance(tick_s)
            elif now > limit or (within_s and left <= 0 and now - since > 2 * _GRACE_S):
                raise NotReachedError(f"{what} did not come about; {self.complaint} {self.facts()}")
            pause(0.001 if now - since < 0.004 else 0.003)
        return answer

    def _signs(self) -> object:
        """What changes as long as anything goes on."""
        return dict(self.last), [wire.passed for wire in self.wires.values()]

    def _all_asleep(self) -> bool:
        """Whether no thread has anything to do, or waits for its turn, as on a busy machine all do."""
        alive = [str(engine.pid) for engine in self.engines if engine.alive and not engine.stopped]
        for process in ("self", *alive):
            for task in Path(f"/proc/{process}/task").iterdir():
                with contextlib.suppress(OSError):  # the thread has ended
                    state = (task / "stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
                    if state in "RD" and task.name != str(threading.get_native_id()):
                        return False
        return True

    def wait(self, true: Callable[[], Any], what: str) -> None:
        """Wait for something that needs neither a step nor time."""
        until = time.monotonic() + self.patience_s
        while not true():
            if time.monotonic() > until:
                raise NotReachedError(f"{what} did not come about; {self.facts()}")
            pause(0.002)

    def facts(self) -> str:
        """Describe both engines, for a failure."""
        told = []
        for name, engine in zip("PD", self.engines, strict=False):
            with contextlib.suppress(EngineDiedError):
                told.append(
                    f"{name}: {engine.call('facts')}" if engine.alive and not engine.stopped else f"{name}: gone"
                )
        return "\n".join(told)

    # -- a hand-over --------------------------------------------------------------------

    def prompt(self) -> list[int]:
        number = next(self._numbers)
        return list(range(number, number + TOKENS))

    def add(self, name: str, prompt: list[int], params: Any) -> None:
        self.d.call("add", name, prompt, params)
        self.added.append(name)

    def offer(self, prompt: list[int]) -> Any:
        return self.p.call("offer", f"p{prompt[0]}", prompt)

    def outcome(self, name: str) -> str | None:
        report = self.last.get(D)
        return report.outcomes.get(name) if report else None

    def hand_over(self) -> str:
        """Hand one prompt over, and return how D's request did."""
        prompt = self.prompt()
        name = f"d{prompt[0]}"
        self.add(name, prompt, self.offer(prompt))
        return str(self.until(lambda: self.outcome(name), f"the end of {name}", ENOUGH_S))

    # -- afterwards ---------------------------------------------------------------------

    def heal(self) -> None:
        """End every fault that lasts: who is dead starts again, who is stopped goes on."""
        for wire in self.wires.values():
            wire.heal()
        self.copies.heal()
        for which, engine in enumerate(self.engines):
            engine.go_on()
            if not engine.alive:
                self.restart(which)

    def assert_at_rest(self) -> None:
        """Within one lease every block is free, and nobody has anything left to do."""
        free = BLOCKS - 1

        def rested() -> bool:
            return all(
                which in self.last and self.last[which].free == free and not self.last[which].loading
                for which in (P, D)
            )

        self.step()
        self.until(rested, "every block free within a lease", LEASE_S + 1.0, tick_s=0.5)

    def note_holdings(self) -> None:
        """Remember what the engines hold once everything that is made late has been made.

        That is a pipe, the threads that end one, and, after a lease, P's connection to D.
        """
        self.assert_serves()
        for wire in self.wires.values():
            wire.cut()
        self.assert_serves()
        asked = {name: len(self._control(name).seen) for name in ("to_p", "to_d")}

        def looked() -> bool:  # from each side after the other
            return all(("pipe.ping", True) in self._control(name).seen[count:] for name, count in asked.items())

        self.until(looked, "that they look after their pipe", 2 * LEASE_S)
        self._held = {which: engine.call("holdings") for which, engine in enumerate(self.engines)}

    def assert_nothing_left(self) -> None:
        """Engines that lived through it all hold no thread, descriptor, socket or shared memory more than before."""

        def left() -> list[str]:
            pipes = self.p.call("facts")["pipes"]
            return ([f"P: {pipes} pipes"] if pipes > 1 else []) + [
                f"{'PD'[which]}: {line}"
                for which, before in self._held.items()
                for line in self.engines[which].call("holdings").more_than(before)
                if not _CREW.search(line)
            ]

        # Peers that vanished are noticed by a question once a lease; idle connections end later.
        what, within_s = "the end of all that was not held before", 4 * LEASE_S + _IDLE_S
        self.until(lambda: not (found := left()) or self._complain(found), what, within_s, tick_s=15.0)

    def _complain(self, found: list[str]) -> None:
        self.complaint = found

    def assert_serves(self) -> None:
        """A new request is loaded, once peers that failed are asked again."""
        for _ in range(4):
            if self.hand_over() == "loaded":
                return
            self.clocks.advance(4.0)
        raise AssertionError(f"new requests are not loaded; {self.facts()}")


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def warm_up() -> None:
    """Build an engine of each role here, and end it."""
    _plugin.register()
    for role in ("kv_producer", "kv_consumer"):
        extra = {"group": f"warm-{os.getpid()}"}
        transfer = {"kv_connector": "KvConnect", "kv_role": role, "kv_connector_extra_config": extra}
        engine = Engine(str(model.ensure()), transfer, SHAPES["blocks first"], seed=0)
        engine.ask("warm", range(100))
        engine.close()
    # What a collection in a forked engine would look at would be copied for it.
    gc.collect()
    gc.freeze()
