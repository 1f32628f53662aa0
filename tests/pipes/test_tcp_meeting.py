"""TCP pipes whose ends cannot meet, or are given up: nothing leaks, and errors are kvconnect's own."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from kvconnect.errors import BrokenError, ConfigError, DeadlineError, HandshakeError
from kvconnect.paging import PagedMemory
from kvconnect.pipes import reactor, tcp_frames, tcp_listener, tcp_meeting, wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.pipes.tcp_link import Link
from kvconnect.pipes.tcp_listener import GREETING
from kvconnect.testing.channels import memory_channels
from kvconnect.testing.layouts import noisy_memory, separate_layers
from kvconnect.testing.peers import PipePair, open_pair

LIMIT_S = 10.0
PLAIN = {"checksum": False}
ANSWER = {"tcp": 2, "checksum": False}


@pytest.fixture
def pair() -> Iterator[PipePair]:
    one = open_pair(TcpPipe)
    yield one
    one.close()


def memory() -> PagedMemory:
    return noisy_memory(separate_layers(2, 8, 2, 64), 1)


def is_closed(sock: socket.socket) -> bool:
    sock.settimeout(2.0)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


class Server:
    """A listening socket and what a serving end would say of it; every newcomer is kept."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(LIMIT_S)
        port = self.listener.getsockname()[1]
        self.offer = {
            "tcp": 2,
            "checksum": False,
            "host": "127.0.0.1",
            "port": port,
            "token": bytes(16),
            "blocks": bytes(16),
        }

    def open(self, **changes: Any) -> TcpPipe:
        return TcpPipe.open(PipeSpec("asks", lambda _: self.offer | changes, timeout_s=LIMIT_S))


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.listener.close()


def _raising(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("method", ["sendall", "getpeername"])
def test_an_asking_end_that_fails_after_it_connected_closes_its_socket(
    server: Server, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    made = []

    class Failing(socket.socket):
        pass

    def create(address: tuple[str, int], _timeout_s: float) -> socket.socket:
        sock = Failing()
        sock.connect(address)
        made.append(sock)
        return sock

    setattr(Failing, method, _raising(errno.ENOTCONN))
    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(BrokenError, match="cannot reach"):
        server.open()
    assert made[0].fileno() < 0
    with server.listener.accept()[0] as sock:
        assert is_closed(sock)


@pytest.mark.parametrize("host", ["a\0b", "x" * 70, "a..b"])
def test_a_host_that_is_none_is_refused(server: Server, host: str) -> None:
    with pytest.raises(HandshakeError, match="no address"):
        server.open(host=host)


@pytest.mark.parametrize("host", ["a\0b", "x" * 70])
def test_an_address_to_bind_that_is_none_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match="bind_host"):
        TcpPipe.open(PipeSpec("serves", lambda _: {"tcp": 2, "checksum": False}, options={"bind_host": host}))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "node7"),
        ({"advertise_host": "node8"}, "node8"),
        ({"bind_host": "127.0.0.3"}, "127.0.0.3"),
        ({"bind_host": "127.0.0.3", "advertise_host": "node8"}, "node8"),
    ],
)
def test_an_end_listens_and_is_found_where_its_engine_is_unless_its_options_say_otherwise(
    options: dict[str, str], told: str
) -> None:
    offer: dict[str, Any] = {}
    spec = PipeSpec(
        "serves",
        lambda mine: offer.update(mine) or ANSWER,
        timeout_s=LIMIT_S,
        options=PLAIN | options,
        bind_host="127.0.0.2",
        advertise_host="node7",
    )
    pipe = TcpPipe.open(spec)
    assert offer["host"] == told
    with socket.create_connection((options.get("bind_host", "127.0.0.2"), offer["port"]), LIMIT_S):
        pipe.abort()


def test_a_socket_that_cannot_be_set_up_is_closed_and_the_pipe_broken(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Link, "__init__", _raising(errno.EINVAL))
    pipe = server.open()
    with pytest.raises(BrokenError, match="Invalid argument"):
        pipe.send_tensor(None)
    with server.listener.accept()[0] as sock:
        assert is_closed(sock)
    pipe.close()


def test_a_newcomer_that_cannot_be_set_up_is_no_silent_wait_for_the_serving_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer: dict[str, Any] = {}
    pipe = TcpPipe.open(PipeSpec("serves", lambda mine: offer.update(mine) or ANSWER, timeout_s=LIMIT_S, options=PLAIN))
    monkeypatch.setattr(Link, "__init__", _raising(errno.EINVAL))
    with socket.create_connection((offer["host"], offer["port"]), LIMIT_S) as sock:
        sock.sendall(GREETING + offer["token"])
        assert is_closed(sock)
        with pytest.raises(BrokenError, match="Invalid argument"):
            pipe.recv_tensor()
    pipe.close()


def test_no_descriptor_for_the_blocks_fails_their_transfers_and_the_tensors_go_on(
    pair: PipePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = memory()
    monkeypatch.setattr(tcp_meeting.Asking, "_block_socket", _raising(errno.EMFILE))
    pair.here.attach(mine, mine.layout, memory_channels()[0])
    with pytest.raises(BrokenError, match="cannot reach the peer's blocks"):
        pair.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)
    pair.here.send_tensor(None)
    assert pair.there.recv_tensor() is None


def test_a_socket_for_blocks_that_cannot_be_set_up_fails_their_transfers_at_once(
    pair: PipePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = memory()
    monkeypatch.setattr(socket, "TCP_NOTSENT_LOWAT", 9999)
    pair.here.attach(mine, mine.layout, memory_channels()[0])
    with pytest.raises(BrokenError, match="Protocol not available"):
        pair.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)


def test_a_serving_end_whose_exchange_fails_lets_go_of_a_peer_that_has_come() -> None:
    with ExitStack() as clients:
        came = []

        def exchange(offer: Mapping[str, Any]) -> Mapping[str, Any]:
            for token in (offer["token"], offer["blocks"]):
                sock = clients.enter_context(socket.create_connection((offer["host"], offer["port"]), LIMIT_S))
                sock.sendall(GREETING + token)
                came.append(sock)
            # Once its own jobs have run twice, the reactor has let both of them in.
            for _ in range(10):
                assert reactor.shared().run(lambda: None, LIMIT_S)
            raise RuntimeError("the control channel failed")

        with pytest.raises(RuntimeError, match="control channel"):
            TcpPipe.open(PipeSpec("serves", exchange, timeout_s=LIMIT_S))
        assert [is_closed(sock) for sock in came] == [True, True]


# -- the end of the blocks' connection --------------------------------------------------------


def _attached(pair: PipePair) -> None:
    for pipe in (pair.here, pair.there):
        local = memory()
        pipe.attach(local, local.layout, memory_channels()[0])
    pair.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)


@contextlib.contextmanager
def forked_child() -> Iterator[None]:
    """A child that holds copies of all descriptors."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_peer_hears_of_the_end_though_a_forked_child_holds_the_sockets(pair: PipePair, end: str) -> None:
    _attached(pair)
    over = threading.Event()
    with forked_child():
        getattr(pair.here, end)()
        for _ in range(20):
            with contextlib.suppress(BrokenError):
                transfer = pair.there.read_blocks([[1]], [[1]])
                transfer.add_done_callback(lambda transfer: over.set() if transfer.error else None)
                if not over.wait(0.1):
                    continue
            break
        else:
            pytest.fail("the peer's transfers wait for an end that has gone")


def test_a_stranger_is_shown_the_door_though_a_forked_child_holds_its_connection() -> None:
    offer: dict[str, Any] = {}
    pipe = TcpPipe.open(PipeSpec("serves", lambda mine: offer.update(mine) or ANSWER, timeout_s=LIMIT_S, options=PLAIN))
    with socket.create_connection((offer["host"], offer["port"]), LIMIT_S) as sock:
        sock.sendall(GREETING)
        for _ in range(10):
            assert reactor.shared().run(lambda: None, LIMIT_S)
        with forked_child():
            sock.sendall(bytes(16))
            assert is_closed(sock)
    pipe.close()


def test_a_close_that_cannot_reach_the_reactor_says_that_blocks_may_be_in_use_and_still_tells_the_peer() -> None:
    pair = open_pair(TcpPipe, timeout_s=0.3)
    _attached(pair)
    hold = threading.Event()
    reactor.shared().call_soon(lambda: hold.wait(LIMIT_S))
    try:
        with pytest.raises(DeadlineError, match="still in use"):
            pair.here.close()
    finally:
        hold.set()
    with pytest.raises(Exception, match="other end was closed"):
        pair.there.recv_tensor()
    pair.close()


def test_what_was_answered_before_a_close_arrives_though_a_request_comes_just_then() -> None:
    offer: dict[str, Any] = {}
    pipe = TcpPipe.open(PipeSpec("serves", lambda mine: offer.update(mine) or ANSWER, timeout_s=LIMIT_S, options=PLAIN))
    local = noisy_memory(separate_layers(2, 64, 2, 4096), 1)
    pipe.attach(local, local.layout, memory_channels()[0])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(LIMIT_S)
        sock.connect((offer["host"], offer["port"]))
        ids = tcp_frames.pack_ids([list(range(8))])
        sock.sendall(GREETING + offer["blocks"] + tcp_frames.pack(wire.Kind.READ, 0, 1, payload=ids))
        for _ in range(50):
            assert reactor.shared().run(lambda: None, LIMIT_S)
        pipe.close()
        sock.sendall(tcp_frames.pack(wire.Kind.READ, 0, 2, payload=ids))
        threading.Event().wait(0.1)  # a reset would need a moment to come back
        data = b""
        while part := sock.recv(1 << 20):
            data += part
    assert len(data) == tcp_frames.FRAME_BYTES + local.layout.nbytes([list(range(8))])


def test_strangers_that_say_nothing_hold_no_more_than_their_share_and_keep_no_peer_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_listener, "_MAX_NEWCOMERS", 4)
    with ExitStack() as stack:
        first = open_pair(TcpPipe)
        stack.callback(first.close)
        address = ("127.0.0.1", next(iter(tcp_listener._listeners.values())).port)
        strangers = [stack.enter_context(socket.create_connection(address)) for _ in range(12)]
        assert all(is_closed(sock) for sock in strangers[:8]), "those that waited longest have to go"
        strangers[-1].settimeout(0.2)
        with pytest.raises(TimeoutError):
            strangers[-1].recv(1)
        second = open_pair(TcpPipe)
        stack.callback(second.close)
        second.here.send_tensor(None)
        assert second.there.recv_tensor() is None


@pytest.mark.parametrize("said", [GREETING + bytes(16), b"GET / HTTP/1.1\r\n\r\n0123", GREETING[:-1] + b"x" * 17])
def test_a_connection_without_a_valid_token_is_closed(said: bytes) -> None:
    pair = open_pair(TcpPipe)
    try:
        address = ("127.0.0.1", next(iter(tcp_listener._listeners.values())).port)
        with socket.create_connection(address) as sock:
            sock.sendall(said)
            assert is_closed(sock)
        pair.here.send_tensor(None)
        assert pair.there.recv_tensor() is None
    finally:
        pair.close()


def test_a_token_opens_one_connection_only() -> None:
    listener = tcp_listener.acquire(reactor.shared(), "127.0.0.1", 0)
    came = threading.Event()
    arrived: list[socket.socket] = []

    def arrive(sock: socket.socket) -> None:
        arrived.append(sock)
        came.set()

    token = listener.expect(arrive)
    try:
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(socket.create_connection(("127.0.0.1", listener.port))) for _ in range(2)
            )
            first.sendall(GREETING + token)
            assert came.wait(LIMIT_S)
            second.sendall(GREETING + token)
            assert is_closed(second)
        assert len(arrived) == 1
    finally:
        for sock in arrived:
            sock.close()
        tcp_listener.release(listener)
