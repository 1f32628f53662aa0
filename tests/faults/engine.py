"""One engine in a process of its own, so that it can be killed and stopped as engines are.

Forked, since importing vLLM takes longer than everything else together. The child holds
vLLM's own scheduler and both halves of the connector (`kvconnect.testing.checked_engine`) and
obeys its parent's commands one by one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from kvconnect import _plugin
from kvconnect.clock import Clock
from kvconnect.connectors import setup
from kvconnect.testing.checked_engine import CheckedEngine
from kvconnect.testing.leaks import Holdings
from tests.faults.copies import CopyGate

#: No command takes longer, or the engine hangs.
LIMIT_S = 15.0
_FORK = multiprocessing.get_context("fork")


class EngineDiedError(Exception):
    """The process is gone, or does not answer."""


@dataclass
class Report:
    """What an engine has to say after a step."""

    #: How each request that ended did: "loaded", "computed", "error" or "aborted".
    outcomes: dict[str, str]
    free: int
    wrong: list[str]
    loading: set[str] = field(default_factory=set)
    busy: bool = False


class Subject(CheckedEngine):
    """An engine that tells about itself."""

    planned: Any = None

    def started(self, planned: Any) -> set[str]:
        return {load.request_id for load in planned.kv_connector_metadata.loads}

    def report(self) -> Report:
        ended = {name: self.outcomes.get(name, "never ran") for name in self.ended}
        ended |= {name: how for name, how in self.outcomes.items() if how == "aborted"}
        return Report(ended, self.free_blocks(), self.wrong, set(self.loading), self.scheduler.has_requests())


class _Commands:
    """What a parent can ask of its engine."""

    def __init__(self, subject: Subject, log: _Log) -> None:
        self._subject, self._log = subject, log
        self._s: Any = subject.scheduler.connector._scheduler
        self._w: Any = subject.worker._worker

    def offer(self, name: str, prompt: list[int]) -> Any:
        """Prefill, and return the parameters that name the KV."""
        answer, _ = self._subject.ask(name, prompt, {"do_remote_decode": True}, max_tokens=1)
        return answer.kv_transfer_params

    def add(self, name: str, prompt: list[int], params: Any) -> None:
        self._subject.add(name, prompt, params)

    def abort(self, name: str) -> None:
        self._subject.abort(name)

    def plan(self) -> bool:
        """Plan a step; ``True`` if it starts a load."""
        self._subject.planned = self._subject.scheduler.schedule()
        return bool(self._subject.planned.kv_connector_metadata.loads)

    def step(self) -> Report:
        """Carry out what is planned, or take a step if there is anything to do."""
        planned, self._subject.planned = self._subject.planned, None
        if planned is not None:
            self._subject.carry_out(planned)
        elif self._subject.scheduler.has_requests():
            self._subject.step()
        return self._subject.report()

    def report(self) -> Report:
        return self._subject.report()

    def facts(self) -> dict[str, Any]:
        """Where loads are, and counters."""
        mover = self._w._end
        lender, fetching = self._s._end._lender, self._s._fetching
        with mover._lock:
            moved = sum("moved" in read.transfer.phases for read in mover._reads)
            reads = len(mover._reads)
        return {
            "reads": reads,
            "moved": moved,
            "over": len(self._w._over),
            "pipes": mover._pipes.count,
            "server": lender._server.port if lender else 0,
            "mover": mover._server.port,
            "stats": self._s._end.stats() | {f"mover_{k}": v for k, v in mover.stats().items()},
            "counters": dict(fetching.counters) if fetching else {},
            "log": list(self._log.lines),
        }

    def holdings(self) -> Holdings:
        return Holdings.now()

    def reset(self) -> None:
        self._subject.scheduler.reset_prefix_cache(reset_connector=True)
        self._subject.spoil()

    def close(self) -> None:
        self._subject.close()


class _Log(logging.Handler):
    """Keeps what the library logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")
        if record.exc_info:
            self.lines.append(logging.Formatter().formatException(record.exc_info))


class EngineProcess:
    """The parent's handle."""

    def __init__(
        self,
        model: str,
        transfer: Mapping[str, Any],
        clock: Clock,
        copies: CopyGate | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """``copies`` is where its copies from peers' memory can be held; without ``wait``, call `begun` later."""
        self._connection, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_main, args=(theirs, model, dict(transfer), clock, copies), daemon=True)
        self._process.start()
        theirs.close()
        self.stopped = False
        if wait:
            self.begun()

    def begun(self) -> None:
        """Wait until it has started."""
        self._answer()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def call(self, command: str, *arguments: Any) -> Any:
        """Have the engine obey; raises what it raised, or `EngineDiedError`."""
        try:
            self._connection.send((command, arguments))
        except OSError as error:
            raise EngineDiedError(command) from error
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(LIMIT_S)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.stopped = True

    def go_on(self) -> None:
        if self.stopped:
            os.kill(self.pid, signal.SIGCONT)
            self.stopped = False

    def close(self) -> None:
        self.kill()
        self._connection.close()

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(LIMIT_S):
                raise EngineDiedError(f"an engine does not answer within {LIMIT_S:g} s")
            outcome = self._connection.recv()
        except (OSError, EOFError) as error:
            raise EngineDiedError("an engine died") from error
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _main(
    connection: Connection, model: str, transfer: dict[str, Any], clock: Clock, copies: CopyGate | None = None
) -> None:
    _forget_sockets(connection.fileno())
    torch.set_num_threads(1)
    log = _Log()
    logging.getLogger("kvconnect").addHandler(log)
    logging.getLogger("kvconnect").propagate = False
    _plugin.register()
    if copies is not None:
        copies.put_in_the_way()
    real = setup.engine

    def clocked(*args: Any) -> setup.Engine:
        engine = real(*args)
        return replace(engine, settings=replace(engine.settings, clock=clock))

    setup.engine = clocked  # type: ignore[assignment]
    try:
        commands = _Commands(Subject(model, transfer), log)
        connection.send(None)
        while True:
            command, arguments = connection.recv()
            try:
                connection.send(getattr(commands, command)(*arguments))
            except Exception as error:  # noqa: BLE001 - the parent is to hear of it
                connection.send(AssertionError(f"{command}: {type(error).__name__}: {error}"))
    except (EOFError, OSError):
        os._exit(0)


def _forget_sockets(but: int) -> None:
    """Let go of the parent's connections, which would outlive a cut; Python's objects keep their numbers."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in [int(entry.name) for entry in os.scandir("/proc/self/fd")]:
        try:
            if fd not in {but, nothing} and stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.dup2(nothing, fd)
        except OSError:
            continue  # the scan's own
