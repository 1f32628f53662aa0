"""The doctor between two hosts: what reaches, what does not, and what it is told without a key."""

import json
import subprocess

import pytest

from tests.doctor.conftest import SMALL, command
from tests.hosts import two_hosts

LIMIT_S = 120


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def key(tmp_path):
    file = tmp_path / "key"
    file.write_text("a secret of two hosts")
    file.chmod(0o600)
    return file


def settings(host, **more):
    config = {"kv_connector": "KvConnect", "kv_connector_extra_config": {"bind_host": host.address, **more}}
    return "--config", json.dumps(config)


@pytest.fixture
def served(hosts, key):
    there = hosts[1]
    arguments = command("--serve", *SMALL, *settings(there, key_file=str(key)))
    with subprocess.Popen(there.command(*arguments), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


def examine(host, *arguments):
    done = subprocess.run(
        host.command(*command("--json", *arguments)), check=False, capture_output=True, timeout=LIMIT_S, text=True
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode


def test_between_hosts_a_pipe_that_reaches_is_taken_and_measured(hosts, key, served):
    assert served.startswith(f"{hosts[1].address}:")
    report, _ = examine(hosts[0], "--peer", served, *SMALL, *settings(hosts[0], key_file=str(key)))
    (place,) = (each for each in report["findings"] if each["name"] == "peer.host")
    assert "another host" in place["what"]
    assert report["paths"], report["findings"]
    taken = next(path for path in report["paths"] if path["taken"])
    assert taken["pipe"] in {"tcp", "nixl"}
    assert taken["gb_per_s"] > 0
    assert not [path for path in report["paths"] if path["pipe"] in {"shm", "inproc", "cuda_ipc"}]
    assert "bad" not in {each["verdict"] for each in report["findings"]}, report["findings"]


def test_a_pipe_of_one_host_is_refused_by_name(hosts, key, served):
    config = settings(hosts[0], key_file=str(key), pipe="shm")
    report, status = examine(hosts[0], "--peer", served, *SMALL, *config)
    assert status == 1
    assert any("shm" in each["what"] for each in report["findings"] if each["verdict"] == "bad")


def test_without_the_key_nothing_is_measured(hosts, served):
    report, status = examine(hosts[0], "--peer", served, *SMALL, *settings(hosts[0], insecure=True))
    assert status == 1
    assert report["paths"] == []
