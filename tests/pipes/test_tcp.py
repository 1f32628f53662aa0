"""The TCP pipe: the laws of the contract, and peers that do not keep to the protocol."""

from __future__ import annotations

import resource
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvconnect.errors import (
    BrokenError,
    ConfigError,
    DeadlineError,
    EndOfPipe,
    HandshakeError,
    LoadError,
    TensorRejectedError,
)
from kvconnect.paging import PagedMemory
from kvconnect.pipes import tcp_frames, tcp_listener, wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.pipes.tcp_frames import READS, WRITES
from kvconnect.pipes.tcp_listener import GREETING
from kvconnect.pipes.wire import Kind
from kvconnect.testing.channels import memory_channels
from kvconnect.testing.layouts import clone, naive_stream, noisy_memory, separate_layers
from kvconnect.testing.peers import PipePair, open_pair, spawn
from kvconnect.testing.pipe_tests import PipeTests

LIMIT_S = 10.0


class TestTcpPipe(PipeTests):
    pipe_class = TcpPipe
    # Two sockets for each end of each pipe; as many as the limit of open files lets in.
    many_pipes = min(1000, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 4)


class TestTcpPipeWithoutChecksums(PipeTests):
    pipe_class = TcpPipe
    options: ClassVar[Mapping[str, Any]] = {"checksum": False}


class Stranger:
    """Raw sockets in the place of the asking end, and the serving end they talk to."""

    def __init__(self, timeout_s: float = LIMIT_S, **options: Any) -> None:
        self.offer: dict[str, Any] = {}
        self._open = ExitStack()
        self.pipe = TcpPipe.open(
            PipeSpec("serves", self._exchange, timeout_s=timeout_s, options={"checksum": False} | options)
        )
        self._open.callback(self.pipe.abort)

    def _exchange(self, mine: Mapping[str, Any]) -> Mapping[str, Any]:
        self.offer = dict(mine)
        return {"tcp": 2, "checksum": False}

    def connect(self, hello: bytes) -> socket.socket:
        sock = self._open.enter_context(socket.create_connection((self.offer["host"], self.offer["port"]), LIMIT_S))
        sock.sendall(hello)
        return sock

    def tensors(self) -> socket.socket:
        return self.connect(GREETING + self.offer["token"])

    def blocks(self, memory: PagedMemory) -> socket.socket:
        self.pipe.attach(memory, memory.layout, memory_channels()[0])
        return self.connect(GREETING + self.offer["blocks"])

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    one = Stranger()
    yield one
    one.close()


@pytest.fixture
def pair() -> Iterator[PipePair]:
    one = open_pair(TcpPipe)
    yield one
    one.close()


def memory(seed: int = 1) -> PagedMemory:
    return noisy_memory(separate_layers(2, 8, 2, 64), seed)


def received(sock: socket.socket, nbytes: int) -> bytes:
    sock.settimeout(LIMIT_S)
    data = b""
    while len(data) < nbytes and (part := sock.recv(nbytes - len(data))):
        data += part
    return data


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side ends the connection (what still comes before that is skipped)."""
    sock.settimeout(LIMIT_S)
    try:
        while sock.recv(65536):
            pass
    except (ConnectionResetError, BrokenPipeError):
        pass
    except TimeoutError:
        return False
    return True


# -- meeting ------------------------------------------------------------------------------


@pytest.mark.parametrize("hello", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" * 20, GREETING + bytes(16)])
def test_whoever_has_no_token_is_shown_the_door_and_the_peer_still_comes_in(stranger: Stranger, hello: bytes) -> None:
    assert is_closed(stranger.connect(hello))
    stranger.tensors().sendall(wire.encode(None)[0])
    assert stranger.pipe.recv_tensor() is None


def test_a_token_is_good_for_one_connection(stranger: Stranger) -> None:
    stranger.tensors().sendall(wire.encode(None)[0])
    assert stranger.pipe.recv_tensor() is None
    assert is_closed(stranger.tensors())


def test_who_says_nothing_is_sent_away_in_time(stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_listener, "_HELLO_TIMEOUT_S", 0.1)
    assert is_closed(stranger.connect(GREETING[:3]))


def test_a_token_that_comes_in_parts_is_a_token(stranger: Stranger) -> None:
    sock = stranger.connect(GREETING + stranger.offer["token"][:5])
    sock.sendall(stranger.offer["token"][5:] + wire.encode(None)[0])
    assert stranger.pipe.recv_tensor() is None


def test_opening_the_serving_end_does_not_wait_and_the_first_receive_does() -> None:
    stranger = Stranger(timeout_s=0.2)
    with pytest.raises(DeadlineError, match="did not connect"):
        stranger.pipe.recv_tensor()
    stranger.tensors().sendall(wire.encode(None)[0])
    assert stranger.pipe.recv_tensor() is None
    stranger.close()


def test_a_peer_that_comes_after_the_close_learns_of_the_end(stranger: Stranger) -> None:
    stranger.pipe.close()
    sock = stranger.tensors()
    assert received(sock, wire.HEADER_BYTES) == wire.control(Kind.END)
    assert is_closed(sock)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"tcp": 1, "checksum": False, "host": "127.0.0.1", "port": 1, "token": bytes(16), "blocks": bytes(16)},
        {"tcp": 2, "checksum": False, "host": "127.0.0.1", "port": 0, "token": bytes(16), "blocks": bytes(16)},
        {"tcp": 2, "checksum": False, "host": "127.0.0.1", "port": 9, "token": "x", "blocks": bytes(16)},
        {"tcp": 2, "checksum": 1, "host": "127.0.0.1", "port": 9, "token": bytes(16), "blocks": bytes(16)},
    ],
)
def test_a_malformed_offer_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(HandshakeError):
        TcpPipe.open(PipeSpec("asks", lambda _: answer, timeout_s=1))


def test_an_unreachable_peer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    answer = {"tcp": 2, "checksum": False, "host": "127.0.0.1", "port": port, "token": bytes(16), "blocks": bytes(16)}
    with pytest.raises(BrokenError, match=str(port)):
        TcpPipe.open(PipeSpec("asks", lambda _: answer, timeout_s=1))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"chunk_bytes": 1}, "chunk_bytes"),
        ({"port": 70000}, "port"),
        ({"bind_host": "0.0.0.0"}, "advertise_host"),  # noqa: S104 - it is refused
        ({"bind_host": "203.0.113.1"}, "bind_host"),
        ({"bindhost": "x"}, "bind_host"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        TcpPipe.open(PipeSpec("serves", lambda _: {"tcp": 2, "checksum": False}, options=options))


# -- tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, wire.HEADER_BYTES - 1, wire.HEADER_BYTES, wire.HEADER_BYTES + 100])
def test_a_connection_cut_in_the_middle_is_broken_and_no_end(stranger: Stranger, cut: int) -> None:
    sock = stranger.tensors()
    sock.sendall((wire.encode(torch.zeros(100))[0] + bytes(400))[:cut])
    sock.close()
    with pytest.raises(BrokenError):
        stranger.pipe.recv_tensor()
    with pytest.raises(BrokenError):
        stranger.pipe.recv_tensor()


def test_a_connection_cut_between_messages_is_broken_and_no_end(stranger: Stranger) -> None:
    sock = stranger.tensors()
    sock.sendall(wire.encode(None)[0])
    sock.close()
    assert stranger.pipe.recv_tensor() is None
    with pytest.raises(BrokenError):
        stranger.pipe.recv_tensor()


@pytest.mark.parametrize("sent", [wire.HEADER_BYTES // 2, wire.HEADER_BYTES + 10])
def test_a_message_that_stalls_ends_at_the_deadline_and_the_pipe_is_dead(sent: int) -> None:
    stranger = Stranger(timeout_s=0.3)
    stranger.tensors().sendall((wire.encode(torch.zeros(100))[0] + bytes(400))[:sent])
    with pytest.raises(DeadlineError):
        stranger.pipe.recv_tensor()
    with pytest.raises(BrokenError):
        stranger.pipe.recv_tensor()
    stranger.close()


@pytest.mark.parametrize("garbage", [bytes(64), b"\xff" * 64, wire.control(Kind.DATA)])
def test_garbage_in_place_of_a_message_breaks_the_pipe(stranger: Stranger, garbage: bytes) -> None:
    stranger.tensors().sendall(garbage)
    with pytest.raises(BrokenError):
        stranger.pipe.recv_tensor()


def test_a_tensor_above_the_limit_is_neither_sent_nor_accepted() -> None:
    stranger = Stranger(max_message_bytes=1024)
    sock = stranger.tensors()
    with pytest.raises(TensorRejectedError, match="max_message_bytes"):
        stranger.pipe.send_tensor(torch.zeros(1025, dtype=torch.uint8))
    sock.sendall(wire.encode(torch.zeros(1025, dtype=torch.uint8))[0])
    with pytest.raises(BrokenError, match="limit 1024"):
        stranger.pipe.recv_tensor()
    stranger.close()


def test_large_tensors_own_their_memory_while_anybody_holds_them(pair: PipePair) -> None:
    kept: list[torch.Tensor] = []
    for value in range(5):
        sent = torch.full((5 << 20,), value, dtype=torch.uint8)
        sending = spawn(lambda sent=sent: pair.here.send_tensor(sent))
        got = pair.there.recv_tensor()
        sending.result(LIMIT_S)
        assert got is not None
        kept.append(got[1000:2000])  # a view keeps the memory, too
    assert [int(one[0]) for one in kept] == list(range(5))
    assert all(int(one.min()) == int(one.max()) for one in kept)


def test_what_was_sent_before_a_close_arrives_though_the_peer_still_sends(pair: PipePair) -> None:
    big = torch.arange(1 << 20)
    sending = spawn(lambda: pair.here.send_tensor(big))
    pair.there.send_tensor(None)  # never received: a plain close would reset the connection
    sending_end = spawn(lambda: (sending.result(LIMIT_S), pair.here.close()))
    got = pair.there.recv_tensor()
    sending_end.result(LIMIT_S)
    assert got is not None
    assert torch.equal(got, big)
    with pytest.raises(EndOfPipe):
        pair.there.recv_tensor()


# -- blocks -------------------------------------------------------------------------------


def ids_of(*blocks: int) -> bytes:
    return tcp_frames.pack_ids([list(blocks)])


def test_a_raw_read_gets_the_canonical_stream(stranger: Stranger) -> None:
    mine = memory()
    sock = stranger.blocks(mine)
    sock.sendall(tcp_frames.pack(Kind.READ, READS, 7, payload=ids_of(3, 1)))
    wanted = naive_stream(mine, [[3, 1]]).numpy().tobytes()
    frame = tcp_frames.unpack(received(sock, tcp_frames.FRAME_BYTES))
    assert frame == (Kind.DATA, READS, 7, 0, len(wanted))
    assert received(sock, frame.nbytes) == wanted


def test_block_ids_out_of_range_are_refused_and_the_connection_goes_on(stranger: Stranger) -> None:
    sock = stranger.blocks(memory())
    for bad in (ids_of(8), ids_of(-1), tcp_frames.pack_ids([[0], [0]]), ids_of()):
        sock.sendall(tcp_frames.pack(Kind.READ, READS, 1, payload=bad))
        frame = tcp_frames.unpack(received(sock, tcp_frames.FRAME_BYTES))
        assert (frame.kind, frame.transfer) == (Kind.ERROR, 1)
        assert received(sock, frame.nbytes).startswith(b"HandshakeError: ")


HOSTILE: dict[str, bytes] = {
    "garbage": b"\xff" * 24,
    "bytes nobody asked for": tcp_frames.pack(Kind.DATA, READS, 1, payload=bytes(64)),
    "bytes of no write": tcp_frames.pack(Kind.DATA, WRITES, 1, payload=bytes(64)),
    "bytes at a wrong offset": tcp_frames.pack(Kind.WRITE, WRITES, 1, payload=ids_of(0))
    + tcp_frames.pack(Kind.DATA, WRITES, 1, offset=64, payload=bytes(64)),
    "more bytes than announced": tcp_frames.pack(Kind.WRITE, WRITES, 1, payload=ids_of(0))
    + tcp_frames.pack_data(WRITES, 1, 0, 1 << 20),
    "no bytes": tcp_frames.pack(Kind.WRITE, WRITES, 1, payload=ids_of(0)) + tcp_frames.pack(Kind.DATA, WRITES, 1),
    "a write out of range": tcp_frames.pack(Kind.WRITE, WRITES, 1, payload=ids_of(99)),
    "a number twice": tcp_frames.pack(Kind.WRITE, WRITES, 1, payload=ids_of(0)) * 2,
    "a read on the wrong side": tcp_frames.pack(Kind.READ, WRITES, 1, payload=ids_of(0)),
    "endless ids": struct.pack("<HBBIQQ", tcp_frames.MAGIC, Kind.READ, READS, 1, 0, 1 << 40),
    "lying ids": tcp_frames.pack(Kind.READ, READS, 1, payload=struct.pack("<II", 1, 1 << 30)),
    "a payload where none belongs": tcp_frames.pack(Kind.CANCEL, READS, 1, payload=b"x"),
}


@pytest.mark.parametrize("frames", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_peer_costs_its_own_connection_only(pair: PipePair, stranger: Stranger, frames: bytes) -> None:
    mine, theirs, attacked = memory(1), memory(2), memory(3)
    before = clone(attacked)
    for pipe, local in ((pair.here, mine), (pair.there, theirs)):
        pipe.attach(local, local.layout, memory_channels()[0])
    sock = stranger.blocks(attacked)
    with suppress(OSError):  # the connection may have been closed already
        sock.sendall(frames)
    assert is_closed(sock)
    assert torch.equal(naive_stream(attacked, [list(range(8))]), naive_stream(before, [list(range(8))]))
    with pytest.raises(BrokenError):
        stranger.pipe.read_blocks([[0]], [[0]])
    pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    assert torch.equal(naive_stream(mine, [[2]]), naive_stream(theirs, [[1]]))


@given(data=st.binary(max_size=200), prefix=st.sampled_from([b"", struct.pack("<HB", tcp_frames.MAGIC, Kind.READ)]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_never_change_memory_nor_stop_the_reactor(data: bytes, prefix: bytes) -> None:
    mine = memory()
    before = clone(mine)
    with closing(Stranger()) as stranger:
        sock = stranger.blocks(mine)
        with suppress(OSError):  # the connection may have been closed already
            sock.sendall(prefix + data)
            sock.shutdown(socket.SHUT_WR)
        assert is_closed(sock)
    assert torch.equal(naive_stream(mine, [list(range(8))]), naive_stream(before, [list(range(8))]))


def test_blocks_that_do_not_move_end_at_the_time_out_and_tensors_go_on() -> None:
    stranger = Stranger(timeout_s=0.3)
    stranger.blocks(memory())
    tensors = stranger.tensors()
    transfer = stranger.pipe.read_blocks([[0]], [[0]])
    with pytest.raises(BrokenError, match="no byte moved"):
        transfer.wait(LIMIT_S)
    tensors.sendall(wire.encode(None)[0])
    assert stranger.pipe.recv_tensor() is None
    stranger.close()


def test_bytes_that_come_after_a_cancel_do_not_reach_the_blocks(stranger: Stranger) -> None:
    mine = memory()
    before = clone(mine)
    sock = stranger.blocks(mine)
    transfer = stranger.pipe.read_blocks([[0]], [[0]])
    asked = tcp_frames.unpack(received(sock, tcp_frames.FRAME_BYTES))
    received(sock, asked.nbytes)
    transfer.cancel()
    with pytest.raises(LoadError):
        transfer.wait(LIMIT_S)
    cancel = tcp_frames.unpack(received(sock, tcp_frames.FRAME_BYTES))
    assert (cancel.kind, cancel.transfer) == (Kind.CANCEL, asked.transfer)
    sock.sendall(tcp_frames.pack(Kind.DATA, READS, asked.transfer, payload=bytes(transfer.nbytes)))
    _answer_next_read(stranger, sock, [[1]])
    assert torch.equal(naive_stream(mine, [[0]]), naive_stream(before, [[0]]))


def _answer_next_read(stranger: Stranger, sock: socket.socket, blocks: list[list[int]]) -> None:
    transfer = stranger.pipe.read_blocks(blocks, blocks)
    asked = tcp_frames.unpack(received(sock, tcp_frames.FRAME_BYTES))
    received(sock, asked.nbytes)
    sock.sendall(tcp_frames.pack(Kind.DATA, READS, asked.transfer, payload=bytes(transfer.nbytes)))
    transfer.wait(LIMIT_S)


def test_a_request_waits_for_a_peer_that_is_attached_later(pair: PipePair) -> None:
    mine, theirs = memory(1), memory(2)
    pair.there.attach(theirs, theirs.layout, memory_channels()[0])
    transfer = pair.there.read_blocks([[5]], [[6]])
    pair.here.attach(mine, mine.layout, memory_channels()[0])
    transfer.wait(LIMIT_S)
    assert torch.equal(naive_stream(theirs, [[6]]), naive_stream(mine, [[5]]))


@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_callback_may_end_the_pipe(pair: PipePair, end: str) -> None:
    mine, theirs = memory(1), memory(2)
    for pipe, local in ((pair.here, mine), (pair.there, theirs)):
        pipe.attach(local, local.layout, memory_channels()[0])
    ender: Callable[[], None] = getattr(pair.here, end)
    transfer = pair.here.read_blocks([[0]], [[0]])
    transfer.add_done_callback(lambda _: ender())
    transfer.wait(LIMIT_S)
    other = open_pair(TcpPipe)  # the reactor lives on
    other.here.send_tensor(None)
    assert other.there.recv_tensor() is None
    other.close()


def test_block_ids_survive_the_wire() -> None:
    blocks = [[1, 2, 3], [], [7]]
    assert tcp_frames.unpack_ids(tcp_frames.pack_ids(blocks)) == blocks
    assert tcp_frames.unpack_ids(tcp_frames.pack_ids([np.arange(3).tolist()])) == [[0, 1, 2]]
