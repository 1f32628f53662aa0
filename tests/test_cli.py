"""``python -m kvconnect``, as users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import types
import urllib.request
from pathlib import Path

import pytest

from kvconnect import cli, listing, registry
from kvconnect.registry import Entry

CONNECTORS = {
    "KvConnect",
    "KvConnectCudaIpc",
    "KvConnectFilesystem",
    "KvConnectNccl",
    "KvConnectNixl",
    "KvConnectRedis",
    "KvConnectShm",
    "KvConnectTcp",
}


def kvconnect(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process."""
    command = [sys.executable, "-m", "kvconnect", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)


def test_list_shows_kind_name_distribution_and_availability():
    done = kvconnect("list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["KIND", "NAME", "AVAILABLE", "FROM", "TARGET"]
    (line,) = [line for line in lines if re.match(r"pipe +inproc ", line)]
    assert re.fullmatch(r"pipe +inproc +yes +kvconnect [\d.]+ +kvconnect\.pipes\.inproc:InprocPipe", line)


def test_list_as_json_has_one_object_per_backend():
    done = kvconnect("list", "--json")
    assert done.returncode == 0
    rows = {(row["kind"], row["name"]): row for row in json.loads(done.stdout)}
    assert {
        ("pipe", "inproc"),
        ("pipe", "tcp"),
        ("pipe", "shm"),
        ("buffer", "filesystem"),
        ("buffer", "memory"),
        ("buffer", "redis"),
        ("buffer", "remote"),
    } <= rows.keys()
    assert {name for kind, name in rows if kind == "connector"} >= CONNECTORS
    for row in rows.values():
        assert row.keys() == {"kind", "name", "distribution", "version", "target", "available", "reason", "cure"}
        assert bool(row["reason"]) is not row["available"]


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kvconnect", "list"]
    try:
        done = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE, text=True, timeout=50)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_list_imports_neither_vllm_nor_a_connector():
    code = (
        "import sys\n"
        "from kvconnect import listing\n"
        "listing.rows()\n"
        "assert 'vllm' not in sys.modules\n"
        "assert 'kvconnect.connectors.named' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


def connector(name: str, value: str) -> Entry:
    return Entry(name, "connector", "pigeons", "1.2", value)


@pytest.fixture
def only(monkeypatch):
    """Return ``only(entry)``, which makes it the only registered connector."""

    def only(entry: Entry) -> listing.Row:
        monkeypatch.setattr(registry, "connectors", lambda: {entry.name: entry})
        (row,) = [row for row in listing.rows() if row.kind == "connector"]
        return row

    return only


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return ``module(source)``, which puts a module ``pigeon_loft`` on the path."""

    def module(source: str) -> None:
        (tmp_path / "pigeon_loft.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return module


def test_a_connector_whose_pipe_is_not_registered_says_which(only, module):
    module("class Pigeon:\n    pipe: str = 'pigeon'\n")
    row = only(connector("Pigeon", "pigeon_loft:Pigeon"))
    assert (row.available, row.reason) == (False, "no pipe 'pigeon' is registered")
    assert row.cure == "install a distribution that has the pipe 'pigeon'"


def test_a_connector_whose_pipe_cannot_run_says_why(only, module, monkeypatch):
    module("class Pigeon:\n    pipe = 'pigeon'\n")
    monkeypatch.setattr(registry, "pipes", dict)
    monkeypatch.setattr(registry, "_entries", lambda _: {"pigeon": Entry("pigeon", "pipe", "pigeons", "1.2", "no:X")})
    row = only(connector("Pigeon", "pigeon_loft:Pigeon"))
    assert (row.available, row.reason) == (False, "its pipe 'pigeon': pigeons 1.2 does not have no:X")
    assert row.cure == "reinstall pigeons"


def test_a_connector_of_a_module_that_is_not_there_says_so(only):
    for value in ("no_such_loft:Pigeon", "no_such_loft.deep:Pigeon"):
        row = only(connector("Pigeon", value))
        assert (row.available, row.cure) == (False, "reinstall pigeons")


def test_a_connector_without_a_pipe_of_its_own_needs_vllm_only(only, module, monkeypatch):
    module("class Pigeon: pass\nclass Other:\n    pipe = 'none'\n")
    find = listing.importlib.util.find_spec
    monkeypatch.setattr(listing.importlib.util, "find_spec", lambda name: find("json" if name == "vllm" else name))
    assert only(connector("Pigeon", "pigeon_loft:Pigeon")).available


def test_without_vllm_connectors_say_so(only, module, monkeypatch):
    module("class Pigeon: pass\n")
    find = listing.importlib.util.find_spec
    monkeypatch.setattr(listing.importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    row = only(connector("Pigeon", "pigeon_loft:Pigeon"))
    assert (row.available, row.reason) == (False, "it needs vLLM")


def test_two_distributions_with_one_name_are_a_one_line_error(tmp_path):
    for name in ("doves", "pigeons"):
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[kvconnect.pipes]\npigeon = {name}:Pipe\n")
    done = subprocess.run(
        [sys.executable, "-m", "kvconnect", "list"],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"kvconnect list: error: pipe 'pigeon' is registered by both \w+ 1\.2 and \w+ 1\.2; uninstall one of them\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: command"),
        (["lst"], "invalid choice: 'lst'"),
        (["list", "--jason"], "unrecognized arguments: --jason"),
        (["proxy", "--port", "99999"], "'99999' is not a TCP port (0 to 65535)"),
        (["proxy", "--port", "http"], "'http' is not a TCP port (0 to 65535)"),
        (["proxy", "--prefill", "ftp://x"], "--prefill must look like 'http://host:port', got 'ftp://x'"),
        (["proxy", "--prefill-timeout", "0"], "prefill_timeout_s must be greater than 0 and finite, got 0.0"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_line(arguments, complaint, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_a_port_in_use_is_a_one_line_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = kvconnect("proxy", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvconnect proxy: error: cannot listen on 127.0.0.1:")
    assert line.endswith("; choose another --port")


def test_the_proxy_serves_until_it_is_told_to_stop():
    command = [sys.executable, "-m", "kvconnect", "proxy", "--port", "0"]
    command += ["--prefill", "127.0.0.1:9", "127.0.0.1:10", "--prefill", "127.0.0.1:11", "--decode", "127.0.0.1:12"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            url = re.search(r"listening on 127\.0\.0\.1:(\d+), prefill (.*), decode (.*)$", line.strip())
            assert url is not None, line
            assert url[2] == "http://127.0.0.1:9, http://127.0.0.1:10, http://127.0.0.1:11"
            assert url[3] == "http://127.0.0.1:12"
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"http://127.0.0.1:{url[1]}/health", timeout=20)
            with caught.value as answer:
                assert answer.code == 503
                assert set(json.load(answer)) == {"prefill", "decode"}
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def test_the_proxy_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "kvconnect.proxy.serve", raising=False)
    assert cli.main(["proxy"]) == 2
    assert "the proxy needs the module 'uvicorn' (pip install 'kvconnect[proxy]')" in capsys.readouterr().err


def test_the_demo_gets_every_argument_and_its_status_is_the_commands(monkeypatch):
    got = []
    demo = types.ModuleType("kvconnect.demo.main")
    demo.main = lambda argv: got.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvconnect.demo.main", demo)
    assert cli.main(["demo", "--pipe", "tcp", "--help", "x"]) == 3
    assert got == [["--pipe", "tcp", "--help", "x"]]


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"kvconnect \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_nothing_else_in_the_package_prints():
    """Only commands talk to a terminal; libraries log."""
    root = Path(cli.__file__).parent
    printing = {
        path.relative_to(root).parts[0]
        for path in root.rglob("*.py")
        if re.search(r"^\s*print\(", path.read_text(), re.MULTILINE)
    }
    assert printing <= {"cli.py", "bench", "demo", "doctor"}


def test_keygen_writes_a_private_key_prints_the_public_one_and_replaces_none(tmp_path):
    path = tmp_path / "own.key"
    done = kvconnect("keygen", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\S{40}\n", done.stdout)
    secret = path.read_text().strip()
    assert secret not in done.stdout
    assert path.stat().st_mode & 0o777 == 0o600
    again = kvconnect("keygen", str(path))
    assert again.returncode == 2
    assert "name a new file" in again.stderr
    assert path.read_text().strip() == secret
