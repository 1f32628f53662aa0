"""What happens to a TCP pipe when a call on it is cut short, and views that are not plain memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from kvconnect.errors import BrokenError, ClosedError
from kvconnect.pipes.landing import Landing
from kvconnect.pipes.tcp import TcpPipe
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
