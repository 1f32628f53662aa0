"""What comes before a request's body: it has to come in time, and to have an end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest
from uvicorn.protocols.http import h11_impl, httptools_impl

from kvconnect.proxy import heads
from tests.proxy.command import running
from tests.proxy.servers import WAIT_S, Call, answers

LIMIT_S = 0.5
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n"
BODY = b'{"prompt": "x"}'


@pytest.fixture(params=[h11_impl.H11Protocol, httptools_impl.HttpToolsProtocol])
def stage(make_stage, request):
    return make_stage(parser=heads.within(LIMIT_S, request.param))


@contextlib.contextmanager
def connected(stage):
    with socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S) as connection:
        yield connection


def answer(connection) -> bytes:
    got = b""
    while not got.endswith(b"}]}"):
        piece = connection.recv(1 << 16)
        assert piece, got
        got += piece
    return got


def answers_after(seconds: float):
    """Return what a server does that takes its time."""

    async def slowly(call: Call) -> None:
        await asyncio.sleep(seconds)
        await answers(call)

    return slowly


def ends_in(connection) -> float:
    """Return after how long the connection has ended."""
    begun = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - begun


@pytest.mark.parametrize("said", [b"", HEAD[:40]])
def test_a_connection_on_which_no_request_comes_is_ended(stage, said):
    with connected(stage) as connection:
        connection.sendall(said)
        assert LIMIT_S / 2 < ends_in(connection) < WAIT_S / 2


def test_a_second_request_has_to_come_in_time_too(stage):
    with connected(stage) as connection:
        connection.sendall(HEAD + BODY)
        assert answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(HEAD[:40])
        assert ends_in(connection) < WAIT_S / 2


def test_time_between_requests_and_time_for_an_answer_do_not_count(stage):
    stage.decode[0].behave = answers_after(2 * LIMIT_S)
    with connected(stage) as connection:
        for _ in range(2):
            connection.sendall(HEAD + BODY)
            assert answer(connection).startswith(b"HTTP/1.1 200 ")
            time.sleep(1.5 * LIMIT_S)


def test_a_body_has_a_limit_of_its_own(stage):
    with connected(stage) as connection:
        connection.sendall(HEAD)
        for byte in BODY:
            time.sleep(LIMIT_S / 5)
            connection.sendall(bytes([byte]))
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


def test_the_head_of_a_next_request_does_not_end_an_answer_that_takes_longer(stage):
    stage.decode[0].behave = answers_after(3 * LIMIT_S)
    with connected(stage) as connection:
        connection.sendall(HEAD + BODY + HEAD[:40])
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


def test_a_head_without_end_is_cut_off(stage):
    sent = 0
    with connected(stage) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD[:-2])
        while sent < 64 << 20:
            connection.sendall(b"X-%d: " % sent + b"a" * 4096 + b"\r\n")
            sent += 4096
    assert sent < 32 << 20


def test_many_requests_and_a_large_body_on_one_connection_are_no_long_head(stage):
    body = b'{"prompt": "%s"}' % (b"x" * 300_000)
    large = HEAD.replace(b"15", b"%d" % len(body))
    with connected(stage) as connection:
        for _ in range(3):
            connection.sendall(large + body)
            assert answer(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.timeout(120)
def test_the_command_has_this_limit():
    with running("--client-timeout", "0.5") as (_, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
            assert ends_in(connection) < WAIT_S / 2
