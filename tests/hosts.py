"""Hosts on one machine: namespaces with networks, names and boots of their own, joined by wires."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
#: One address for one host, as clouds do it.
_NAT = """
add table ip nat
add chain ip nat in {{ type nat hook prerouting priority dstnat; }}
add chain ip nat out {{ type nat hook postrouting priority srcnat; }}
add rule ip nat in ip daddr {outside} dnat to {inside}
add rule ip nat out ip saddr {inside} snat to {outside}
"""


@dataclass(frozen=True)
class Host:
    """One of them: what is started by its `command` finds itself there."""

    name: str
    address: str
    pid: int
    #: The address that others reach it at.
    outside: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command that starts ``arguments`` on this host, in the working directory of who asks."""
        entered = ["nsenter", "--preserve-credentials", "--wd=.", "-U", "-n", "-u", "-m", "-t", str(self.pid)]
        return [*entered, *arguments]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Start them; they reach each other by their addresses and nobody else."""
    with ExitStack() as stack:
        start = _starter(stack, folder)
        first, second = start("first", "10.213.0.1"), start("second", "10.213.0.2")
        _join(first, first.address, second, second.address)
        yield first, second


@contextmanager
def two_hosts_behind_nat(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Start them, each in a network of its own behind a router that has one address outside.

    What comes to a router is sent on to its host; what a host sends seems to come from its router.
    They reach each other by their routers' addresses (`Host.outside`), and by no other.
    """
    if shutil.which("nft") is None:
        pytest.skip("nft is not installed here")
    with ExitStack() as stack:
        start = _starter(stack, folder)
        hosts, routers = [], []
        for number in (1, 2):
            inside, within, outside = f"192.168.{number}.2", f"192.168.{number}.1", f"10.213.0.{number}"
            router, host = start(f"router{number}", outside), start(f"host{number}", inside, outside)
            _join(host, inside, router, within)
            _run(host, "ip", "route", "add", "default", "via", within)
            _run(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            _run(router, "nft", _NAT.format(inside=inside, outside=outside))
            hosts.append(host)
            routers.append(router)
        _join(routers[0], routers[0].address, routers[1], routers[1].address)
        yield hosts[0], hosts[1]


def _starter(stack: ExitStack, folder: Path) -> Callable[..., Host]:
    """Return what starts one host after the other, all of one user's."""
    started: list[Host] = []

    def start(name: str, address: str, outside: str = "") -> Host:
        inside = ["nsenter", "--preserve-credentials", "-U", "-t", str(started[0].pid), "unshare"] if started else []
        unshared = inside or ["unshare", "--user", "--map-root-user"]
        try:
            pid = _start(stack, folder, name, unshared)
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no namespaces can be made here: {error}")
        started.append(Host(name, address, pid, outside or address))
        _run(started[-1], "ip", "link", "set", "lo", "up")
        return started[-1]

    return start


def _join(one: Host, address: str, other: Host, others: str) -> None:
    """Lay a wire between two hosts."""
    wire = f"kv{one.pid % 10000}-{other.pid % 10000}"  # names have 15 characters at most
    _run(one, "ip", "link", "add", wire, "type", "veth", "peer", "name", f"{wire}p")
    _run(one, "ip", "link", "set", f"{wire}p", "netns", str(other.pid))
    for host, own, end in ((one, address, wire), (other, others, f"{wire}p")):
        _run(host, "ip", "addr", "add", f"{own}/24", "dev", end)
        _run(host, "ip", "link", "set", end, "up")


def _start(stack: ExitStack, folder: Path, name: str, unshared: list[str]) -> int:
    """Keep a host's namespaces alive with a process that does nothing; return its pid."""
    boot = folder / f"{name}.boot_id"
    boot.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
    script = f"mount --bind {boot} {_BOOT_ID} && hostname {name} && echo ready && exec sleep infinity"
    command = [*unshared, "--net", "--mount", "--uts", "sh", "-c", script]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(process.stderr.read().strip())
    return process.pid


def _run(host: Host, *arguments: str) -> None:
    subprocess.run(host.command(*arguments), check=True, timeout=20)
