"""Vectored I/O over scattered memory."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.paging import IoVec
from kvconnect.pipes import vectored
from kvconnect.pipes.tcp_stream import Cursor

Bytes = npt.NDArray[np.uint8]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def scattered(memory: Bytes, sizes: list[int]) -> IoVec:
    """Pieces of these sizes, every other one from the back of ``memory``."""
    spans, front, back = [], 0, memory.size
    for i, size in enumerate(sizes):
        if i % 2:
            back -= size
        spans.append((memory.ctypes.data + (back if i % 2 else front), size))
        front += 0 if i % 2 else size
    return vectored.pieces(*spans)


def gathered(memory: Bytes, iov: IoVec) -> bytes:
    """The stream that ``iov`` describes, byte by byte."""
    base = memory.ctypes.data
    return b"".join(memory[int(a) - base : int(a) - base + int(n)].tobytes() for a, n in iov)


def noise(nbytes: int) -> Bytes:
    return np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)


def test_pieces_are_sent_and_received_in_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    source, target = noise(100), np.zeros(100, dtype=np.uint8)
    iov, into = scattered(source, [10, 20, 30, 5]), scattered(target, [40, 25])
    assert vectored.send(sockets[0].fileno(), iov) == 65
    assert vectored.recv(sockets[1].fileno(), into) == 65
    assert gathered(target, into) == gathered(source, iov)


def test_more_pieces_than_the_kernel_takes_are_sent_in_parts(sockets: tuple[socket.socket, socket.socket]) -> None:
    source = noise(3000)
    iov = scattered(source, [1] * 3000)
    wanted, got = gathered(source, iov), b""
    while len(iov):
        done = vectored.send(sockets[0].fileno(), iov)
        assert done <= vectored.MAX_PIECES
        got += sockets[1].recv(done)
        iov = vectored.advance(iov, done)
    assert got == wanted


def test_an_empty_socket_says_that_it_would_block(sockets: tuple[socket.socket, socket.socket]) -> None:
    target = np.zeros(4, dtype=np.uint8)
    with pytest.raises(BlockingIOError):
        vectored.recv(sockets[1].fileno(), scattered(target, [4]), socket.MSG_DONTWAIT)


def test_sending_to_a_closed_peer_is_an_error_and_no_signal(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].close()
    with pytest.raises(BrokenPipeError):
        vectored.send(sockets[0].fileno(), scattered(noise(4), [4]))


def test_bad_memory_is_an_error_and_no_crash(sockets: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(OSError, match="Bad address"):
        vectored.send(sockets[0].fileno(), vectored.pieces((8, 4)))


@settings(deadline=None)  # the machine may be busy
@given(sizes=st.lists(st.integers(0, 9), max_size=30), data=st.data())
def test_advance_drops_exactly_the_first_bytes(sizes: list[int], data: st.DataObject) -> None:
    memory = noise(sum(sizes) + 1)
    iov = scattered(memory, sizes)
    stream = gathered(memory, iov)
    for _ in range(3):
        done = data.draw(st.integers(0, len(stream)))
        iov, stream = vectored.advance(iov, done), stream[done:]
        assert gathered(memory, iov) == stream


def test_advance_past_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="more bytes"):
        vectored.advance(scattered(noise(4), [4]), 5)


@settings(deadline=None)  # the machine may be busy
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), part=st.integers(1, 40))
def test_a_cursor_takes_the_stream_part_by_part(sizes: list[int], part: int) -> None:
    memory = noise(sum(sizes))
    iov = scattered(memory, sizes)
    cursor, taken = Cursor(iov), b""
    while cursor.left:
        taken += gathered(memory, cursor.take(min(part, cursor.left)))
    assert taken == gathered(memory, iov)


@settings(deadline=None)  # the machine may be busy
@given(cuts=st.lists(st.integers(0, 60), max_size=8), others=st.lists(st.integers(0, 60), max_size=8))
def test_copy_joins_streams_that_are_cut_differently(cuts: list[int], others: list[int]) -> None:
    source, target = noise(60), np.zeros(60, dtype=np.uint8)
    src, dst = (scattered(m, _sizes(c)) for m, c in ((source, cuts), (target, others)))
    vectored.copy(dst, src)
    assert gathered(target, dst) == gathered(source, src)


def test_copy_refuses_streams_of_different_length() -> None:
    memory = noise(10)
    with pytest.raises(ValueError, match="cannot copy"):
        vectored.copy(scattered(memory, [3]), scattered(memory, [4]))


def test_a_process_reads_and_writes_memory_by_pid() -> None:
    source, target = noise(50), np.zeros(50, dtype=np.uint8)
    src, dst = scattered(source, [20, 30]), scattered(target, [25, 25])
    assert vectored.process_read(os.getpid(), dst, src) == 50
    assert gathered(target, dst) == gathered(source, src)
    target[:] = 0
    assert vectored.process_write(os.getpid(), src, dst) == 50
    assert gathered(target, dst) == gathered(source, src)


def test_memory_of_no_process_is_an_error() -> None:
    memory = noise(4)
    with pytest.raises(ProcessLookupError):
        vectored.process_read(2**22 + 1, scattered(memory, [4]), scattered(memory, [4]))


def _sizes(cuts: list[int]) -> list[int]:
    edges = [0, *sorted(cuts), 60]
    return [b - a for a, b in itertools.pairwise(edges)]
