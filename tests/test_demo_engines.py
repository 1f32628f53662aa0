"""Servers as child processes: started, awaited, and gone afterwards, whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvconnect.demo import engines
from kvconnect.demo.engines import Server, ServerError

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
#: Starts a grandchild that outlives everything but a SIGKILL, says its pid, and is as deaf itself.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print("grandchild", child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a module from source that a child can run by name."""

    def make(source: str) -> str:
        (tmp_path / "served_here.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "served_here"

    return make


def server(tmp_path: Path, name: str, health: str = "/health") -> Server:
    port = engines.free_port()
    return Server("S", (name, str(port)), port, tmp_path / "S.log", health=health)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(text: str, log: Path) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if text in line:
                return line
        time.sleep(0.05)  # a file has no event to wait for
    raise AssertionError(f"no {text!r} in {log.read_text()!r}")


def test_a_server_is_awaited_and_stopped(tmp_path: Path, module) -> None:
    said: list[str] = []
    one = server(tmp_path, module(HEALTHY))
    engines.start([one], said.append)
    try:
        engines.wait_ready([one], 20, said.append)
        assert one.is_healthy()
        assert one.ready_after_s > 0
        assert any("S is ready" in line for line in said)
    finally:
        engines.stop([one], grace_s=5)
    assert not one.is_healthy()


def test_a_server_that_ends_while_starting_shows_its_log(tmp_path: Path, module) -> None:
    one = server(tmp_path, module("raise SystemExit('no such model')"))
    engines.start([one], lambda _: None)
    began = time.monotonic()
    try:
        with pytest.raises(ServerError, match=r"(?s)S ended while starting.*no such model"):
            engines.wait_ready([one], 30, lambda _: None)
    finally:
        engines.stop([one], grace_s=1)
    assert time.monotonic() - began < 15, "an end is noticed, not waited out"


def test_the_first_error_of_a_log_is_named_as_the_cause(tmp_path: Path) -> None:
    one = server(tmp_path, "anything")
    lines = ["(Worker pid=7) ValueError: block size 7", *(f"frame {i}" for i in range(100)), "RuntimeError: see above"]
    one.log.write_text("\n".join(lines))
    text = str(one.failure("ended"))
    assert text.index("  ValueError: block size 7") < text.index("  RuntimeError: see above")


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path, module) -> None:
    one = server(tmp_path, module("print('importing', flush=True); import time; time.sleep(60)"))
    engines.start([one], lambda _: None)
    try:
        with pytest.raises(ServerError, match=r"was not ready after"):
            engines.wait_ready([one], 1, lambda _: None)
    finally:
        engines.stop([one], grace_s=1)


def test_stopping_reaches_grandchildren_that_ignore_sigterm(tmp_path: Path, module) -> None:
    one = server(tmp_path, module(STUBBORN))
    engines.start([one], lambda _: None)
    grandchild = int(wait_for("grandchild", one.log).split()[1])
    assert is_alive(grandchild)
    engines.stop([one], grace_s=0.5)
    deadline = time.monotonic() + 5
    while is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)  # it is no child of ours to wait for
    assert not is_alive(grandchild)


def test_a_child_ends_with_a_killed_parent(tmp_path: Path, module) -> None:
    name = module(
        "print('up', flush=True); import os; print('pid', os.getpid(), flush=True); import time; time.sleep(60)"
    )
    log = tmp_path / "S.log"
    program = f"""if True:
        import pathlib, time
        from kvconnect.demo.engines import Server
        Server("S", ({name!r},), 1, pathlib.Path({str(log)!r})).start()
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 20
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(wait_for("pid", log).split()[1])
        os.kill(parent.pid, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait(10)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_stopping_twice_and_stopping_what_never_started_do_nothing(tmp_path: Path, module) -> None:
    one = server(tmp_path, module(HEALTHY))
    engines.stop([one])
    engines.start([one], lambda _: None)
    engines.stop([one], grace_s=2)
    engines.stop([one])


def test_no_port_is_handed_out_twice_nor_one_that_the_kernel_gives_away() -> None:
    ports = [engines.free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert max(ports) < int(lowest)


def test_a_port_in_use_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(engines, "_LOWEST_PORT", port)
        monkeypatch.setattr(engines, "_first_ephemeral_port", lambda: port + 1)
        with pytest.raises(ServerError, match="no TCP port"):
            engines.free_port()
