"""The control channel over real sockets."""

import errno
import socket
import struct
import threading
import time
from concurrent.futures import Future

import msgpack
import pytest

from kvconnect import control, frames, messages
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
    with pytest.raises(StaleError, match=r"^too late$"):
        outcome(client.call(server.endpoint, "stale", {}, 5))
    with pytest.raises(ConfigError, match="did you mean 'tcp'"):
        outcome(client.call(server.endpoint, "unknown", {}, 5))
    with pytest.raises(HandshakeError, match=r"^no$"):
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


class Raw:
    """A peer that sends what the test says."""

    def __init__(self, port, greeting=frames._GREETING):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.socket.sendall(greeting)

    def __enter__(self):
        assert self.read(len(frames._GREETING)) == frames._GREETING
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(struct.pack("<I", len(data)) + data)

    def receive(self):
        return self.read(*struct.unpack("<I", self.read(4)))

    def read(self, size):
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            assert piece, "the server closed the connection"
            data += piece
        return data

    def is_closed(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


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
    with Raw(server.port) as raw:
        raw.send(data)
        raw.send(messages.pack_request(7, "echo", {"ok": 1}))
        assert messages.unpack(raw.receive())["id"] == 7, "a malformed request was answered"
    assert server.malformed == 1


@pytest.mark.parametrize("versions", [[2, 3], [0, 0]])
def test_versions_that_do_not_meet_are_named(server, versions):
    with Raw(server.port) as raw:
        raw.send(msgpack.packb({"p": versions, "id": 1, "op": "echo", "body": {}}))
        error = messages.error_of(messages.unpack(raw.receive()))
    assert isinstance(error, HandshakeError)
    assert "protocol versions differ" in str(error)


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


def test_what_there_are_no_descriptors_for_fails_its_call_and_no_other(server, client, monkeypatch):
    assert outcome(client.call(server.endpoint, "echo", {"n": 1}, 5)) == {"n": 1}

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(frames.socket, "socket", refuse)
    with pytest.raises(BrokenError, match="open files"):
        outcome(client.call("127.0.0.2:9", "echo", {}, 5))
    assert outcome(client.call(server.endpoint, "echo", {"n": 2}, 5)) == {"n": 2}


def test_a_call_that_cannot_be_sent_ends_at_its_deadline_at_the_latest(server, client, monkeypatch):
    monkeypatch.setattr(client, "_connect", lambda *_: {}["missing"])
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


# -- frames ---------------------------------------------------------------------------------


def test_a_frame_over_the_limit_ends_its_connection_and_no_other(server, client):
    with Raw(server.port) as raw:
        raw.socket.sendall(struct.pack("<I", messages.MAX_MESSAGE_BYTES + 1) + b"x" * 100)
        assert raw.is_closed()
    assert outcome(client.call(server.endpoint, "echo", {"n": 1}, 5)) == {"n": 1}


def test_whoever_speaks_another_protocol_is_disconnected(server, client):
    raw = Raw(server.port, b"GET / HTTP/1.1\r\n\r\n")
    raw.read(len(frames._GREETING))
    assert raw.is_closed()
    raw.socket.close()
    assert outcome(client.call(server.endpoint, "echo", {"n": 1}, 5)) == {"n": 1}


def test_a_server_that_speaks_another_protocol_is_named(client):
    with socket.create_server(("127.0.0.1", 0)) as other:
        call = client.call(f"127.0.0.1:{other.getsockname()[1]}", "echo", {}, 5)
        connection, _ = other.accept()
        connection.sendall(b"SSH-2.0-other\r\n")
        with pytest.raises(BrokenError, match="does not speak the control protocol"):
            outcome(call)
        connection.close()


def test_frames_may_arrive_in_pieces_and_several_at_once(server):
    requests = [messages.pack_request(n, "echo", {"n": n}) for n in range(5)]
    data = b"".join(struct.pack("<I", len(request)) + request for request in requests)
    raw = Raw(server.port, b"")
    for start in range(0, len(frames._GREETING + data), 7):
        raw.socket.sendall((frames._GREETING + data)[start : start + 7])
        threading.Event().wait(0.001)
    with raw:
        assert [messages.unpack(raw.receive())["body"] for _ in requests] == [{"n": n} for n in range(5)]


def test_large_messages_pass_both_ways_beside_small_ones(server, client):
    big = {"data": b"x" * (messages.MAX_MESSAGE_BYTES - 100)}
    calls = [client.call(server.endpoint, "echo", body, 20) for body in (big, {"n": 1}, big, {"n": 2})]
    assert [outcome(call, 20) for call in calls] == [big, {"n": 1}, big, {"n": 2}]


def test_nothing_is_asked_of_a_host_that_has_not_greeted(client):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        call = client.call(f"127.0.0.1:{silent.getsockname()[1]}", "echo", {}, 0.3)
        connection, _ = silent.accept()
        with pytest.raises(DeadlineError):
            outcome(call)
        data = b""
        while piece := connection.recv(4096):
            data += piece
        assert data == frames._GREETING
        connection.close()


def test_a_peer_that_does_not_read_is_told_no_more_than_so_much(monkeypatch):
    monkeypatch.setattr(frames, "_MOST_WAITING_BYTES", 1 << 20)
    client = ControlClient()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"127.0.0.1:{deaf.getsockname()[1]}"
        first = client.call(endpoint, "echo", {}, 10)
        connection, _ = deaf.accept()
        connection.sendall(frames._GREETING)
        calls = [client.call(endpoint, "echo", {"x": b"x" * (1 << 20)}, 10) for _ in range(40)]
        with pytest.raises(BrokenError, match="takes no more"):
            outcome(calls[-1])
        assert not first.done()
        connection.close()
        for call in (first, *calls):
            with pytest.raises(BrokenError):
                outcome(call)
    client.close()


def test_a_server_out_of_descriptors_accepts_when_there_are_some(server, client, monkeypatch):
    monkeypatch.setattr(control, "_ACCEPT_AGAIN_S", 0.05)
    real, refusals = server._socket, []

    class Full:
        fileno = staticmethod(real.fileno)

        def accept(self):
            if len(refusals) < 3:
                refusals.append(1)
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

    server._socket = Full()
    assert outcome(client.call(server.endpoint, "echo", {"n": 1}, 5)) == {"n": 1}
    assert len(refusals) == 3


def test_what_was_sent_before_closing_arrives(server):
    seen, over = [], threading.Event()
    server.handle("note", lambda body: seen.append(len(body["x"])) or {})
    server.handle("last", lambda _: over.set() or {})
    client = ControlClient()
    outcome(client.call(server.endpoint, "note", {"x": b""}, 5))
    client.call(server.endpoint, "note", {"x": b"x" * (8 << 20)}, 5)
    client.call(server.endpoint, "last", {}, 5)
    client.close()
    assert over.wait(5)
    assert seen == [0, 8 << 20]
