"""The doctor as users meet it: real processes, planted faults, and what it says of each."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from kvconnect import cli
from kvconnect.doctor import counterpart, host, intent, peer
from kvconnect.doctor.counterpart import Case, Counterpart
from kvconnect.doctor.findings import Finding, Path
from kvconnect.doctor.intent import Intent
from kvconnect.doctor.main import main
from tests.buffers.engines import engines
from tests.doctor.conftest import SMALL, command, environment

pytestmark = pytest.mark.timeout(300)

VERDICTS = {"ok", "note", "slow", "bad"}


@pytest.fixture
def doctor(capsys):
    """Run it here and return the report and the exit status."""

    def run(*arguments):
        status = main([*arguments, "--json"])
        return check_schema(json.loads(capsys.readouterr().out)), status

    return run


def check_schema(report):
    assert list(report) == ["schema", "kvconnect", "verdict", "host", "peer", "findings", "paths"]
    assert report["schema"] == 1
    for kind, rows in ((Finding, report["findings"]), (Path, report["paths"])):
        for row in rows:
            assert list(row) == [field.name for field in dataclasses.fields(kind)]
    assert {row["verdict"] for row in report["findings"]} <= VERDICTS
    assert {"kvconnect", "vllm", "torch", "protocol", "name", "cores"} <= report["host"].keys()
    assert report["peer"] is None or set(report["peer"]) == {"address", "kind", "engine"}
    return report


def finding(report, name, verdict=None):
    found = [row for row in report["findings"] if row["name"] == name and verdict in (None, row["verdict"])]
    assert found, [(row["name"], row["verdict"]) for row in report["findings"]]
    return found[0]


def wanting(pipe, **more):
    return "--config", json.dumps({"kv_connector": "KvConnect", "kv_connector_extra_config": {"pipe": pipe, **more}})


# -- two processes ------------------------------------------------------------------


def test_a_second_process_of_this_host_is_measured_though_a_pipe_prints(site):
    done = subprocess.run(
        command("--json", "--pipe", "tcp", "--pipe", "chatty", *SMALL),
        check=False,
        capture_output=True,
        timeout=280,
        env=environment(site),
    )
    report = check_schema(json.loads(done.stdout))
    assert report["peer"]["kind"] == "doctor"
    taken, other = report["paths"][0], next(path for path in report["paths"] if path["pipe"] == "tcp")
    assert (taken["pipe"], taken["taken"], taken["ceiling"]) == ("shm", True, "memcpy")
    assert (other["pipe"], other["taken"]) == ("tcp", False)
    for path in report["paths"]:
        assert path["piece_bytes"] == 4096
        assert path["block_bytes"] == 8192
        assert path["gb_per_s"] > 0
        assert 0 < path["p50_us"] <= path["p99_us"]
        assert path["ratio"] > 0
    finding(report, "peer.version.kvconnect", "ok")
    finding(report, "peer.host", "ok")
    assert done.returncode == (report["verdict"] in {"slow", "bad"})


@pytest.mark.usefixtures("wild")
def test_a_pipe_that_moves_a_megabyte_a_second_is_named_slow_with_the_way_out(serving, doctor):
    report, status = doctor("--peer", serving, *SMALL, "--pipe", "shm", *wanting("crawl"))
    assert status == 1
    slow = finding(report, "path", "slow")
    assert "crawl is taken" in slow["what"]
    assert "far below" in slow["what"]
    assert '"pipe": "shm"' in slow["cure"]
    crawl, shm = report["paths"]
    assert crawl["gb_per_s"] <= 0.001 < shm["gb_per_s"]


@pytest.mark.usefixtures("wild")
def test_tcp_where_shared_memory_would_reach_is_named_slow(serving, doctor):
    report, status = doctor("--peer", serving, *SMALL, "--pipe", "tcp", *wanting("tcp"))
    assert status == 1
    near = finding(report, "path.nearer", "slow")
    assert "shm would reach" in near["what"]
    assert "auto" in near["cure"]


@pytest.mark.usefixtures("wild")
def test_a_pipe_that_brings_other_bytes_is_bad(serving, doctor):
    report, status = doctor("--peer", serving, *SMALL, "--pipe", "liar", *wanting("liar"))
    assert status == 1
    assert "brought other bytes" in finding(report, "path", "bad")["what"]


def test_a_pipe_that_ends_its_process_is_a_finding(site):
    done = subprocess.run(
        command("--json", *SMALL, *wanting("bomb")),
        check=False,
        capture_output=True,
        timeout=280,
        env=environment(site),
    )
    report = check_schema(json.loads(done.stdout))
    assert done.returncode == 1
    assert "ended with status 9" in finding(report, "peer", "bad")["what"]


@pytest.mark.usefixtures("wild")
def test_a_pipe_asked_for_that_does_not_reach_is_bad(serving, doctor):
    report, status = doctor("--peer", serving, *SMALL, "--pipe", "inproc", *wanting("shm"))
    assert status == 1
    assert "different processes" in finding(report, "path.inproc", "bad")["what"]


@pytest.mark.usefixtures("wild")
def test_text_says_the_same_as_json(serving, capsys):
    status = cli.main(["doctor", "--peer", serving, *SMALL, "--pipe", "tcp", *wanting("tcp")])
    out = capsys.readouterr().out
    assert status == 1
    assert "slow  path.nearer" in out
    assert "PIPE" in out
    assert out.splitlines()[-1].endswith("it works, and is slower than it could be")


# -- what does not match ----------------------------------------------------------------


@pytest.fixture
def opened():
    """Open counterparts in this process."""
    ends = []

    def make(extra=None, case=None, marks=None):
        wanted, _ = intent.examine({"kv_connector_extra_config": extra or {}})
        ends.append(Counterpart(wanted, case or Case(2, 4096, 1 << 19), "cpu", marks or {}))
        return ends[-1].endpoint

    yield make
    for end in ends:
        end.close()


def test_another_model_is_named_field_by_field(opened, doctor):
    at = opened(marks={"model": "a", "dtype": "bfloat16", "revision": "r"})
    report, status = doctor("--peer", at, "--pipe", "inproc", "--field", "model=b", "--field", "dtype=bfloat16")
    assert status == 1
    assert "ours 'b', theirs 'a'" in finding(report, "peer.field.model", "bad")["what"]
    finding(report, "peer.field.dtype", "ok")
    assert "revision 'r'" in finding(report, "peer.fields", "note")["what"]
    assert report["paths"], "it is measured all the same"


def test_another_layout_is_named_field_by_field(opened, doctor):
    report, status = doctor(
        "--peer", opened(), "--pipe", "inproc", "--layers", "3", "--piece-bytes", "2048", "--load-bytes", "65536"
    )
    assert status == 1
    assert finding(report, "peer.layout.layers", "bad")["what"] == "layers differs: ours 3, theirs 2"
    assert "ours 2048, theirs 4096" in finding(report, "peer.layout.piece_bytes", "bad")["what"]


def test_pipes_that_differ_are_named(opened, doctor):
    report, status = doctor("--peer", opened({"pipe": "tcp"}), "--pipe", "inproc", *wanting("shm"))
    assert status == 1
    assert "ours 'shm', theirs 'tcp'" in finding(report, "peer.pipe", "bad")["what"]


def test_a_peer_without_the_key_is_told_so(opened, doctor, tmp_path):
    secret = tmp_path / "key"
    secret.write_text("0123456789abcdef" * 4)
    secret.chmod(0o600)
    at = opened({"key_file": str(secret)})
    report, status = doctor(
        "--peer", at, "--config", json.dumps({"kv_connector_extra_config": {"connect_timeout_s": 2.0}})
    )
    assert status == 1
    assert "key_file" in finding(report, "peer", "bad")["cure"]
    report, _ = doctor("--peer", at, "--pipe", "inproc", *wanting("auto", key_file=str(secret)))
    assert report["paths"], "and with the key it is measured"


def test_nobody_there_is_a_finding(doctor):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    report, status = doctor("--peer", f"127.0.0.1:{free}")
    assert status == 1
    assert "--serve" in finding(report, "peer", "bad")["cure"]
    assert report["paths"] == []


def test_a_running_engine_is_compared_and_not_disturbed(doctor):
    with engines() as (producer, consumer):
        at = producer.offer()["at"]
        before = producer.end.stats()
        fields = ("--field", "model=m", "--field", "dtype=float16")
        report, status = doctor("--peer", at, *fields)
        assert producer.end.stats() == before
        assert consumer.end.stats().get("refused", 0) == 0
    assert status == 1
    assert report["peer"]["kind"] == "engine"
    finding(report, "peer.field.model", "ok")
    assert "ours 'float16', theirs 'bfloat16'" in finding(report, "peer.field.dtype", "bad")["what"]
    assert "would be taken" in finding(report, "path", "note")["what"]
    assert report["paths"] == []


# -- a configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"kv_connector_extra_config": {"lease": 3}},
            "kv_connector_extra_config.lease is not a known option; did you mean",
        ),
        ({"kv_connector_extra_config": {"lease_s": 0}}, "kv_connector_extra_config.lease_s must be greater than 0"),
        ({"kv_connector_extra_cfg": {}}, "did you mean 'kv_connector_extra_config'?"),
        ({"kv_connector": "KvConect"}, "did you mean 'KvConnect'?"),
        ({"kv_role": "producer"}, "kv_role must be one of kv_producer"),
        ({"kv_connector": "KvConnectTcp", "kv_connector_extra_config": {"pipe": "shm"}}, "stands for 'tcp'"),
        ({"kv_connector_extra_config": {"pipe": "smh"}}, "did you mean 'shm'?"),
        ({"kv_connector_extra_config": {"pipe": {"name": "auto", "options": {"tpc": {}}}}}, "did you mean 'tcp'?"),
        ({"kv_connector_extra_config": {"pipe": {"name": "tcp", "bind_host": "10.0.0.1"}}}, "key_file"),
        ({"kv_connector_extra_config": []}, "must be an object"),
        ({"kv_connector_extra_config": {"key_file": "/not/there"}}, "/not/there"),
    ],
)
def test_a_configuration_that_an_engine_would_refuse_is_bad(config, told):
    _, findings = intent.examine(config)
    bad = [found.what for found in findings if found.verdict == "bad"]
    assert any(told in what for what in bad), findings


def test_a_bad_key_ends_with_1_and_no_measurement(doctor):
    report, status = doctor("--config", '{"kv_connector_extra_config": {"pipes": "tcp"}}')
    assert status == 1
    assert "pipes is not a known option; did you mean 'pipe'?" in finding(report, "config", "bad")["what"]
    assert report["paths"] == []


def test_older_fields_beside_the_extra_configuration_are_read():
    wanted, findings = intent.examine({"kv_ip": "127.0.0.1", "kv_rank": 1, "kv_parallel_size": 2})
    assert wanted.config.kv_rank == 1
    assert {found.verdict for found in findings} == {"ok"}


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _, findings = intent.examine({"kv_connector_extra_config": {"port": port}})
        (found,) = [found for found in findings if found.name == "host.port"]
        assert found.verdict == "bad"
        assert f"127.0.0.1:{port}" in found.what
        wanted, _ = intent.examine({"kv_connector_extra_config": {"pipe": {"name": "tcp", "port": port}}})
        assert [found.verdict for found in host.examine(wanted, "cpu") if found.name == "host.port"] == ["bad"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "/not/there.json"], "--config is neither a JSON object nor a file"),
        (["--config", "{"], "not valid JSON"),
        (["--pipe", "tpc"], "did you mean 'tcp'?"),
        (["--field", "model"], "must look like 'NAME=VALUE'"),
        (["--device", "gpu"], "--device must be 'cpu' or 'cuda:N'"),
        (["--piece-bytes", "7"], "--piece-bytes must be a multiple of 8"),
        (["--load-bytes", "1"], "--load-bytes must be"),
        (["--port", "70000"], "--port must be a TCP port"),
        (["--peer", "nonsense"], "a control address must look like"),
        (["--serve", "--peer", "a:1"], "not allowed with argument"),
        (["--jason"], "unrecognized arguments: --jason"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, told, capsys):
    try:
        status = cli.main(["doctor", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


# -- this host --------------------------------------------------------------------------


def in_a_child(code):
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_low_limits_are_named():
    code = """
import dataclasses, json, os, resource
from kvconnect.doctor import host
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))
may = [found.verdict for found in host._limits() if found.name == "host.memlock"] if os.getuid() == 0 else ["ok"]
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(json.dumps([may, *(dataclasses.asdict(found) for found in host._limits())]))
"""
    with_the_capability, files, memlock = in_a_child(code)
    assert with_the_capability == ["ok"], "root is held to no limit"
    assert (files["verdict"], files["what"]) == ("slow", "512 open files a process")
    assert "hard limit: 1024" in files["cure"]
    assert memlock["verdict"] in {"note", "slow"}
    assert "64 KiB can be locked" in memlock["what"]
    assert "ulimit -l unlimited" in memlock["cure"]


def test_a_little_shared_memory_is_named(monkeypatch):
    class Docker:
        f_blocks, f_bavail, f_frsize = 64 << 8, 60 << 8, 4096

    monkeypatch.setattr(host.os, "statvfs", lambda _: Docker)
    found = next(found for found in host._memory() if found.name == "host.dev_shm")
    assert found.verdict == "slow"
    assert "--shm-size" in found.cure


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_memory_that_may_not_be_read_is_named_with_its_cure(opened):
    """As another user: that is what the kernel refuses everywhere, whatever its ptrace_scope."""
    at = opened()
    code = f"""
import dataclasses, json, os
from kvconnect.doctor import host, intent, peer
ours = host.facts()
os.setgroups([]), os.setgid(65534), os.setuid(65534)
wanted = intent.Intent()
met = peer.meet(wanted, {at!r})
print(json.dumps([dataclasses.asdict(found) for found in peer.compare(wanted, met, ours, {{}})]))
"""
    (named,) = [row for row in in_a_child(code) if row["name"] == "peer.process_vm"]
    assert named["verdict"] == "slow"
    assert "goes through a ring" in named["what"]
    assert "ptrace_scope" in named["cure"]


def test_gpus_that_only_the_peers_container_has_are_named(opened):
    wanted, _ = intent.examine({})
    met = peer.meet(wanted, opened())
    met = dataclasses.replace(
        met,
        worker={**met.worker, "pipes": {**met.worker["pipes"], "cuda_ipc": {}}},
        facts={**met.facts, "gpus": ["nvidia0", "nvidia1"]},
    )
    ours = host.facts()
    named = {
        gpus: [
            found for found in peer.compare(wanted, met, {**ours, "gpus": list(gpus)}, {}) if found.name == "peer.gpus"
        ]
        for gpus in (("nvidia1",), ("nvidia0", "nvidia1", "nvidia2"))
    }
    (found,) = named["nvidia1",]
    assert found.verdict == "slow"
    assert "can use nvidia0, which" in found.what
    assert named["nvidia0", "nvidia1", "nvidia2"] == []


def test_the_platform_is_what_an_engine_here_would_say():
    fingerprint = pytest.importorskip("kvconnect.connectors.fingerprint")
    assert host.platform_field() == fingerprint._platform()


def test_a_doctor_takes_a_port_of_its_own():
    wanted = Intent(config=dataclasses.replace(Intent().config, port=4711))
    assert counterpart.listening_at(wanted, None, 0).config.port == 0
