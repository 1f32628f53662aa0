"""`kvconnect.pipes.peer_memory`: reading the right process, and copying in chunks."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvconnect.errors import BrokenError, ClosedError, HandshakeError
from kvconnect.pipes import turns, vectored
from kvconnect.pipes.peer_memory import Beacon, PeerMemory, SharedCopy


def _bytes_at(array):
    return vectored.pieces((int(array.ctypes.data), array.nbytes))


@pytest.fixture
def bystander():
    """A process that has nothing to do with it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def test_scattered_pieces_are_read_and_written():
    beacon = Beacon()
    peer = PeerMemory(beacon.card())
    theirs, ours = np.arange(64, dtype=np.uint8), np.zeros(32, dtype=np.uint8)
    start = int(theirs.ctypes.data)
    remote = vectored.pieces((start + 40, 8), (start, 16), (start + 56, 8))
    peer.read(_bytes_at(ours), remote.copy())
    assert ours.tolist() == [*range(40, 48), *range(16), *range(56, 64)]
    ours[:] = 255
    peer.write(_bytes_at(ours), remote)
    assert theirs.tolist() == [255] * 16 + list(range(16, 40)) + [255] * 8 + list(range(48, 56)) + [255] * 8
    peer.close()


def test_a_recycled_process_number_is_not_the_peer(bystander):
    card = Beacon().card() | {"pid": bystander.pid}
    with pytest.raises(BrokenError):
        PeerMemory(card)


def test_a_process_with_another_beacon_is_not_the_peer():
    beacon = Beacon()
    with pytest.raises(BrokenError, match="does not show the peer's beacon"):
        PeerMemory(beacon.card() | {"beacon": bytes(32)})


def test_a_process_that_replaced_its_program_is_no_longer_the_peer():
    beacon = Beacon()
    peer = PeerMemory(beacon.card())
    beacon._bytes[:] = 0
    with pytest.raises(BrokenError, match="beacon"):
        peer.verify()
    peer.close()


def test_a_process_that_has_ended_is_found_out(bystander):
    address = 0x1000
    card = {"pid": bystander.pid, "address": address, "beacon": bytes(32)}
    bystander.kill()
    bystander.wait()
    with pytest.raises(BrokenError, match="cannot be found"):
        PeerMemory(card)


def test_memory_that_is_not_there_is_an_error_and_not_a_short_copy():
    beacon = Beacon()
    peer = PeerMemory(beacon.card())
    ours, theirs = np.zeros(16, dtype=np.uint8), np.zeros(8, dtype=np.uint8)
    with pytest.raises(BrokenError):
        peer.read(_bytes_at(ours), vectored.pieces((int(theirs.ctypes.data), 8), (8, 8)))
    peer.close()


@pytest.mark.parametrize(
    "change",
    [{"pid": "x"}, {"pid": 0}, {"pid": -1}, {"address": -1}, {"address": 1 << 64}, {"beacon": b""}, {"beacon": None}],
)
def test_a_malformed_card_is_refused(change):
    with pytest.raises(HandshakeError):
        PeerMemory(Beacon().card() | change)


def test_a_failed_look_leaves_no_file_open(bystander):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(BrokenError):
            PeerMemory(Beacon().card() | {"pid": bystander.pid})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_shared_copy_does_each_chunk_once_and_ends_once():
    done, ends, over = [], [], threading.Event()

    def end(error):
        ends.append((error, len(done)))
        over.set()

    copy = SharedCopy(200, done.append, lambda: None, end)
    for _ in range(2):
        turns.shared().add(copy.step)
    while copy.step():
        pass
    assert over.wait(10)
    assert sorted(done) == list(range(200))
    assert ends == [(None, 200)]


def test_a_shared_copy_that_fails_ends_after_the_last_access():
    in_copy, go_on, over = threading.Event(), threading.Event(), threading.Event()
    ends, touched = [], []

    def copy(number):
        if number == 0:
            in_copy.set()
            go_on.wait(10)
            touched.append(number)
        else:
            raise BrokenError("chunk 1 failed")

    def end(error):
        ends.append((error, list(touched)))
        over.set()

    shared = SharedCopy(50, copy, lambda: None, end)
    turns.shared().add(shared.step)
    assert in_copy.wait(10)
    while shared.step():
        pass
    assert not ends
    go_on.set()
    assert over.wait(10)
    assert [(str(error), seen) for error, seen in ends] == [("chunk 1 failed", [0])]


def test_a_shared_copy_stops_when_its_check_says_so():
    done, ends = [], []

    def check():
        if len(done) == 3:
            raise ClosedError("stop")

    copy = SharedCopy(10, done.append, check, ends.append)
    while copy.step():
        pass
    assert done == [0, 1, 2]
    assert isinstance(ends[0], ClosedError)
