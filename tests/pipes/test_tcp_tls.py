"""The TCP pipe with certificates: the laws of the contract over TLS, and who is not let in."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trustme

from kvconnect.errors import BrokenError, ConfigError, DeadlineError, HandshakeError, KVConnectError
from kvconnect.pipes import tcp_frames, wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.pipes.tcp_frames import READS
from kvconnect.pipes.tcp_handshake import _WELCOME as WELCOME
from kvconnect.pipes.tcp_listener import GREETING
from kvconnect.pipes.tcp_meeting import TcpOptions
from kvconnect.testing.channels import MemoryExchange, memory_channels
from kvconnect.testing.layouts import clone, naive_stream, noisy_memory, separate_layers
from kvconnect.testing.peers import PipePair, open_pair, spawn
from kvconnect.testing.pipe_tests import PipeTests

LIMIT_S = 10.0
YESTERDAY = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)

Tls = dict[str, str]


def write(folder: Path, ca: trustme.CA, signer: trustme.CA | None = None, **about: Any) -> Tls:
    """Make a certificate; return the pipe's option ``tls``."""
    folder.mkdir(exist_ok=True)
    tls = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}
    issued = (signer or ca).issue_cert("of-no-host.invalid", **about)
    Path(tls["cert"]).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(tls["key"])
    ca.cert_pem.write_to_path(tls["ca"])
    return tls


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return write(tmp_path_factory.mktemp("tls"), authority)


class TestTcpPipeOverTls(PipeTests):
    pipe_class = TcpPipe

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def secured(cls, tls: Tls) -> None:
        cls.options: ClassVar[Mapping[str, Any]] = {"tls": tls}


@pytest.fixture
def pair(tls: Tls) -> Iterator[PipePair]:
    one = open_pair(TcpPipe, {"tls": tls})
    yield one
    one.close()


class Meeting:
    """Two ends with options of their own, opened in threads; what each came to."""

    def __init__(self, asks: Mapping[str, Any], serves: Mapping[str, Any], timeout_s: float = LIMIT_S) -> None:
        exchange = MemoryExchange(LIMIT_S)

        def serve() -> TcpPipe:
            exchange.await_asked()
            return TcpPipe.open(PipeSpec("serves", exchange.serve, timeout_s=timeout_s, options=serves))

        serving = spawn(serve)
        asking = spawn(lambda: TcpPipe.open(PipeSpec("asks", exchange.ask, timeout_s=timeout_s, options=asks)))
        self.asks, self.serves = (end.exception(LIMIT_S) or end.result() for end in (asking, serving))

    def close(self) -> None:
        for end in (self.asks, self.serves):
            if isinstance(end, TcpPipe):
                end.abort()


class Serving:
    """A serving end that raw sockets talk to."""

    def __init__(self, tls: Tls, timeout_s: float = LIMIT_S) -> None:
        self.offer: dict[str, Any] = {}
        self._open = ExitStack()
        self.tls = tls

        def exchange(mine: Mapping[str, Any]) -> Mapping[str, Any]:
            self.offer = dict(mine)
            return {"tcp": 2, "checksum": False, "tls": True}

        self.pipe = TcpPipe.open(PipeSpec("serves", exchange, timeout_s=timeout_s, options={"tls": tls}))
        self._open.callback(self.pipe.abort)

    def connect(self, kind: str = "token") -> socket.socket:
        """Come with a token, no more."""
        address = (self.offer["host"], self.offer["port"])
        sock = self._open.enter_context(socket.create_connection(address, LIMIT_S))
        sock.sendall(GREETING + self.offer[kind])
        return sock

    def secured(self, context: ssl.SSLContext, kind: str = "token") -> ssl.SSLSocket:
        """Come with a token and do a handshake."""
        return self._open.enter_context(context.wrap_socket(self.connect(kind)))

    def refused(self) -> KVConnectError:
        """Return what the first receive says."""
        with pytest.raises(KVConnectError) as caught:
            self.pipe.recv_tensor()
        return caught.value

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def serving(tls: Tls) -> Iterator[Serving]:
    one = Serving(tls)
    yield one
    one.close()


def client(ca: str, cert: str = "", key: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca)
    if cert:
        context.load_cert_chain(cert, key)
    return context


def all_that_comes(sock: socket.socket) -> bytes:
    """What the other side still says until it ends the connection."""
    sock.settimeout(LIMIT_S)
    data = b""
    with suppress(ConnectionError, ssl.SSLError):
        while part := sock.recv(65536):
            data += part
    return data


class Relay:
    """Forwards one connection after another to an address, and may change or keep what passes."""

    def __init__(self, there: tuple[str, int], change: Callable[[bytes], bytes] = bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._there, self.change, self.seen = there, change, bytearray()
        self._socks: list[socket.socket] = [self._listener]
        spawn(self._accept)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._there)
                self._socks += [near, far]
                spawn(lambda near=near, far=far: self._forward(near, far))
                spawn(lambda near=near, far=far: self._forward(far, near))

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                self.seen += part
                target.sendall(self.change(part))
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Relayed:
    """A pair of ends with a relay in between."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        exchange = MemoryExchange(LIMIT_S)
        relays: list[Relay] = []

        def offer(mine: Mapping[str, Any]) -> Mapping[str, Any]:
            relays.append(Relay((mine["host"], mine["port"])))
            return exchange.serve(dict(mine) | {"port": relays[0].port})

        def serve() -> TcpPipe:
            exchange.await_asked()
            return TcpPipe.open(PipeSpec("serves", offer, timeout_s=LIMIT_S, options=options))

        serving = spawn(serve)
        self.here = TcpPipe.open(PipeSpec("asks", exchange.ask, timeout_s=LIMIT_S, options=options))
        self.there = serving.result(LIMIT_S)
        self.relay = relays[0]

    def close(self) -> None:
        self.here.abort()
        self.there.abort()
        self.relay.close()


# -- what travels ---------------------------------------------------------------------------


@pytest.mark.parametrize("secured", [True, False])
def test_neither_tensors_nor_blocks_can_be_read_on_the_way_with_tls_only(tls: Tls, secured: bool) -> None:
    mine, theirs = (noisy_memory(separate_layers(2, 8, 2, 4096), seed) for seed in (1, 2))
    tensor = torch.arange(4096)
    with closing(Relayed({"tls": tls} if secured else {})) as pipes:
        for pipe, local in ((pipes.here, mine), (pipes.there, theirs)):
            pipe.attach(local, local.layout, memory_channels()[0])
        pipes.here.send_tensor(tensor)
        assert torch.equal(pipes.there.recv_tensor(), tensor)
        pipes.here.read_blocks([[3]], [[4]]).wait(LIMIT_S)
        assert torch.equal(naive_stream(mine, [[4]]), naive_stream(theirs, [[3]]))
        seen = bytes(pipes.relay.seen)
    for secret in (tensor[:64].numpy().tobytes(), naive_stream(theirs, [[3]])[:64].numpy().tobytes()):
        assert (secret in seen) is not secured


def test_damage_on_the_way_breaks_the_pipe_and_no_tensor_comes_of_it(tls: Tls) -> None:
    with closing(Relayed({"tls": tls})) as pipes:
        pipes.here.send_tensor(None)
        assert pipes.there.recv_tensor() is None
        pipes.relay.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        pipes.here.send_tensor(torch.arange(100))
        for _ in range(2):
            with pytest.raises(BrokenError, match=r"(?i)bad.record.mac"):
                pipes.there.recv_tensor()


def test_damage_on_the_way_fails_a_read_and_the_blocks_stay_as_they_were(tls: Tls) -> None:
    mine, theirs = (noisy_memory(separate_layers(2, 8, 2, 64), seed) for seed in (1, 2))
    before = clone(mine)
    with closing(Relayed({"tls": tls})) as pipes:
        for pipe, local in ((pipes.here, mine), (pipes.there, theirs)):
            pipe.attach(local, local.layout, memory_channels()[0])
        pipes.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
        before = clone(mine)
        pipes.relay.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        transfer = pipes.here.read_blocks([[2]], [[2]])
        with pytest.raises(BrokenError):
            transfer.wait(LIMIT_S)
    assert torch.equal(naive_stream(mine, [list(range(8))]), naive_stream(before, [list(range(8))]))


def test_checksums_may_be_had_besides(tls: Tls) -> None:
    mine, theirs = (noisy_memory(separate_layers(2, 8, 2, 4096), seed) for seed in (1, 2))
    with closing(open_pair(TcpPipe, {"tls": tls, "checksum": True})) as pair:
        for pipe, local in ((pair.here, mine), (pair.there, theirs)):
            pipe.attach(local, local.layout, memory_channels()[0])
        sent = torch.arange(1 << 18)
        sending = spawn(lambda: pair.here.send_tensor(sent))
        assert torch.equal(pair.there.recv_tensor(), sent)
        sending.result(LIMIT_S)
        pair.here.write_blocks([[1, 2]], [[3, 4]]).wait(LIMIT_S)
    assert torch.equal(naive_stream(mine, [[1, 2]]), naive_stream(theirs, [[3, 4]]))


@pytest.mark.parametrize(
    "options",
    [{"chunk_bytes": 4096}, {"socket_buffer_bytes": 8192}],
    ids=["many frames come at once", "the kernel takes little at once"],
)
def test_blocks_arrive_to_their_last_byte_though_nothing_follows_them(tls: Tls, options: dict[str, Any]) -> None:
    mine, theirs = (noisy_memory(separate_layers(2, 8, 2, 4096), seed) for seed in (1, 2))
    with closing(open_pair(TcpPipe, {"tls": tls} | options)) as pair:
        for pipe, local in ((pair.here, mine), (pair.there, theirs)):
            pipe.attach(local, local.layout, memory_channels()[0])
        pair.here.read_blocks([[*range(8)]], [[*range(8)]]).wait(LIMIT_S)
    assert torch.equal(naive_stream(mine, [[*range(8)]]), naive_stream(theirs, [[*range(8)]]))


def test_both_directions_at_once_lose_nothing(pair: PipePair) -> None:
    tensors = [torch.full((3 << 20,), value, dtype=torch.uint8) for value in range(8)]

    def send_all(pipe: TcpPipe) -> None:
        for tensor in tensors:
            pipe.send_tensor(tensor)

    sending = [spawn(lambda end=end: send_all(end)) for end in (pair.here, pair.there)]
    for wanted in tensors:
        for end in (pair.here, pair.there):
            assert torch.equal(end.recv_tensor(), wanted)
    for one in sending:
        one.result(LIMIT_S)


def test_what_was_sent_before_a_close_arrives_though_the_peer_fetches_it_late(pair: PipePair) -> None:
    sent = torch.arange(1 << 15)
    pair.here.send_tensor(sent)
    pair.here.close()
    assert torch.equal(pair.there.recv_tensor(), sent)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, True), ({"tls": {}}, False), ({"tls": {}, "checksum": True}, True), ({"checksum": False}, False)],
)
def test_checksums_are_for_connections_without_tls_unless_they_are_asked_for(
    options: Mapping[str, Any], wanted: bool
) -> None:
    assert TcpOptions.parse(options).wants_checksum is wanted


# -- who does not meet ------------------------------------------------------------------------


@pytest.mark.parametrize("secured", ["asks", "serves"])
def test_one_end_with_and_one_without_tls_do_not_meet_and_both_say_why(tls: Tls, secured: str) -> None:
    options: list[dict[str, Any]] = [{}, {"tls": tls}]
    with closing(Meeting(*(options if secured == "serves" else options[::-1]))) as meeting:
        for end, ours in ((meeting.asks, secured == "asks"), (meeting.serves, secured == "serves")):
            assert isinstance(end, HandshakeError)
            assert ("ours is a tcp pipe with" if ours else "the peer is a tcp pipe with") in str(end)
            assert "pipe.tls" in str(end)


BAD: dict[str, Callable[[Path, trustme.CA], Tls]] = {
    "unable to get local issuer certificate": lambda folder, ca: write(folder, ca, signer=trustme.CA()),
    "certificate has expired": lambda folder, ca: write(
        folder, ca, not_before=YESTERDAY - dt.timedelta(days=1), not_after=YESTERDAY
    ),
}


@pytest.mark.parametrize("side", ["asks", "serves"])
@pytest.mark.parametrize("reason", BAD)
def test_a_certificate_that_is_not_good_is_refused_by_name_before_anything_is_sent(
    tls: Tls, authority: trustme.CA, tmp_path: Path, side: str, reason: str
) -> None:
    bad = BAD[reason](tmp_path, authority)
    asks, serves = (bad, tls) if side == "asks" else (tls, bad)
    with closing(Meeting({"tls": asks}, {"tls": serves})) as meeting:
        assert isinstance(meeting.serves, TcpPipe), "a serving end does not wait in its opening"
        with pytest.raises(HandshakeError) as caught:
            meeting.serves.recv_tensor()
        refuses, refused = (caught.value, meeting.asks) if side == "asks" else (meeting.asks, caught.value)
    assert isinstance(refuses, HandshakeError)
    assert f"the peer's certificate is refused: {reason}" in str(refuses)
    assert isinstance(refused, HandshakeError)
    assert "the peer refuses our certificate" in str(refused)
    assert "pipe.tls.cert" in str(refused)


def test_a_certificate_that_was_renewed_is_used_from_the_next_pipe_on(authority: trustme.CA, tmp_path: Path) -> None:
    options = {"tls": BAD["certificate has expired"](tmp_path, authority)}
    with pytest.raises(HandshakeError):
        open_pair(TcpPipe, options)
    write(tmp_path, authority)
    with closing(open_pair(TcpPipe, options)) as pair:
        pair.here.send_tensor(None)
        assert pair.there.recv_tensor() is None


def _absent(tls: Tls, name: str) -> tuple[Tls, str]:
    return tls | {name: tls[name] + ".absent"}, f"pipe.tls.{name}: cannot read .*No such file.*PEM"


WRONG: dict[str, Callable[[Tls], tuple[Tls, str]]] = {
    "no cert": lambda tls: _absent(tls, "cert"),
    "no key": lambda tls: _absent(tls, "key"),
    "no ca": lambda tls: _absent(tls, "ca"),
    "not said": lambda tls: ({"cert": tls["cert"], "key": tls["key"]}, r"pipe\.tls\.ca: "),
    "a folder": lambda tls: (tls | {"cert": "/tmp"}, r"pipe\.tls\.cert: .*directory"),  # noqa: S108 - not written to
    "a zero byte": lambda tls: (tls | {"ca": "a\0b"}, r"pipe\.tls\.ca: "),
    "a key in place of a certificate": lambda tls: (tls | {"cert": tls["key"]}, r"pipe\.tls\.cert, pipe\.tls\.key: "),
    "a certificate in place of a key": lambda tls: (tls | {"key": tls["cert"]}, r"pipe\.tls\.cert, pipe\.tls\.key: "),
    "no certificates to trust": lambda tls: (tls | {"ca": tls["key"]}, r"pipe\.tls\.ca: "),
    "another name": lambda tls: (tls | {"certificate": "x"}, r"pipe\.tls\.certificate .*'cert'"),
}


@pytest.mark.parametrize("side", ["asks", "serves"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_the_files_is_named_with_the_cure(tls: Tls, side: Any, wrong: str) -> None:
    options, words = WRONG[wrong](tls)
    with pytest.raises(ConfigError, match=words):
        TcpPipe.open(PipeSpec(side, lambda mine: mine, options={"tls": options}))


def test_an_encrypted_key_is_refused_and_asks_nobody_for_its_password(tls: Tls, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(Path(tls["key"]).read_bytes(), None)
    locked = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    (tmp_path / "key.pem").write_bytes(locked)
    with pytest.raises(ConfigError, match=r"pipe\.tls\.key.*not encrypted"):
        TcpPipe.open(PipeSpec("serves", lambda mine: mine, options={"tls": tls | {"key": str(tmp_path / "key.pem")}}))


# -- strangers ----------------------------------------------------------------------------------


def test_a_client_without_a_certificate_gets_nothing(serving: Serving, tls: Tls) -> None:
    memory = noisy_memory(separate_layers(2, 8, 2, 64), 1)
    serving.pipe.attach(memory, memory.layout, memory_channels()[0])
    for token in ("token", "blocks"):
        sock = serving.secured(client(tls["ca"]), token)
        with suppress(OSError):  # it may have been closed already
            sock.sendall(serving.offer["secret"] + tcp_frames.pack(wire.Kind.READ, READS, 1, payload=bytes(4)))
        assert all_that_comes(sock) == b""
    assert "certificate" in str(serving.refused())
    with pytest.raises((BrokenError, HandshakeError), match="certificate"):
        serving.pipe.read_blocks([[0]], [[0]]).wait(LIMIT_S)


@pytest.mark.parametrize(
    "said", [wire.encode(None)[0] * 10, b"\x16\x03\x01\xff\xff" + bytes(1000), b"GET / HTTP/1.1\r\n\r\n"]
)
def test_a_client_with_a_token_that_does_not_speak_tls_gets_nothing_but_an_alert(serving: Serving, said: bytes) -> None:
    sock = serving.connect()
    sock.sendall(said)
    assert len(all_that_comes(sock)) <= 7, "more than an alert"
    assert isinstance(serving.refused(), HandshakeError)


def test_a_client_of_an_older_tls_is_refused(serving: Serving, tls: Tls) -> None:
    context = client(**tls)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)version"):
        serving.secured(context)
    assert "TLS 1.3" in str(serving.refused())


def test_a_client_with_a_certificate_and_a_token_but_without_the_secret_is_refused(serving: Serving, tls: Tls) -> None:
    sock = serving.secured(client(**tls))
    sock.sendall(bytes(16) + wire.encode(None)[0])
    assert all_that_comes(sock) == b""
    assert "does not know this pipe's secret" in str(serving.refused())


def test_a_client_with_all_of_them_is_let_in(serving: Serving, tls: Tls) -> None:
    sock = serving.secured(client(**tls))
    sock.sendall(serving.offer["secret"] + wire.encode(None)[0])  # what follows at once is not lost
    assert sock.recv(len(WELCOME)) == WELCOME
    assert serving.pipe.recv_tensor() is None


def test_a_request_that_comes_together_with_the_secret_is_answered(serving: Serving, tls: Tls) -> None:
    memory = noisy_memory(separate_layers(2, 8, 2, 64), 1)
    serving.pipe.attach(memory, memory.layout, memory_channels()[0])
    sock = serving.secured(client(**tls), "blocks")
    ids = tcp_frames.pack_ids([[3]])
    sock.sendall(serving.offer["secret"] + tcp_frames.pack(wire.Kind.READ, READS, 1, payload=ids))
    wanted = naive_stream(memory, [[3]]).numpy().tobytes()
    data = b""
    while len(data) < len(WELCOME) + tcp_frames.FRAME_BYTES + len(wanted):
        data += sock.recv(65536)
    assert data.endswith(wanted)


def test_an_impostor_with_a_good_certificate_that_does_not_welcome_is_found_out(tls: Tls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls["cert"], tls["key"])

        def serve() -> None:
            near = server.accept()[0]
            near.recv(len(GREETING) + 16, socket.MSG_WAITALL)
            with context.wrap_socket(near, server_side=True) as sock:
                sock.sendall(b"come in!")
                sock.recv(1 << 10)

        serving = spawn(serve)
        host, port = server.getsockname()
        offer = {"tcp": 2, "checksum": False, "tls": True, "host": host, "port": port}
        offer |= {"token": bytes(16), "blocks": bytes(16), "secret": bytes(16)}
        with pytest.raises(HandshakeError, match="something else than a welcome"):
            TcpPipe.open(PipeSpec("asks", lambda _: offer, timeout_s=LIMIT_S, options={"tls": tls}))
        serving.exception(LIMIT_S)


@pytest.mark.parametrize("secret", [None, b"", "x" * 16])
def test_an_offer_without_a_secret_is_refused(tls: Tls, secret: Any) -> None:
    offer = {"tcp": 2, "checksum": False, "tls": True, "host": "127.0.0.1", "port": 9, "secret": secret}
    offer |= {"token": bytes(16), "blocks": bytes(16)}
    with pytest.raises(HandshakeError, match="secret"):
        TcpPipe.open(PipeSpec("asks", lambda _: offer, timeout_s=1, options={"tls": tls}))


# -- time ---------------------------------------------------------------------------------------


def hello_of(tls: Tls) -> bytes:
    """The first message of a handshake."""
    out = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        client(**tls).wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("said", ["nothing", "half a hello", "a hello"])
def test_handshakes_that_stop_half_way_end_in_time_and_keep_nobody_out(tls: Tls, said: str, pair: PipePair) -> None:
    hello = hello_of(tls)
    words = {"nothing": b"", "half a hello": hello[: len(hello) // 2], "a hello": hello}[said]
    before = descriptors()
    stalled = [Serving(tls, timeout_s=0.5) for _ in range(20)]
    socks = [one.connect() for one in stalled]
    for sock in socks:
        sock.sendall(words)
    with closing(open_pair(TcpPipe, {"tls": tls})) as other:
        other.here.send_tensor(None)
        assert other.there.recv_tensor() is None
    began = time.monotonic()
    for one, sock in zip(stalled, socks, strict=True):
        all_that_comes(sock)
        assert isinstance(one.refused(), DeadlineError)
    assert time.monotonic() - began < 5.0
    for one in stalled:
        one.close()
    assert descriptors() <= before
    pair.here.send_tensor(None)
    assert pair.there.recv_tensor() is None


def test_strangers_who_begin_handshakes_without_a_token_get_no_answer(serving: Serving, tls: Tls) -> None:
    with ExitStack() as stack:
        address = (serving.offer["host"], serving.offer["port"])
        strangers = [stack.enter_context(socket.create_connection(address, LIMIT_S)) for _ in range(50)]
        for sock in strangers:
            sock.sendall(hello_of(tls))
        assert [all_that_comes(sock) for sock in strangers] == [b""] * 50
    sock = serving.secured(client(**tls))
    sock.sendall(serving.offer["secret"] + wire.encode(None)[0])
    assert serving.pipe.recv_tensor() is None


def test_an_abort_closes_a_connection_in_the_middle_of_its_handshake(tls: Tls) -> None:
    serving = Serving(tls, timeout_s=6 * LIMIT_S)
    sock = serving.connect()
    sock.sendall(hello_of(tls))
    assert sock.recv(1), "the handshake has begun"
    serving.pipe.abort()
    all_that_comes(sock)
    serving.close()


def test_an_asking_end_does_not_wait_for_ever_for_a_server_that_does_not_answer(tls: Tls) -> None:
    before = descriptors()
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        offer = {"tcp": 2, "checksum": False, "tls": True, "host": host, "port": port}
        offer |= {"token": bytes(16), "blocks": bytes(16), "secret": bytes(16)}
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="TLS"):
            TcpPipe.open(PipeSpec("asks", lambda _: offer, timeout_s=0.3, options={"tls": tls}))
        assert time.monotonic() - began < 3.0
        with server.accept()[0] as sock:
            all_that_comes(sock)
    assert descriptors() <= before


def test_a_record_that_comes_byte_by_byte_ends_at_the_deadline(tls: Tls) -> None:
    serving = Serving(tls, timeout_s=0.5)
    raw, came, gone = serving.connect(), ssl.MemoryBIO(), ssl.MemoryBIO()
    tls_client = client(**tls).wrap_bio(came, gone)
    while True:
        try:
            tls_client.do_handshake()
            break
        except ssl.SSLWantReadError:
            raw.sendall(gone.read())
            came.write(raw.recv(65536))
    tls_client.write(serving.offer["secret"])
    raw.sendall(gone.read())
    assert raw.recv(65536), "a welcome"
    tls_client.write(bytes(1000))
    record = gone.read()
    receiving = spawn(serving.pipe.recv_tensor)
    began = time.monotonic()
    for i in range(len(record)):
        if receiving.done():
            break
        with suppress(OSError):
            raw.sendall(record[i : i + 1])
        threading.Event().wait(0.02)
    assert isinstance(receiving.exception(LIMIT_S), DeadlineError)
    assert time.monotonic() - began < 5.0
    serving.close()
