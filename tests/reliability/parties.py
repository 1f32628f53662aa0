"""The engines of a storm: a producer that is killed and comes back at its address, and a consumer that lives on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from kvconnect.clock import SYSTEM
from kvconnect.demo import model
from kvconnect.demo.engines import free_port
from tests.faults.engine import EngineDiedError, EngineProcess

LEASE_S, CONNECT_S, LOOKUP_S, TRANSFER_S, RELEASE_S = 4.0, 2.0, 1.0, 8.0, 3.0


def start(name: str, group: str, pipe: str, policy: str, port: int = 0) -> EngineProcess:
    """Start an engine: a producer if its name begins with ``P``, else a consumer."""
    extra: dict[str, Any] = {
        "group": group,
        "content_lookup": False,
        "lease_s": LEASE_S,
        "connect_timeout_s": CONNECT_S,
        "lookup_timeout_s": LOOKUP_S,
        "transfer_timeout_s": TRANSFER_S,
        "release_timeout_s": RELEASE_S,
        "pipe": pipe,
        "port": port,
    }
    role = "kv_producer" if name.startswith("P") else "kv_consumer"
    transfer = {"kv_connector": "KvConnect", "kv_role": role, "kv_connector_extra_config": extra}
    transfer |= {"engine_id": name, "kv_load_failure_policy": policy}
    return EngineProcess(str(model.ensure()), transfer, SYSTEM)


class Mortal:
    """A producer. Thread-safe: who calls it while it is dead hears so at once."""

    def __init__(self, group: str, pipe: str, policy: str) -> None:
        # Of those that the kernel gives to no connection: while P is dead, another could even be the near end of D's
        # attempt to reach P.
        port = free_port()
        self._start: Callable[[], EngineProcess] = lambda: start("P", group, pipe, policy, port)
        self._lock = threading.Lock()
        self._engine: EngineProcess | None = self._start()
        self._restarting: threading.Thread | None = None
        self._failure: BaseException | None = None
        #: How often it was killed, and since when it has been there; ``inf`` while it is not.
        self.kills, self.since = 0, time.monotonic()

    def call(self, command: str, *arguments: Any) -> Any:
        """Have it obey; raises `EngineDiedError` if it is dead, or dies of it."""
        if self._failure is not None:
            raise self._failure
        with self._lock:
            if self._engine is None:
                raise EngineDiedError(command)
            return self._engine.call(command, *arguments)

    def kill(self) -> None:
        """Kill it as it is, in the middle of a call if need be, and have another start meanwhile."""
        engine, self._engine, self.since = self._engine, None, float("inf")
        if engine is None:
            raise AssertionError("P has not come back before it was to be killed again")
        self.kills += 1
        engine.kill()
        self._restarting = threading.Thread(target=self._restart, args=(engine,), name="test-restart", daemon=True)
        self._restarting.start()

    def _restart(self, dead: EngineProcess) -> None:
        with self._lock:
            dead.close()  # not before whoever waits for its answer has heard of its death
        try:
            engine = self._start()
        except BaseException as error:  # noqa: BLE001 - handed to whoever calls next
            self._failure = error
        else:
            self.since, self._engine = time.monotonic(), engine

    def close(self) -> None:
        if self._restarting is not None:
            self._restarting.join(30.0)
        if self._engine is not None:
            self._engine.close()


def eventually(true: Callable[[], bool], within_s: float, what: Callable[[], str]) -> None:
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until, what()


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)
