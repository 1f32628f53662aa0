"""What a hostile user tries, and a legitimate pair that hands over before, meanwhile and afterwards."""

import contextlib
import dataclasses
import socket
import struct
import subprocess
import sys
import threading

import pytest
import zmq

from kvconnect import control, sums
from kvconnect.buffers import integrity
from kvconnect.buffers.base import Miss, Want
from kvconnect.buffers.hello import Hello
from kvconnect.config import Backend
from kvconnect.control import ControlServer
from kvconnect.errors import HandshakeError, KVConnectError
from kvconnect.keys import Keys
from kvconnect.pipes import flows
from kvconnect.pipes.tcp_listener import GREETING, Listener
from kvconnect.pipes.tcp_meeting import Serving
from tests.access.hostile import Stranger, address, connections, hung_up, stranger, traffic
from tests.buffers.engines import engines, eventually, group, is_miss, key
from tests.buffers.test_access import own_address, secret_file

ME = Hello("evil", "0" * 16, {"model": "m", "dtype": "bfloat16"}, 1, "consumer", 30.0).to_wire()
_NOBODYS = {"grant": "g" * 16, "taker": "t", "entry": "0" * 16, "generation": 1, "blocks": "00", "part": 0}
_MIB = 1 << 20


def lookup(number):
    return {"namespace": "ns", "digest": key(number).digest.hex(), "length": 32, "taker": "t"}


@pytest.fixture
def key_file(tmp_path):
    return secret_file(tmp_path / "shared.key")


@pytest.fixture
def pair():
    """Two engines without keys, and their hand-overs."""
    with engines(pipe="tcp", lease_s=5.0) as (p, d), traffic(p, d) as going:
        yield p, d, going


def scheduler(engine):
    return address(engine.end._lender._at)


# -- without the key -------------------------------------------------------------------------


def curves(kind, key_file, tmp_path):
    own = Keys.from_shared(key_file, "k")
    public, secret = zmq.curve_keypair()
    if kind == "no key":
        return None
    if kind == "a key of its own":  # and it has learnt the server's public key
        return own.server.public, public, secret
    other = Keys.from_shared(secret_file(tmp_path / "other.key", "the secret of another group"), "k")
    return other.server.public, other.client.public, other.client.secret


@pytest.mark.parametrize("kind", ["no key", "a key of its own", "another group's key"])
def test_who_has_not_the_key_is_not_even_told_no_and_disturbs_nobody(key_file, tmp_path, kind):
    with engines(key_file=key_file, pipe="tcp") as (p, d), traffic(p, d) as pair:
        p.end.offer(key(1), ((5,),), label=None, asked=True)
        calls = [("hello", ME), ("match", lookup(1)), ("claim", _NOBODYS), ("list", {}), ("insert", {}), ("take", {})]
        calls += [("pipe.open", {}), ("pipe.sum", {"pipe": "q", "groups": [bytes(4)], "device": "cpu"})]
        with contextlib.ExitStack() as stack:
            for engine_at in (p.end._lender._at, p.workers[0].describe()["endpoint"], d.workers[0]._server.endpoint):
                for _ in range(3):
                    intruder = stack.enter_context(stranger(engine_at, curves(kind, key_file, tmp_path)))
                    for op, body in calls:
                        intruder.send(op, body)
                assert intruder.hear(0.5) is None
            pair.goes_on()
        assert p.end._lender._server.malformed == 0, "somebody was let in"
    assert p.end.stats()["refused"] == 0


def test_the_same_stranger_is_answered_where_no_key_is_asked_for(pair):
    """Or the test above would prove nothing."""
    p, _, _ = pair
    p.end.offer(key(1), ((5,),), label=None, asked=True)
    with stranger(p.end._lender._at) as one:
        assert "ticket" in one.ask("match", lookup(1))
        assert one.ask("hello", ME)["engine"] == "P"


# -- without a key, but as a user that knows nothing of others ----------------------------------


def test_tickets_and_grants_that_were_made_up_get_nothing_and_end_nothing(pair):
    p, _, going = pair
    real = p.end.offer(key(1), ((5,),), label=None, asked=True)
    known = {name: real[name] for name in ("entry", "generation")}
    before = p.end.stats()["taken"]
    with stranger(p.end._lender._at) as one:
        for made_up in ({}, {**known, "generation": 2}, {**known, "blocks": "00" * 16}, {"entry": real["entry"]}):
            assert one.ask("claim", {**_NOBODYS, **made_up}) == {"state": "gone"}
            assert one.ask("release", {**_NOBODYS, **made_up}) == {"answer": "stale"}
        assert one.ask("renew", {"grants": ["g", "h"], "done": ["g"]})["gone"] == ["g", "h"]
        for _ in range(50):
            assert one.ask("abandon", {"grants": ["g", ""] * 100}) == {}
    going.goes_on()
    with stranger(p.end._lender._at) as one:
        assert "ticket" in one.ask("match", lookup(1)), "the entry is still there"
    assert p.end.stats()["taken"] - before < 1000
    assert p.end.stats()["stale"] >= 4


@pytest.mark.parametrize("op", ["list", "insert", "take", "drop_select", "", "__class__", "pipe.", None, 5, ["claim"]])
def test_there_is_no_operation_that_lists_inserts_or_takes(pair, op):
    p, _, _ = pair
    for at in (p.end._lender._at, p.workers[0].describe()["endpoint"]):
        with stranger(at) as one:
            assert one.ask(op, {}) == "KVConnectError"


def test_a_pipe_that_is_not_ones_own_can_be_neither_used_nor_ended(pair):
    p, d, going = pair
    worker = p.workers[0]
    [own] = worker._pipes._served
    assert len(own) >= 16, "64 random bits at least"
    guesses = [own[:-1], own[:-1] + ("0" if own[-1] != "0" else "1"), own.upper() + "x", own + "/serves", "x", "0" * 16]
    with stranger(worker.describe()["endpoint"]) as one:
        for pipe in guesses:
            assert one.ask("pipe.ping", {"pipe": f"{pipe}/serves"})["known"] is False
            assert one.ask("pipe.call", {"pipe": f"{pipe}/serves", "op": "blocks.read", "body": {}}) == "BrokenError"
            assert one.ask("pipe.ready", {"pipe": pipe}) == "BrokenError"
            assert one.ask("pipe.sum", {"pipe": pipe, "groups": [bytes(4)], "device": "cpu"}) == "BrokenError"
            assert one.ask("pipe.close", {"pipe": pipe}) == {}
        opening = {"pipe": own, "name": "tcp", "message": {"tcp": 2, "checksum": True}, "hello": ME}
        assert one.ask("pipe.open", {**opening, "worker": d.workers[0].describe()}) == "HandshakeError"
    going.goes_on()
    assert list(worker._pipes._served) == [own], "the pair has the very pipe that it had"


def opened(at, d, pipe="mine"):
    """Open a pipe as any client may that no key is asked of."""
    one = Stranger(at)
    opening = {"pipe": pipe, "name": "tcp", "message": {"tcp": 2, "checksum": True, "tls": False}, "hello": ME}
    assert "message" in one.ask("pipe.open", {**opening, "worker": d.workers[0].describe()})
    return one


def test_who_asks_for_sums_without_end_is_refused_and_forgotten_with_its_pipe(pair, monkeypatch):
    p, d, going = pair
    monkeypatch.setattr(integrity, "_MAX_DUE", 10_000)
    real, gate, begun = sums.of_blocks, threading.Event(), []
    monkeypatch.setattr(sums, "of_blocks", lambda *args: begun.append(1) or (gate.wait(8) and real(*args)))
    one = opened(p.workers[0].describe()["endpoint"], d)
    try:
        most = [list(range(64))]
        for _ in range(200):
            one.send("pipe.sum", {"pipe": "mine", "groups": flows.pack(most), "device": "cpu"})
        refused = [one.hear() for _ in range(200 - 10_000 // 128)]
        assert {answer["error"] for answer in refused} == {"BusyError"}
        assert len(begun) == 1, "one of a pipe's at a time"
        going.goes_on()
        assert one.ask("pipe.sum", {"pipe": "mine", "groups": [bytes(4 * 65)], "device": "cpu"}) == "HandshakeError"
        one.send("pipe.close", {"pipe": "mine"})
        assert one.hear()["body"] == {}
        gate.set()
        answers = [one.hear() for _ in range(10_000 // 128)]
        assert [answer.get("error") for answer in answers[1:]] == ["BrokenError"] * (len(answers) - 1)
        assert len(begun) == 1, "nothing is added up for a pipe that is closed"
        assert eventually(lambda: not p.workers[0]._integrity._due)
    finally:
        gate.set()
        one.close()


# -- tokens of data connections -------------------------------------------------------------------


@pytest.fixture
def tokens(monkeypatch):
    """The one-time tokens that serving ends have given out, as one learns them who has tapped the wire."""
    seen, real = [], Listener.expect

    def expect(self, arrival):
        seen.append((self.port, real(self, arrival)))
        return seen[-1][1]

    monkeypatch.setattr(Listener, "expect", expect)
    return seen


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"], ids=["this host", "another address"])
def test_a_captured_token_is_worth_nothing_once_used_and_nothing_after_the_close(tokens, source):
    with engines(pipe="tcp") as (p, d), traffic(p, d) as going:
        assert tokens
        for _ in range(3):
            for port, token in tokens:
                with socket.create_connection(("127.0.0.1", port), 5, (source, 0)) as sock:
                    sock.sendall(GREETING + token)
                    assert hung_up(sock)
        going.goes_on()
        [pipe] = p.workers[0]._pipes._served
        count = len(tokens)
        one = opened(p.workers[0].describe()["endpoint"], d)  # its tokens are not used ...
        assert eventually(lambda: len(tokens) > count)
        assert one.ask("pipe.close", {"pipe": "mine"}) == {}  # ... before its pipe is closed
        one.close()
        eventually(lambda: "mine" not in p.workers[0]._pipes._served)
        for port, token in tokens[count:]:
            sock = socket.create_connection(("127.0.0.1", port), 5, (source, 0))
            with sock:
                sock.sendall(GREETING + token)
                assert hung_up(sock)
        going.goes_on()
        assert list(p.workers[0]._pipes._served) == [pipe]


# -- addresses that lead elsewhere ------------------------------------------------------------------


@contextlib.contextmanager
def canary():
    """Somebody at an address of this host that is not loopback's, who must not hear anything."""
    with socket.create_server((own_address(), 0)) as listening:
        listening.settimeout(0.3)
        heard = []
        yield f"{listening.getsockname()[0]}:{listening.getsockname()[1]}", heard
        with contextlib.suppress(TimeoutError):
            while True:
                sock, _ = listening.accept()
                heard.append(sock)
                sock.close()


def test_no_ticket_leads_an_engine_to_an_address_that_nobody_allowed():
    alone = {"content_lookup": False, "pipe": "tcp"}
    with canary() as (elsewhere, heard), engines(**alone) as (p, d), traffic(p, d) as going:
        for number, at in enumerate((elsewhere, elsewhere.replace(":", "::"), f"x@{elsewhere}", f"[{elsewhere}]:80")):
            answer = d.find(f"s{number}", Want(key(1), ticket={**p.offer(1), "at": at}))
            assert isinstance(answer, Miss), answer
        going.goes_on()
    assert heard == []


def test_nor_does_a_peer_that_asks_for_a_pipe(pair):
    p, d, _ = pair
    with canary() as (elsewhere, heard), stranger(p.workers[0].describe()["endpoint"]) as one:
        opening = {"pipe": "q", "name": "tcp", "message": {"tcp": 2, "checksum": True, "tls": False}, "hello": ME}
        worker = {**d.workers[0].describe(), "endpoint": elsewhere}
        assert one.ask("pipe.open", {**opening, "worker": worker}) == "ConfigError"
    assert heard == []


@pytest.mark.parametrize("allowed", [False, True])
def test_nor_does_a_peers_offer_of_a_data_connection(monkeypatch, allowed):
    """Without keys, a peer on an allowed address is nobody whose word sends us to others."""
    allow = {"allowed_peers": (own_address(),)} if allowed else {}
    with canary() as (elsewhere, heard), engines({}, allow, pipe="tcp", transfer_timeout_s=1.0) as (p, d):
        host, port = address(elsewhere)
        real = Serving.__init__

        def lead_away(self, loop, spec, *rest):
            away = dataclasses.replace(spec, exchange=lambda mine: spec.exchange({**mine, "host": host, "port": port}))
            real(self, loop, away, *rest)

        monkeypatch.setattr(Serving, "__init__", lead_away)
        claim = d.find("r", Want(key(1), ticket=p.offer(1)))
        with pytest.raises(KVConnectError, match=None if allowed else "allowed_peers"):
            d.read(claim).wait(8)
    assert bool(heard) == allowed


def test_with_a_key_a_peers_word_is_good_and_data_may_have_an_address_of_its_own(key_file):
    host = own_address()
    tcp = Backend("tcp", {"bind_host": host})
    with engines(key_file=key_file, pipe=tcp) as (p, d), traffic(p, d) as going:
        going.goes_on()


def test_an_engine_that_nobody_allowed_is_not_looked_up_at_either():
    """From an address that is not allow-listed: D does not even greet it."""
    host = own_address()
    with engines({"bind_host": host, "insecure": True, "group": group()}, pipe="tcp") as (p, d):
        assert is_miss(d.find("r", Want(key(1), ticket=p.offer(1))), "unreachable")
        assert p.end.stats()["taken"] == 0


# -- lines in logs ------------------------------------------------------------------------------------

_FORGED = "E\n2026-01-01 CRITICAL all is lost\x1b[2J"


def test_no_stranger_writes_lines_into_logs_of_either_side(caplog):
    caplog.set_level("DEBUG")
    with engines(pipe="tcp", content_lookup=False) as (p, d):
        with stranger(p.end._lender._at) as one:
            assert one.ask("hello", {**ME, "engine": _FORGED}) == "HandshakeError"
            assert one.ask("hello", {**ME, "fingerprint": {_FORGED: _FORGED}}) == "HandshakeError"
            assert one.ask("match", {**lookup(1), "label": _FORGED}) == "HandshakeError"
        server, shown = ControlServer(), []
        server.handle("hello", lambda _: (_ for _ in ()).throw(HandshakeError(_FORGED)))
        for number, lie in enumerate(({"engine": _FORGED}, {"at": _FORGED}, {"at": server.endpoint})):
            shown.append(d.find(f"r{number}", Want(key(1), ticket={**p.offer(1), **lie})).detail)
        server.close()
    lines = [record.getMessage() for record in caplog.records] + shown
    assert any("CRITICAL" in line for line in lines)
    assert [line for line in lines if not line.isprintable()] == []


# -- too much, too long, too slow ---------------------------------------------------------------------

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
_READY = b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"


def long_frame(size):
    return b"\x02" + struct.pack(">Q", size)


def test_a_message_that_is_too_long_ends_its_own_connection(pair):
    p, _, going = pair
    for at in (scheduler(p), address(p.workers[0].describe()["endpoint"])):
        with connections(at, 8, _GREETING + _READY + long_frame(17 * _MIB)) as socks:
            assert all(map(hung_up, socks))
        with stranger(f"{at[0]}:{at[1]}") as one:
            one.socket.send(b"\xdd\x7f\xff\xff\xff" + bytes(15 * _MIB))  # a list, it says, of two thousand million
            assert one.ask("nothing", {}) == "KVConnectError"
    going.goes_on()


def test_requests_that_are_not_taken_wait_at_their_sender():
    """And not in the engine's memory, a thousand of 16 MiB for each connection."""
    server, busy = ControlServer(), threading.Event()
    server.handle("wait", lambda _: {"waited": busy.wait(20)})
    try:
        with stranger(server.endpoint) as one, connections(address(server.endpoint), 1, _GREETING + _READY) as [sock]:
            one.send("wait", {})
            sock.settimeout(1.0)
            sent, part = 0, long_frame(_MIB) + bytes(_MIB)
            with contextlib.suppress(TimeoutError):
                while sent < 400:
                    sock.sendall(part)
                    sent += 1
            busy.set()
            assert one.hear()["body"] == {"waited": True}
        assert sent < 100, f"{sent} MiB were taken in advance"
    finally:
        busy.set()
        server.close()


@pytest.mark.parametrize("said", [b"", _GREETING[:30], _GREETING], ids=["nothing", "half a greeting", "a greeting"])
def test_slow_strangers_at_the_control_port_are_hung_up_on_and_keep_nobody_out(monkeypatch, said):
    monkeypatch.setattr(control, "_HANDSHAKE_MS", 600)
    with engines(pipe="tcp") as (p, d), traffic(p, d) as going, connections(scheduler(p), 200, said) as socks:
        going.goes_on()
        with stranger(p.end._lender._at) as one:
            assert one.ask("hello", ME)["engine"] == "P"
        assert all(map(hung_up, socks))


def test_a_client_that_falls_silent_is_hung_up_on_in_the_time_that_it_said_itself(pair):
    p, _, _ = pair
    said = b"\x04PING" + (5).to_bytes(2, "big")  # half a second
    ping = bytes([4, len(said)]) + said
    with connections(scheduler(p), 5, _GREETING + _READY + ping) as socks:
        assert all(map(hung_up, socks))


def test_a_request_that_comes_by_the_byte_ends_with_its_connection(monkeypatch):
    monkeypatch.setattr(control, "_SERVER_HEARTBEAT_MS", 100)
    monkeypatch.setattr(control, "_HEARTBEAT_LIMIT_MS", 500)
    begun, pause, ended = _GREETING + _READY + long_frame(15 * _MIB), threading.Event(), set()
    with engines(pipe="tcp") as (p, d), traffic(p, d) as going, connections(scheduler(p), 20, begun) as socks:
        for _ in range(60):
            for sock in set(socks) - ended:
                try:
                    sock.sendall(b"x")
                except OSError:
                    ended.add(sock)
            pause.wait(0.05)
        assert len(ended) == len(socks)
        going.goes_on()


@pytest.mark.parametrize("count", [100, 300])
def test_slow_strangers_at_the_data_port_keep_nobody_out(tokens, count):
    with engines(pipe="tcp") as (p, d), traffic(p, d), contextlib.ExitStack() as stack:
        socks = stack.enter_context(connections(("127.0.0.1", tokens[0][0]), count, GREETING[:4]))
        with engines(pipe="tcp") as (other_p, other_d), traffic(other_p, other_d):
            assert len({port for port, _ in tokens}) == 1, "newcomers at the same port"
        assert all(map(hung_up, socks))


_FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from kvconnect import control
control._HANDSHAKE_MS = 2000
server = control.ControlServer()
server.handle("ping", lambda body: body)
print(server.port, flush=True)
sys.stdin.read()
"""


def test_a_process_whose_descriptors_strangers_use_up_goes_on_with_its_peers_and_recovers():
    command = [sys.executable, "-c", _FEW_DESCRIPTORS]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(process.stdin.close)
        port = int(process.stdout.readline())
        known = stack.enter_context(stranger(f"127.0.0.1:{port}"))
        assert known.ask("ping", {"n": 1}) == {"n": 1}
        with connections(("127.0.0.1", port), 200):
            assert known.ask("ping", {"n": 2}) == {"n": 2}
        with stranger(f"127.0.0.1:{port}") as late:
            assert late.ask("ping", {"n": 3}, 10.0) == {"n": 3}
