"""What happens to a TCP pipe when a call on it is cut short, and views that are not plain memory."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from kvconnect.errors import BrokenError, ClosedError
from kvconnect.pipes import wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.landing import Landing
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.pipes.tcp_listener import GREETING
from kvconnect.pipes.wire import Kind
from kvconnect.testing.peers import PipePair, open_pair, spawn

LIMIT_S = 10.0


@pytest.fixture
def pair() -> Iterator[PipePair]:
    one = open_pair(TcpPipe)
    yield one
    one.close()


class AlarmError(Exception):
    """What a signal's handler raises."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
def test_a_send_that_a_signal_cuts_short_leaves_both_ends_broken(pair: PipePair) -> None:
    with pytest.raises(AlarmError):
        pair.here.send_tensor(torch.zeros(64 << 20, dtype=torch.uint8))  # more than sockets hold
    with pytest.raises(BrokenError, match="cut short"):
        pair.here.send_tensor(None)
    with pytest.raises(BrokenError):
        pair.there.recv_tensor()


@pytest.mark.usefixtures("alarm")
def test_a_receive_that_a_signal_cuts_short_breaks_a_send_that_waits(pair: PipePair) -> None:
    sending = spawn(lambda: pair.here.send_tensor(torch.zeros(64 << 20, dtype=torch.uint8)))
    with pytest.raises(AlarmError):
        pair.here.recv_tensor()
    with pytest.raises(BrokenError, match="cut short"):
        sending.result(LIMIT_S)
    with pytest.raises(BrokenError, match="cut short"):
        pair.here.recv_tensor()


@pytest.mark.parametrize("error", [RuntimeError("not enough memory"), MemoryError(), OSError(12, "no memory")])
def test_a_tensor_for_which_there_is_no_memory_breaks_the_pipe(
    pair: PipePair, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def none_left(*_: object) -> None:
        raise error

    monkeypatch.setattr(Landing, "_area", none_left)
    sending = spawn(lambda: pair.there.send_tensor(torch.zeros(8 << 20, dtype=torch.uint8)))
    for _ in range(2):
        with pytest.raises(BrokenError, match="no memory"):
            pair.here.recv_tensor()
    pair.here.close()
    sending.exception(LIMIT_S)  # it may fit into the sockets


def test_a_view_that_negates_receives_the_values_sent(pair: PipePair) -> None:
    sent = torch.tensor([1 + 2j, 3 - 4j])
    for out in (torch.zeros(2, dtype=torch.complex64).conj(), torch.zeros(2, dtype=torch.complex64)):
        pair.there.send_tensor(sent)
        pair.here.recv_tensor_into(out)
        assert torch.equal(out, sent)


def test_a_thread_that_waits_while_its_pipe_is_closed_hears_of_the_close(pair: PipePair) -> None:
    waiting = spawn(pair.here.recv_tensor)
    pair.there.send_tensor(None)
    assert waiting.result(LIMIT_S) is None
    started = threading.Event()
    waiting = spawn(lambda: (started.set(), pair.here.recv_tensor()))
    started.wait(LIMIT_S)
    pair.here.close()
    with pytest.raises(ClosedError):
        waiting.result(LIMIT_S)


class Reader:
    """A raw socket with a small receive buffer in the place of the asking end, so that much stays unfetched."""

    def __init__(self, timeout_s: float = LIMIT_S) -> None:
        offer: dict[str, Any] = {}

        def exchange(mine: Mapping[str, Any]) -> Mapping[str, Any]:
            offer.update(mine)
            return {"tcp": 2, "checksum": False}

        self.pipe = TcpPipe.open(PipeSpec("serves", exchange, timeout_s=timeout_s, options={"checksum": False}))
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect((offer["host"], offer["port"]))
        self.sock.sendall(GREETING + offer["token"])

    def drain(self) -> bytes:
        """Everything up to an end mark, or to the end of the connection."""
        data = b""
        while not data.endswith(wire.control(Kind.END)) and (part := self.sock.recv(1 << 20)):
            data += part
        return data

    def close(self) -> None:
        self.sock.close()
        self.pipe.abort()


@pytest.fixture
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    one.close()


@pytest.mark.parametrize("chatter", [wire.control(Kind.NONE), bytes(100 << 10)], ids=["one message", "many bytes"])
def test_a_close_while_a_receive_waits_loses_nothing_that_was_sent_though_the_peer_sends(
    reader: Reader, chatter: bytes
) -> None:
    waiting = spawn(reader.pipe.recv_tensor)
    sent = torch.arange(1 << 15)  # more than the peer's kernel takes, less than ours does
    reader.pipe.send_tensor(sent)
    _await_blocked(waiting)
    reader.pipe.close()
    with pytest.raises(ClosedError):
        waiting.result(4)
    reader.sock.sendall(chatter)
    time.sleep(0.1)  # a reset would need a moment to come back
    header, _ = wire.encode(sent)
    assert reader.drain() == header + sent.numpy().tobytes() + wire.control(Kind.END)


def test_a_close_while_a_send_waits_loses_no_earlier_message_though_the_peer_sends(reader: Reader) -> None:
    sent = torch.arange(1 << 12)
    reader.pipe.send_tensor(sent)
    waiting = spawn(lambda: reader.pipe.send_tensor(torch.zeros(64 << 20, dtype=torch.uint8)))
    _await_blocked(waiting)
    reader.pipe.close()
    with pytest.raises(ClosedError):
        waiting.result(4)
    reader.sock.sendall(wire.control(Kind.NONE))
    time.sleep(0.1)  # a reset would need a moment to come back
    whole = wire.encode(sent)[0] + sent.numpy().tobytes()
    assert reader.drain()[: len(whole)] == whole


def test_a_close_while_both_wait_loses_no_earlier_message_though_the_peer_sends(reader: Reader) -> None:
    receiving = spawn(reader.pipe.recv_tensor)
    sent = torch.arange(1 << 15)  # more than the peer's kernel takes, less than ours does
    reader.pipe.send_tensor(sent)
    sending = spawn(lambda: reader.pipe.send_tensor(torch.zeros(64 << 20, dtype=torch.uint8)))
    _await_blocked(sending)
    reader.pipe.close()
    for waiting in (receiving, sending):
        with pytest.raises(ClosedError):
            waiting.result(4)
    reader.sock.sendall(wire.control(Kind.NONE))
    time.sleep(0.1)  # a reset would need a moment to come back
    whole = wire.encode(sent)[0] + sent.numpy().tobytes()
    assert reader.drain()[: len(whole)] == whole


def test_who_still_sends_to_an_end_that_closed_while_it_received_learns_so(reader: Reader) -> None:
    waiting = spawn(reader.pipe.recv_tensor)
    _await_blocked(waiting)
    reader.pipe.close()
    assert waiting.exception(4)
    assert reader.drain() == wire.control(Kind.END)
    with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012 - the first bytes are still taken
        for _ in range(100):
            reader.sock.sendall(bytes(1024))
            time.sleep(0.01)


def test_a_waiting_receive_hears_of_the_close_though_the_end_mark_does_not_fit() -> None:
    reader = Reader(timeout_s=8.0)
    waiting = spawn(reader.pipe.recv_tensor)
    sending = spawn(lambda: reader.pipe.send_tensor(torch.zeros(8 << 20, dtype=torch.uint8)))
    _await_blocked(sending)
    closing = spawn(reader.pipe.close)
    with pytest.raises(ClosedError):
        waiting.result(4)
    assert isinstance(sending.exception(LIMIT_S), ClosedError)
    closing.result(LIMIT_S)
    reader.close()


def _await_blocked(call: Future[Any]) -> None:
    """Give a call time to reach the kernel, where it stays."""
    with pytest.raises(TimeoutError):
        call.result(0.2)
