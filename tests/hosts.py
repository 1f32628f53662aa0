"""Two hosts on one machine: namespaces with networks, names and boots of their own, joined by a wire."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_WIRE = "kvwire"


@dataclass(frozen=True)
class Host:
    """One of them: what is started by its `command` finds itself there."""

    name: str
    address: str
    pid: int

    def command(self, *arguments: str) -> list[str]:
        """Return the command that starts ``arguments`` on this host, in the working directory of who asks."""
        entered = ["nsenter", "--preserve-credentials", "--wd=.", "-U", "-n", "-u", "-m", "-t", str(self.pid)]
        return [*entered, *arguments]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Start them; they reach each other by their addresses and nobody else."""
    with ExitStack() as stack:
        try:
            first = _start(stack, folder, Host("first", "10.213.0.1", 0), ["unshare", "--user", "--map-root-user"])
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no namespaces can be made here: {error}")
        inside = ["nsenter", "--preserve-credentials", "-U", "-t", str(first.pid), "unshare"]
        second = _start(stack, folder, Host("second", "10.213.0.2", 0), inside)
        _run(first, "ip", "link", "add", f"{_WIRE}1", "type", "veth", "peer", "name", f"{_WIRE}2")
        _run(first, "ip", "link", "set", f"{_WIRE}2", "netns", str(second.pid))
        for host, wire in ((first, f"{_WIRE}1"), (second, f"{_WIRE}2")):
            _run(host, "ip", "addr", "add", f"{host.address}/24", "dev", wire)
            _run(host, "ip", "link", "set", wire, "up")
            _run(host, "ip", "link", "set", "lo", "up")
        yield first, second


def _start(stack: ExitStack, folder: Path, host: Host, unshared: list[str]) -> Host:
    """Keep its namespaces alive with a process that does nothing."""
    boot = folder / f"{host.name}.boot_id"
    boot.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
    script = f"mount --bind {boot} {_BOOT_ID} && hostname {host.name} && echo ready && exec sleep infinity"
    command = [*unshared, "--net", "--mount", "--uts", "sh", "-c", script]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(process.stderr.read().strip())
    return Host(host.name, host.address, process.pid)


def _run(host: Host, *arguments: str) -> None:
    subprocess.run(host.command(*arguments), check=True, timeout=20)
