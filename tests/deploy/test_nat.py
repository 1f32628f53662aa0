"""Engines behind NAT: the address where they listen is not the one that others reach them at."""

import contextlib
import json
import subprocess
import sys

import pytest

from bench.report import ROOT
from tests.hosts import two_hosts_behind_nat

pytestmark = pytest.mark.timeout(100)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts_behind_nat(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def party(hosts, tmp_path):
    """Return ``party(role, pipe, **options)``, which starts an engine on its host."""
    key = tmp_path / "key"
    key.write_text("a secret of two hosts")
    key.chmod(0o600)
    with contextlib.ExitStack() as stack:

        def start(role, **options):
            host = hosts[role == "consume"]
            told = {"bind_host": host.address, "advertise_host": host.outside, "key_file": str(key), **options}
            command = [sys.executable, "-m", "tests.deploy.party", role, json.dumps(told)]
            process = subprocess.Popen(
                host.command(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def outcomes(p, d):
    """Hand both prompts over; return what D says of each."""
    for _ in range(2):
        d.stdin.write(p.stdout.readline())
        d.stdin.flush()
        yield json.loads(d.stdout.readline())


@pytest.mark.parametrize("pipe", ["tcp", "auto"])
def test_engines_that_tell_their_routers_addresses_hand_over_between_two_private_networks(party, pipe):
    p, d = party("produce", pipe=pipe), party("consume", pipe=pipe)
    assert list(outcomes(p, d)) == ["loaded", "loaded"]


def test_an_engine_that_tells_its_private_address_is_not_reached_in_time_and_that_is_said(party, hosts):
    p, d = party("produce", pipe="tcp", advertise_host=None), party("consume", pipe="tcp", connect_timeout_s=1.0)
    for said in outcomes(p, d):
        assert said.startswith(("unreachable: ", "timeout: "))
        assert hosts[0].address in said


def test_nixl_whose_ucx_tells_its_own_addresses_is_a_failed_load(party):
    p, d = party("produce", pipe="nixl"), party("consume", pipe="nixl")
    for said in outcomes(p, d):
        assert said.startswith("KV could not be read"), said
        assert "nixl" in said.lower()
