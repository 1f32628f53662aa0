"""A name that stands for several servers: who is found, who is left, and what it means that nobody answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import httpx
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from kvconnect.errors import ConfigError
from kvconnect.proxy.app import build
from kvconnect.proxy.settings import Settings
from tests.proxy.conftest import Stage
from tests.proxy.servers import WAIT_S, FakeEngine, Served, answers, gives_ticket, says, until


class Directory(AbstractResolver):
    """What names stand for, or how looking them up fails."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.failure: int | None = None
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        self.asked += 1
        await self.answers.wait()
        assert host == "engines.test"
        if self.failure is not None:
            raise socket.gaierror(self.failure, "no")
        given = {"hostname": host, "port": port, "family": family, "proto": 0, "flags": 0}
        return [ResolveResult(host=address, **given) for address in self.addresses]

    async def close(self) -> None:
        pass


@contextlib.contextmanager
def prefills(*addresses):
    """Give a prefill engine at each address, all at one port, and that."""
    with contextlib.ExitStack() as stack:
        engines, port = {}, 0
        for address in addresses:
            listener = socket.create_server((address, port))
            port = listener.getsockname()[1]
            engines[address] = FakeEngine(gives_ticket)
            stack.enter_context(Served(engines[address], listener=listener))
        yield engines, port


@contextlib.contextmanager
def staged(port, directory, **settings):
    """Run a proxy whose prefill servers are those of a name."""
    decode = FakeEngine(answers)
    with Served(decode) as behind:
        chosen = Settings((f"dns+http://engines.test:{port}",), (behind.url,), health_interval_s=0.05, **settings)
        with (
            Served(build(chosen, directory), lifespan="on") as proxy,
            httpx.Client(base_url=proxy.url, timeout=WAIT_S, trust_env=False) as client,
        ):
            yield Stage(client, proxy.port, [], [decode], chosen)


def known(stage) -> set[str]:
    return set(stage.client.get("/health").json()["prefill"])


def test_each_address_is_a_server_of_its_own_that_comes_and_goes_with_the_name():
    directory = Directory()
    directory.addresses = ["127.0.0.2", "127.0.0.3"]
    with prefills("127.0.0.2", "127.0.0.3", "127.0.0.4") as (engines, port), staged(port, directory) as stage:
        urls = {address: f"http://{address}:{port}" for address in engines}
        assert known(stage) == {urls["127.0.0.2"], urls["127.0.0.3"]}, "from the first request on"
        for _ in range(4):
            assert "x-kvconnect-fallback" not in stage.post({"prompt": "x"}).headers
        assert [len(engine.seen) for engine in engines.values()] == [2, 2, 0]
        directory.addresses = ["127.0.0.4", "127.0.0.3"]
        until(lambda: known(stage) == {urls["127.0.0.3"], urls["127.0.0.4"]})
        for _ in range(6):
            stage.post({"prompt": "x"})
        seen = [len(engine.seen) for engine in engines.values()]
        assert seen[0] == 2
        assert sum(seen) == 10
        assert seen[2] >= 3
        text = stage.client.get("/metrics").text
        assert urls["127.0.0.2"] not in text, "a server that has gone leaves no series"
        assert stage.metric("server_up", leg="prefill", server=urls["127.0.0.4"]) == 1


def test_a_server_that_stays_keeps_what_is_known_of_it():
    directory = Directory()
    directory.addresses = ["127.0.0.2", "127.0.0.3"]
    with prefills("127.0.0.2", "127.0.0.3") as (engines, port), staged(port, directory, health_failures=1) as stage:
        engines["127.0.0.2"].health = says(503, {})
        left_out = f"http://127.0.0.2:{port}"
        until(lambda: stage.metric("server_up", leg="prefill", server=left_out) == 0)
        directory.addresses = ["127.0.0.2"]
        until(lambda: known(stage) == {left_out})
        assert stage.metric("server_up", leg="prefill", server=left_out) == 0


@pytest.mark.parametrize("failure", [socket.EAI_AGAIN, socket.EAI_FAIL])
def test_without_an_answer_the_name_stands_for_what_it_stood_for(failure, caplog):
    directory = Directory()
    directory.addresses = ["127.0.0.2"]
    with prefills("127.0.0.2") as (_, port), staged(port, directory) as stage:
        directory.failure = failure
        asked = directory.asked
        until(lambda: directory.asked >= asked + 3)
        assert "x-kvconnect-fallback" not in stage.post({"prompt": "x"}).headers
    assert "engines.test cannot be looked up" in caplog.text


@pytest.mark.parametrize("failure", [socket.EAI_NONAME, socket.EAI_NODATA])
def test_where_the_answer_is_that_there_are_none_the_others_addresses_are_forgotten(failure):
    directory = Directory()
    directory.addresses = ["127.0.0.2"]
    with prefills("127.0.0.2") as (engines, port), staged(port, directory) as stage:
        stage.post({"prompt": "x"})
        directory.failure = failure
        until(lambda: not known(stage))
        answer = stage.post({"prompt": "x"})
        assert (answer.status_code, answer.headers["x-kvconnect-fallback"]) == (200, "prefill unreachable")
        assert stage.client.get("/health").status_code == 503
        assert len(engines["127.0.0.2"].seen) == 1
        directory.failure = None
        until(lambda: known(stage))
        assert "x-kvconnect-fallback" not in stage.post({"prompt": "x"}).headers


def test_a_server_that_is_found_twice_is_one(make_stage):
    stage = make_stage()
    (url,) = stage.settings.prefill
    port = url.rpartition(":")[2]
    twice = make_stage(prefill_urls=(url, f"dns+http://127.0.0.1:{port}", f"dns+http://localhost:{port}"))
    report = twice.client.get("/health").json()["prefill"]
    assert report[url] == "ok", "names are looked up as the system does"
    assert len([each for each in report if "127.0.0.1" in each]) == 2, "it, and the stage's own"
    assert twice.metric("server_up", leg="prefill", server=url) == 1


def test_all_servers_of_a_name_are_tried_before_a_request_fails():
    directory = Directory()
    directory.addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    with prefills("127.0.0.4") as (engines, port), staged(port, directory, retries=2) as stage:
        assert "x-kvconnect-fallback" not in stage.post({"prompt": "x"}).headers
        assert len(engines["127.0.0.4"].seen) == 1


def test_a_name_is_not_for_https_whose_certificates_are_for_names():
    with pytest.raises(ConfigError, match="must look like"):
        Settings(prefill=("dns+https://engines.test:8000",))


def test_a_resolver_that_hangs_delays_the_start_no_longer_than_a_connection_may_take():
    directory = Directory()
    directory.answers.clear()
    begun = time.monotonic()
    with staged(8000, directory, connect_timeout_s=0.2) as stage:
        assert stage.client.get("/health").json()["prefill"] == {}
        assert stage.post({"prompt": "x"}).headers["x-kvconnect-fallback"] == "prefill unreachable"
    assert time.monotonic() - begun < WAIT_S / 2
