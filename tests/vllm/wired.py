"""One producer and one consumer that meet through wires, so that a test can strike at what lies between them.

Everything that peers are told is a loopback address of its own, where a forwarder listens
(`tests.faults.wires`); the engines themselves listen at 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from kvconnect.demo import engines
from kvconnect.demo.engines import Server
from tests.faults.wires import ControlWire, DataWire, Wire
from tests.vllm.fleet import Fleet, Plan

_HERE, _P_TOLD, _D_TOLD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
#: For starting one engine again on two cores that others use, too.
RESTART_S = 240.0


@dataclass(frozen=True)
class Ports:
    """Where P listens; everything else finds a port for itself."""

    control: int = field(default_factory=engines.free_port)
    data: int = field(default_factory=engines.free_port)


def plan(ports: Ports, pipe: str = "tcp", **changes: Any) -> Plan:
    """Return a plan of one producer and one consumer that tell each other the wires' addresses."""
    producer: dict[str, Any] = {"advertise_host": _P_TOLD, "port": ports.control, "pipe": pipe}
    consumer: dict[str, Any] = {"advertise_host": _D_TOLD, "pipe": pipe}
    if pipe == "tcp":
        producer["pipe"] = {"name": pipe, "advertise_host": _P_TOLD, "port": ports.data}
        consumer["pipe"] = {"name": pipe, "advertise_host": _D_TOLD}
    # Only tickets: a look-up by content would ask P even where a test has none.
    shared = {"content_lookup": False}
    found = Plan("KvConnect", producers=1, consumers=1, tiny=False, extra_config=shared)
    return replace(found, extra_of={"P0": producer, "D0": consumer}, **changes)


class Wired:
    """A running fleet of `plan`, and the wires between its engines."""

    def __init__(self, fleet: Fleet, ports: Ports) -> None:
        self.fleet, self._ports = fleet, ports
        #: P's control server, P's bytes, the other servers of P's and D's processes.
        self.ask = ControlWire(_P_TOLD, _HERE, ports.control)
        self.data = DataWire(_P_TOLD, _HERE, ports.data)
        self._movers: dict[str, list[ControlWire]] = {}
        for server in (self.p, self.d):
            self._wire_movers(server)

    @property
    def p(self) -> Server:
        """The producer."""
        return self.fleet.producers[0]

    @property
    def d(self) -> Server:
        """The consumer."""
        return self.fleet.consumers[0]

    @property
    def carries_data(self) -> bool:
        """Whether the pipe's bytes go through a wire, too."""
        return self.fleet.plan.extra_of[self.p.name]["pipe"] != "shm"

    @property
    def wires(self) -> list[Wire]:
        """Every wire."""
        return [self.ask, self.data, *(wire for wires in self._movers.values() for wire in wires)]

    def cut(self) -> None:
        """Reset every connection."""
        for wire in self.wires:
            wire.cut()

    def stall(self) -> None:
        """Let nothing through and close nothing: half open."""
        for wire in self.wires:
            wire.stall()

    def heal(self) -> None:
        """End what is wrong with the wires."""
        for wire in self.wires:
            wire.heal()

    def close(self) -> None:
        """End all wires."""
        for wire in self.wires:
            wire.close()

    def restart(self, server: Server) -> None:
        """Start a dead engine again under the same addresses, and wait until it serves."""
        engines.start([server], lambda _: None)
        engines.wait_ready([server], RESTART_S, lambda _: None)
        self._wire_movers(server)

    def _wire_movers(self, server: Server) -> None:
        for wire in self._movers.pop(server.name, []):
            wire.close()
        told = _P_TOLD if server is self.p else _D_TOLD
        known = {server.port, self._ports.control, self._ports.data}
        self._movers[server.name] = [ControlWire(told, _HERE, port) for port in _listens(server) if port not in known]


@contextlib.contextmanager
def running(folder: Path, start_s: float, **changes: Any) -> Iterator[Wired]:
    """Run a wired fleet for a while."""
    ports = Ports()
    fleet = Fleet(plan(ports, **changes), folder)
    fleet.http.close()
    # A server that was stopped closes connections that look idle to it, with a request just sent or not.
    fleet.http = httpx.Client(timeout=120.0, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
    try:
        fleet.start(start_s)
        wired = Wired(fleet, ports)
        try:
            yield wired
        finally:
            wired.close()
    finally:
        signalled(fleet.engines, signal.SIGCONT)
        fleet.stop()


def kill(server: Server) -> None:
    """SIGKILL all processes of a server, and wait for its end."""
    signalled([server], signal.SIGKILL)
    assert server.process is not None
    server.process.wait(10)


def signalled(servers: list[Server], number: signal.Signals) -> None:
    """Send a signal to all processes of servers."""
    for server in servers:
        if server.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, number)


def _listens(server: Server) -> list[int]:
    """Return the loopback ports that a server's processes listen on."""
    assert server.process is not None
    leader = psutil.Process(server.process.pid)
    sockets: Mapping[int, str] = {
        found.laddr.port: found.laddr.ip
        for process in (leader, *leader.children(recursive=True))
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    }
    return sorted(port for port, host in sockets.items() if host == _HERE)
