"""The control channel over real sockets."""

import errno
import socket
import threading
import time
from concurrent.futures import Future

import msgpack
import pytest
import zmq

from kvconnect import control, messages
from kvconnect.control import ControlClient, ControlServer
from kvconnect.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    DeadlineError,
    HandshakeError,
    KVConnectError,
    StaleError,
    UnknownBackendError,
)
from kvconnect.testing.leaks import Holdings, assert_nothing_left


@pytest.fixture
def server():
    server = ControlServer()
    server.handle("echo", lambda body: body)
    yield server
    server.close()


@pytest.fixture
def client():
    client = ControlClient()
    yield client
    client.close()


def outcome(future, limit_s=5):
    return future.result(limit_s)


def test_a_request_is_answered_with_what_the_handler_returns(server, client):
    body = {"n": 2**60, "text": "ü", "raw": b"\0\xff", "list": [1, [2, None]], "map": {"x": True}, "f": 1.5}
    assert outcome(client.call(server.endpoint, "echo", body, 5)) == body


def test_a_handler_may_answer_later(server, client):
    later = Future()
    server.handle("later", lambda _: later)
    call = client.call(server.endpoint, "later", {}, 5)
    assert outcome(client.call(server.endpoint, "echo", {"a": 1}, 5)) == {"a": 1}, "the server waits for one handler"
    later.set_result({"b": 2})
    assert outcome(call) == {"b": 2}


def test_errors_travel_by_class_and_text(server, client):
    def stale(_):
        raise StaleError("too late")

    def unknown(_):
        raise UnknownBackendError("pipe", "ttp", ["tcp"])

    server.handle("stale", stale)
    server.handle("unknown", unknown)
    server.handle("fails later", lambda _: failed(HandshakeError("no")))
    with pytest.raises(StaleError, match=r"(?m)^too late$"):
        outcome(client.call(server.endpoint, "stale", {}, 5))
    with pytest.raises(ConfigError, match="did you mean 'tcp'"):
        outcome(client.call(server.endpoint, "unknown", {}, 5))
    with pytest.raises(HandshakeError, match=r"(?m)^no$"):
        outcome(client.call(server.endpoint, "fails later", {}, 5))
    with pytest.raises(KVConnectError, match="unknown operation"):
        outcome(client.call(server.endpoint, "nothing", {}, 5))


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def test_a_fault_in_a_handler_fails_its_call_and_not_the_server(server, client, caplog):
    server.handle("bug", lambda _: {}["missing"])
    with pytest.raises(KVConnectError, match="internal error in 'bug'"):
        outcome(client.call(server.endpoint, "bug", {}, 5))
    assert outcome(client.call(server.endpoint, "echo", {}, 5)) == {}
    assert "the handler of 'bug' failed" in caplog.text


def test_no_answer_in_time_is_a_deadline(server, client):
    server.handle("never", lambda _: Future())
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"did not answer 'never' within 0.2 s"):
        outcome(client.call(server.endpoint, "never", {}, 0.2))
    assert time.monotonic() - started < 2


def test_a_refused_connection_fails_at_once(client):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(BrokenError, match="refuses"):
            outcome(client.call(endpoint, "echo", {}, 30))
        assert time.monotonic() - started < 5


def test_a_host_that_never_answers_costs_its_deadline_and_no_late_delivery(client):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DeadlineError):
            outcome(client.call(f"127.0.0.1:{silent.getsockname()[1]}", "echo", {}, 0.3))


def test_a_vanished_peer_costs_its_own_calls_only(server, client):
    other = ControlServer()
    other.handle("never", lambda _: Future())
    lost = client.call(other.endpoint, "never", {}, 30)
    server.handle("never", lambda _: Future())
    kept = client.call(server.endpoint, "never", {}, 30)
    assert outcome(client.call(server.endpoint, "echo", {}, 5)) == {}
    other.close()
    with pytest.raises(BrokenError):
        outcome(lost)
    assert not kept.done()
    assert outcome(client.call(server.endpoint, "echo", {"still": 1}, 5)) == {"still": 1}


def test_a_restarted_peer_is_reached_again(client):
    first = ControlServer()
    first.handle("who", lambda _: {"n": 1})
    assert outcome(client.call(first.endpoint, "who", {}, 5)) == {"n": 1}
    first.close()
    second = ControlServer(port=first.port)
    second.handle("who", lambda _: {"n": 2})
    deadline = time.monotonic() + 5
    while True:
        try:
            answer = outcome(client.call(first.endpoint, "who", {}, 5))
            break
        except BrokenError:  # the end of the old connection may be noticed by the first call after it
            assert time.monotonic() < deadline
    assert answer == {"n": 2}
    second.close()


@pytest.mark.parametrize("endpoint", ["", "nowhere", "host:port", "127.0.0.1:0", "127.0.0.1:70000"])
def test_an_address_that_is_none_fails_the_call(client, endpoint):
    with pytest.raises(KVConnectError, match="host:port"):
        outcome(client.call(endpoint, "echo", {}, 1))


def test_what_msgpack_cannot_carry_fails_the_call(server, client):
    for body in ({"x": object()}, {"x": 2**70}, {"x": b"0" * (messages.MAX_MESSAGE_BYTES + 1)}):
        with pytest.raises(KVConnectError, match=r"msgpack|limit"):
            outcome(client.call(server.endpoint, "echo", body, 5))


def nested(depth):
    body = {}
    for _ in range(depth):
        body = {"x": body}
    return body


MALFORMED = {
    "nothing": b"",
    "no msgpack": b"\xc1\xc1",
    "cut off": msgpack.packb({"p": [1, 1], "id": 1, "op": "echo", "body": {}})[:-1],
    "trailing": msgpack.packb({"p": [1, 1], "id": 1, "op": "echo", "body": {}}) + b"x",
    "no map": msgpack.packb([1, 2]),
    "no version": msgpack.packb({"id": 1, "op": "echo", "body": {}}),
    "no id": msgpack.packb({"p": [1, 1], "op": "echo", "body": {}}),
    "id no number": msgpack.packb({"p": [1, 1], "id": True, "op": "echo", "body": {}}),
    "extension": msgpack.packb({"p": [1, 1], "id": 1, "op": "echo", "body": {"x": msgpack.ExtType(5, b"x")}}),
    "time stamp": msgpack.packb({"p": [1, 1], "id": 1, "op": "echo", "body": {"x": msgpack.Timestamp(1)}}),
    "deep": msgpack.packb({"p": [1, 1], "id": 1, "op": "echo", "body": nested(50)}),
    "number as key": msgpack.packb({"p": [1, 1], "id": 1, "op": "echo", "body": {1: 2}}),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_dropped_and_counted(server, data):
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(f"tcp://{server.endpoint}")
    raw.send(data)
    raw.send(messages.pack_request(7, "echo", {"ok": 1}))
    assert raw.poll(5000)
    assert messages.unpack(raw.recv())["id"] == 7, "a malformed request was answered"
    assert server.malformed == 1
    raw.close(0)
    context.term()


@pytest.mark.parametrize("versions", [[2, 3], [0, 0]])
def test_versions_that_do_not_meet_are_named(server, versions):
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(f"tcp://{server.endpoint}")
    raw.send(msgpack.packb({"p": versions, "id": 1, "op": "echo", "body": {}}))
    assert raw.poll(5000)
    error = messages.error_of(messages.unpack(raw.recv()))
    assert isinstance(error, HandshakeError)
    assert "protocol versions differ" in str(error)
    raw.close(0)
    context.term()


def test_a_newer_peer_that_still_speaks_our_version_is_served():
    message = messages.unpack(msgpack.packb({"p": [1, 9], "id": 1, "op": "echo", "body": {}}))
    messages.check_version(message)


def test_no_name_in_a_reply_makes_anything_but_a_listed_error():
    error = messages.error_of({"error": "SystemExit", "text": "x"})
    assert type(error) is KVConnectError


def test_an_address_in_use_is_named_at_the_start(server):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        ControlServer(port=server.port)


def test_many_threads_may_call_at_once(server, client):
    answers = []

    def ask(number):
        calls = [client.call(server.endpoint, "echo", {"n": number * 100 + i}, 10) for i in range(50)]
        answers.extend(outcome(call)["n"] for call in calls)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [number * 100 + i for number in range(8) for i in range(50)]


def test_calls_to_one_peer_arrive_in_order(server, client):
    seen = []
    server.handle("note", lambda body: seen.append(body["n"]) or {})
    calls = [client.call(server.endpoint, "note", {"n": n}, 10) for n in range(200)]
    for call in calls:
        outcome(call)
    assert seen == list(range(200))


def test_closing_fails_what_is_unanswered_and_what_comes_later(server):
    client = ControlClient()
    server.handle("never", lambda _: Future())
    call = client.call(server.endpoint, "never", {}, 30)
    client.close()
    client.close()
    with pytest.raises(ClosedError):
        outcome(call)
    with pytest.raises(ClosedError):
        outcome(client.call(server.endpoint, "echo", {}, 1))
    assert not client.soon(lambda: None)


def test_timers_run_in_order_and_can_be_cancelled(client):
    seen, over = [], threading.Event()
    client.later(0.10, lambda: seen.append("late"))
    client.later(0.02, lambda: seen.append("early"))
    client.later(0.05, lambda: seen.append("never")).cancel()
    client.later(0.15, over.set)
    assert over.wait(5)
    assert seen == ["early", "late"]


def test_hundreds_of_peers_are_answered(client):
    server = ControlServer(host="0.0.0.0")  # noqa: S104 - many addresses of loopback stand for many peers
    server.handle("echo", lambda body: body)
    calls = [client.call(f"127.0.{n // 200}.{1 + n % 200}:{server.port}", "echo", {"n": n}, 30) for n in range(400)]
    assert [outcome(call, 30)["n"] for call in calls] == list(range(400))
    server.close()


def test_what_the_context_has_no_sockets_for_fails_its_call_and_no_other(server, client):
    assert outcome(client.call(server.endpoint, "echo", {"n": 1}, 5)) == {"n": 1}

    def refuse(*_):
        raise zmq.ZMQError(errno.EMFILE)

    client._loop.context.socket = refuse
    with pytest.raises(BrokenError, match="open files"):
        outcome(client.call("127.0.0.2:9", "echo", {}, 5))
    assert outcome(client.call(server.endpoint, "echo", {"n": 2}, 5)) == {"n": 2}


def test_a_call_that_cannot_be_sent_ends_at_its_deadline_at_the_latest(server, client, monkeypatch):
    monkeypatch.setattr(client, "_connect", lambda _: {}["missing"])
    with pytest.raises(DeadlineError):
        outcome(client.call(server.endpoint, "echo", {}, 0.1))


def test_a_connection_that_is_not_used_is_closed_and_opened_again(server, monkeypatch):
    monkeypatch.setattr(control, "_IDLE_S", 0.2)
    client = ControlClient()
    for n in range(2):
        assert outcome(client.call(server.endpoint, "echo", {"n": n}, 5)) == {"n": n}
        until = time.monotonic() + 5
        while client._peers:
            assert time.monotonic() < until, "an idle connection stays open"
            threading.Event().wait(0.02)
    server.handle("never", lambda _: Future())
    waiting = client.call(server.endpoint, "never", {}, 0.7)
    with pytest.raises(DeadlineError):
        outcome(waiting)
    client.close()


def test_closing_leaves_nothing_behind():
    before = Holdings.now()
    server, client = ControlServer(), ControlClient()
    server.handle("echo", lambda body: body)
    outcome(client.call(server.endpoint, "echo", {}, 5))
    client.close()
    server.close()
    assert_nothing_left(before)
