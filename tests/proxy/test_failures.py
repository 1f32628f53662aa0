"""What a client sees when an engine fails, and what an engine sees when a client does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import threading
import time

import httpx
import pytest

from kvconnect.proxy.serve import _listen
from tests.proxy.servers import WAIT_S, Call, answers, says


def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_prefill_refusal_that_is_the_requests_fault_is_passed_on(stage, status):
    error = {"error": {"message": "min_tokens must be less", "code": status}}
    stage.prefill[0].behave = says(status, error, (b"x-from", b"prefill"))
    answer = stage.post({"prompt": "x"})
    assert (answer.status_code, answer.json()) == (status, error)
    assert answer.headers["x-from"] == "prefill"
    assert not stage.decode[0].seen


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_prefill_failure_of_the_servers_own_leaves_the_decode_server_alone(stage, caplog, status):
    stage.prefill[0].behave = says(status, {"error": "no"})
    answer = stage.post({"prompt": "x", "min_tokens": 2}, headers={"X-Request-Id": "r1"})
    assert (answer.status_code, answer.json()["id"]) == (200, "d")
    assert answer.headers["x-kvconnect-fallback"] == f"prefill answered {status}"
    assert stage.decode[0].seen[0].body == {"prompt": "x", "min_tokens": 2}
    assert stage.decode[0].seen[0].header("x-request-id") == "r1"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "kvconnect.proxy"]
    assert line == f"request r1: prefill answered {status}; the decode server computes it alone"


def test_a_prefill_server_that_is_down_leaves_the_decode_server_alone(make_stage):
    stage = make_stage(prefill=0, prefill_urls=(unused_url(),))
    answer = stage.post({"prompt": "x"})
    assert (answer.status_code, answer.json()["id"]) == (200, "d")
    assert answer.headers["x-kvconnect-fallback"] == "prefill unreachable"


def test_a_server_that_is_down_is_passed_over_for_the_next(make_stage):
    stage = make_stage(prefill_urls=(unused_url(),), decode_urls=(unused_url(),))
    for _ in range(4):
        answer = stage.post({"prompt": "x"})
        assert (answer.status_code, answer.json()["id"]) == (200, "d")
        assert "x-kvconnect-fallback" not in answer.headers
    assert len(stage.prefill[0].seen) == len(stage.decode[0].seen) == 4


def test_a_prefill_server_that_is_too_slow_is_given_up_and_told(make_stage):
    stage = make_stage(prefill_timeout_s=0.3)
    stage.prefill[0].behave = stage.prefill[0].hang()
    answer = stage.post({"prompt": "x"})
    assert (answer.status_code, answer.json()["id"]) == (200, "d")
    assert answer.headers["x-kvconnect-fallback"] == "prefill timed out after 0.3 s"
    assert stage.prefill[0].aborted.wait(WAIT_S)


def test_a_prefill_answer_that_trickles_is_given_up_too(make_stage):
    stage = make_stage(prefill_timeout_s=0.4)

    async def trickle(call: Call) -> None:
        await call.start(200)
        await call.piece(b"{")
        await call.until_gone()

    stage.prefill[0].behave = trickle
    assert stage.post({"prompt": "x"}).headers["x-kvconnect-fallback"] == "prefill timed out after 0.4 s"


def test_a_prefill_answer_that_breaks_off_leaves_the_decode_server_alone(stage):
    async def cut(call: Call) -> None:
        await call.start(200, (b"content-length", b"1000"))
        await call.piece(b"{", more=True)

    stage.prefill[0].behave = cut
    answer = stage.post({"prompt": "x"})
    assert answer.json()["id"] == "d"
    assert answer.headers["x-kvconnect-fallback"] == "prefill connection broke (ClientPayloadError)"


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_the_decode_servers_errors_are_passed_on_as_they_are(stage, status):
    error = {"error": {"message": "from decode", "code": status}}
    stage.decode[0].behave = says(status, error, (b"retry-after", b"7"))
    answer = stage.post({"prompt": "x"})
    assert (answer.status_code, answer.json()) == (status, error)
    assert answer.headers["retry-after"] == "7"
    assert len(stage.decode[0].seen) == 1


def test_a_decode_server_that_is_down_is_a_bad_gateway(make_stage):
    stage = make_stage(decode=0, decode_urls=(unused_url(),))
    answer = stage.post({"prompt": "x"})
    assert answer.status_code == 502
    assert answer.json()["error"]["message"] == "decode unreachable"


def test_a_decode_server_that_does_not_answer_is_a_gateway_timeout(make_stage):
    stage = make_stage(decode_timeout_s=0.3)
    stage.decode[0].behave = stage.decode[0].hang()
    answer = stage.post({"prompt": "x"})
    assert answer.status_code == 504
    assert answer.json()["error"]["message"] == "decode timed out after 0.3 s"
    assert stage.decode[0].aborted.wait(WAIT_S)


def test_a_decode_server_that_hangs_up_is_a_bad_gateway_and_not_asked_again(make_stage):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        accepted = []

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # the listener's end
                while True:
                    connection, _ = listener.accept()
                    accepted.append(connection.recv(1 << 16))
                    connection.close()

        thread = threading.Thread(target=hang_up, name="hangs-up", daemon=True)
        thread.start()
        stage = make_stage(decode=0, decode_urls=(f"http://127.0.0.1:{listener.getsockname()[1]}",))
        answer = stage.post({"prompt": "x"})
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
    assert answer.status_code == 502
    assert answer.json()["error"]["message"].startswith("decode connection broke")
    assert len([each for each in accepted if each.startswith(b"POST")]) == 1


def test_a_stream_arrives_piece_by_piece_and_byte_for_byte(stage):
    pieces = [b'data: {"n": %d}\n\n' % i for i in range(5)] + [b": comment\r\n\r\n", b"data: [DONE]\n\n"]
    turn: list[asyncio.Event] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def stream(call: Call) -> None:
        loops.append(asyncio.get_running_loop())
        turn.append(asyncio.Event())
        await call.start(200, (b"content-type", b"text/event-stream; charset=utf-8"))
        for piece in pieces:
            await call.piece(piece)
            # The next is sent only once the client has this one: nobody may hold it back.
            await asyncio.wait_for(turn[0].wait(), WAIT_S)
            turn[0].clear()
        await call.piece(b"", more=False)

    stage.decode[0].behave = stream
    got = []
    with stage.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        for chunk in answer.iter_raw():
            got.append(chunk)
            loops[0].call_soon_threadsafe(turn[0].set)
    assert got == pieces
    assert stage.prefill[0].seen[0].body["stream"] is False
    assert stage.decode[0].seen[0].body["stream"] is True


def test_a_stream_that_breaks_off_ends_broken_for_the_client_too(stage):
    async def cut(call: Call) -> None:
        await call.start(200, (b"content-type", b"text/event-stream"))
        await call.piece(b"data: 1\n\n")

    stage.decode[0].behave = cut
    got = []
    with (
        stage.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        got.extend(answer.iter_raw())
    assert b"".join(got) in (b"", b"data: 1\n\n")
    stage.decode[0].behave = answers
    assert stage.post({"prompt": "y"}).json()["id"] == "d"


def hang_up_after(stage, *, leg) -> None:
    """Send a request, wait until the leg works on it, and close the connection."""
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S) as connection:
        connection.sendall(head + body)
        assert leg.busy.wait(WAIT_S)


def test_a_client_that_leaves_during_prefill_aborts_it_and_nothing_is_decoded(stage):
    stage.prefill[0].behave = stage.prefill[0].hang()
    hang_up_after(stage, leg=stage.prefill[0])
    assert stage.prefill[0].aborted.wait(WAIT_S)
    # A later request has passed through whole, so an earlier decode leg would have shown.
    stage.prefill[0].behave = says(200, {})
    stage.post({"prompt": "y"})
    assert [seen.body["prompt"] for seen in stage.decode[0].seen] == ["y"]


def test_a_client_that_leaves_before_the_answer_begins_aborts_the_decode_leg(stage):
    stage.decode[0].behave = stage.decode[0].hang()
    hang_up_after(stage, leg=stage.decode[0])
    assert stage.decode[0].aborted.wait(WAIT_S)


def test_a_client_that_leaves_in_mid_stream_aborts_the_decode_leg(stage):
    engine = stage.decode[0]
    hang = engine.hang()

    async def stream(call: Call) -> None:
        await call.start(200, (b"content-type", b"text/event-stream"))
        await call.piece(b"data: 1\n\n")
        await hang(call)

    engine.behave = stream
    with stage.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
        assert next(answer.iter_raw()) == b"data: 1\n\n"
    assert engine.aborted.wait(WAIT_S)


def ask(stage, *, window_bytes: int) -> socket.socket:
    """Return a client's connection, on which a request was sent and nothing has been read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
    connection.settimeout(WAIT_S)
    connection.connect(("127.0.0.1", stage.port))
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection.sendall(head + body)
    return connection


def sends_without_end(engine):
    """Return the behaviour of an engine that generates until its client is gone."""

    async def behave(call: Call) -> None:
        gone = asyncio.ensure_future(asyncio.wait_for(call.until_gone(), WAIT_S))
        await call.start(200, (b"content-type", b"text/event-stream"))
        while not gone.done():
            await call.piece(b"x" * 65536)
            await asyncio.sleep(0)  # once the client is gone, sending returns at once
        await gone
        engine.aborted.set()

    return behave


def test_a_client_that_stops_reading_is_given_up_and_the_decode_leg_aborted(make_stage, caplog):
    stage = make_stage(client_timeout_s=0.5)
    engine = stage.decode[0]
    engine.behave = sends_without_end(engine)
    with ask(stage, window_bytes=4096) as connection:
        assert engine.aborted.wait(WAIT_S), "the engine's request is held by a client that reads nothing"
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 20):
                got = got[-8:] + piece
        assert not got.endswith(b"0\r\n\r\n"), "an answer that was cut looks whole"
    lines = [record.getMessage() for record in caplog.records if record.name == "kvconnect.proxy"]
    assert "a client took nothing of its answer for 0.5 s; its request is given up" in lines
    engine.behave = answers
    assert stage.post({"prompt": "y"}).json()["id"] == "d"


def test_a_client_that_reads_slowly_gets_its_whole_answer(make_stage):
    stage = make_stage(client_timeout_s=0.5)
    total = 16 << 20

    async def behave(call: Call) -> None:
        await call.start(200, (b"content-length", b"%d" % total))
        for _ in range(total >> 16):
            await call.piece(b"x" * 65536)
        await call.piece(b"", more=False)

    stage.decode[0].behave = behave
    before = time.monotonic()
    got, pause = 0, threading.Event()
    with ask(stage, window_bytes=1 << 18) as connection:
        while got < total:
            piece = connection.recv(1 << 19, socket.MSG_WAITALL)
            assert piece, f"cut after {got} bytes"
            got += len(piece)
            pause.wait(0.05)
    assert time.monotonic() - before > 2 * 0.5


def test_a_client_that_stops_sending_its_request_is_told_so(make_stage):
    stage = make_stage(client_timeout_s=0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S) as connection:
        connection.sendall(head)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert not stage.prefill[0].seen


def test_the_system_ends_the_connection_of_a_client_that_reads_nothing():
    with _listen("127.0.0.1", 0, 0.5) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(WAIT_S)
            with pytest.raises(OSError, match="timed out") as caught:
                accepted.sendall(bytes(64 << 20))
            assert caught.value.errno == errno.ETIMEDOUT  # not our own time-out


def test_many_requests_run_at_once(stage):
    """One that hangs holds up no other."""
    stage.decode[0].behave = stage.decode[0].hang()
    body = json.dumps({"prompt": "slow"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S) as connection:
        connection.sendall(head + body)
        assert stage.decode[0].busy.wait(WAIT_S)
        stage.decode[0].behave = says(200, {"id": "fast"})
        before = time.monotonic()
        assert stage.post({"prompt": "fast"}).json() == {"id": "fast"}
        assert time.monotonic() - before < WAIT_S / 2
    assert stage.decode[0].aborted.wait(WAIT_S)


def test_health_is_good_when_each_leg_has_a_server_that_is(make_stage):
    down = unused_url()
    stage = make_stage(decode_urls=(down,))
    answer = stage.client.get("/health")
    assert answer.status_code == 200
    report = answer.json()
    assert list(report["prefill"].values()) == ["ok"]
    assert report["decode"].pop(down) != "ok"
    assert list(report["decode"].values()) == ["ok"]
    assert stage.prefill[0].checks


def test_health_is_bad_when_a_leg_has_none(stage):
    stage.prefill[0].health = says(503, {})
    answer = stage.client.get("/health")
    assert answer.status_code == 503
    assert list(answer.json()["prefill"].values()) == ["answered 503"]
    assert list(answer.json()["decode"].values()) == ["ok"]


def test_health_does_not_wait_for_a_server_that_hangs(make_stage):
    stage = make_stage(health_timeout_s=0.3)
    stage.decode[0].health = stage.decode[0].hang()
    answer = stage.client.get("/health")
    assert answer.status_code == 503
    assert list(answer.json()["decode"].values()) == ["TimeoutError"]


@pytest.mark.parametrize(
    ("query", "passed"),
    [
        (b"a=%2F+b&c=[1]&d", "a=%2F+b&c=[1]&d"),
        (b"%zz&a=%", "%zz&a=%"),
        (b'a="<>|{}', "a=%22%3C%3E%7C%7B%7D"),
        (b"q" * 65_000, "q" * 65_000),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/models")])
def test_a_query_is_passed_on_with_what_has_to_be_escaped(stage, method, path, query, passed):
    head = b"%s %s?%s HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S) as connection:
        connection.sendall(head % (method.encode(), path.encode(), query))
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert stage.decode[0].seen[0].path == f"{path}?{passed}"


@contextlib.contextmanager
def says_bytes(content: bytes):
    """Give the URL of a server that answers everything with these bytes and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener's end
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(content)

        thread = threading.Thread(target=serve, name="says-bytes", daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)


@pytest.mark.parametrize(
    "head",
    [
        b"200 OK\r\nX-Bad: a\x01b",
        b"200 OK\r\nX-Bad: a\x7fb",
        b"000 No",
        b"999 No",
        b"101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade",
    ],
)
def test_an_answer_that_http_does_not_allow_is_a_bad_gateway(make_stage, head):
    with says_bytes(b"HTTP/1.1 " + head + b"\r\nContent-Length: 2\r\n\r\n{}") as url:
        stage = make_stage(decode=0, decode_urls=(url,))
        answer = stage.post({"prompt": "x"})
    assert answer.status_code == 502
    assert answer.json()["error"]["message"].startswith("decode connection broke")
    assert stage.metric("leg_requests_total", leg="decode", outcome="broken") == 1
    assert stage.metric("server_in_flight", leg="decode", server=url) == 0


def test_a_prefill_answer_without_end_is_given_up_before_it_fills_the_memory(stage, monkeypatch):
    monkeypatch.setattr("kvconnect.proxy.connections._MOST_BYTES", 1 << 20)
    stage.prefill[0].behave = sends_without_end(stage.prefill[0])
    answer = stage.post({"prompt": "x"})
    assert (answer.json()["id"], answer.headers["x-kvconnect-fallback"][:24]) == ("d", "prefill connection broke")
    assert stage.prefill[0].aborted.wait(WAIT_S)


@pytest.mark.parametrize("path", ["POST /v1/completions", "GET /v1/models"])
@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_a_header_that_no_server_may_be_sent_is_the_clients_fault(make_stage, path, parser):
    """One of uvicorn's two parsers lets it through."""
    stage = make_stage(parser=parser)
    head = f"{path} HTTP/1.1\r\nHost: x\r\nX-A: a\x01b\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
    with socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S) as connection:
        connection.sendall(head.encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not stage.decode[0].seen


def test_a_header_that_is_no_ascii_is_no_failure(stage):
    names = ["jürgen", "jürgen"]
    for name, encoding in zip(names, ("utf-8", "latin-1"), strict=True):
        stage.post({"prompt": "x"}, headers={b"X-Name": name.encode(encoding)})
    assert [seen.header("x-name") for seen in stage.decode[0].seen] == names
