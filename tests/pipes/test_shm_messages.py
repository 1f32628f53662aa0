"""`kvconnect.pipes.shm_messages` and `kvconnect.pipes.shm_lane`: what a peer or a signal can do to them."""

import errno
import os
import socket
import struct
import threading

import pytest
import torch

from kvconnect.errors import BrokenError, DeadlineError, HandshakeError, TensorRejectedError
from kvconnect.pipes import ring, wire
from kvconnect.pipes.peer_memory import Beacon, PeerMemory
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.shm_lane import Lane, Listener, connect
from kvconnect.pipes.shm_messages import Receiver, Sender
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from kvconnect.testing.peers import open_pair, spawn

LIMIT_S = 30.0
LARGE = 8 << 20


@pytest.fixture
def ends():
    """A receiver, and the bare socket that a peer would hold."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver = Receiver(Lane(ours, 0.5), None)
    yield receiver, theirs
    receiver.close()
    theirs.close()


def _message(tensor):
    return b"\x01" + wire.encode(tensor)[0] + bytes(tensor.nbytes)


# -- what a peer sends --------------------------------------------------------------


def test_nothing_is_received_behind_what_was_no_message(ends):
    receiver, theirs = ends
    theirs.send(b"\x09")
    theirs.send(_message(torch.ones(4)))
    for _ in range(2):
        with pytest.raises(BrokenError):
            receiver.receive()


def test_nothing_is_received_behind_an_empty_packet(ends):
    receiver, theirs = ends
    theirs.send(b"")
    theirs.send(_message(torch.ones(4)))
    for _ in range(2):
        with pytest.raises(BrokenError):
            receiver.receive()


def test_a_deadline_between_messages_leaves_the_pipe_usable(ends):
    receiver, theirs = ends
    with pytest.raises(DeadlineError):
        receiver.receive()
    theirs.send(_message(torch.ones(4)))
    assert torch.equal(receiver.receive(), torch.zeros(4))


@pytest.mark.parametrize("kind", [wire.Kind.READ, wire.Kind.DATA, wire.Kind.ACK])
def test_a_kind_of_message_that_other_media_have_is_not_none(ends, kind):
    receiver, theirs = ends
    theirs.send(b"\x01" + wire.control(kind))
    with pytest.raises(BrokenError, match=kind.name):
        receiver.receive()


def test_an_announcement_of_more_than_there_is_memory_breaks_the_pipe(ends):
    receiver, theirs = ends
    header = wire._tensor_header(torch.uint8, (1 << 40,))
    theirs.send(struct.pack("<BQ", 2, 4096) + header)
    with pytest.raises(BrokenError, match="no memory"):
        receiver.receive()


def test_an_fd_that_comes_without_a_ring_is_closed(ends):
    receiver, theirs = ends
    theirs.send(struct.pack("<BQ", 2, 0) + wire._tensor_header(torch.uint8, (LARGE,)))
    made, fd = ring.create(1 << 20)
    socket.send_fds(theirs, [b"\x09"], [fd])
    before = Holdings.now()
    with pytest.raises(BrokenError, match="file descriptor"):
        receiver.receive()
    assert_nothing_left(before)
    os.close(fd)
    made.close()


# -- interrupts -----------------------------------------------------------------------


@pytest.fixture
def big_reader(monkeypatch):
    """A receiver that copies on two threads, and the peer whose memory it reads."""
    monkeypatch.setattr("kvconnect.pipes.shm_messages.useful_threads", lambda: 2)
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver = Receiver(Lane(ours, LIMIT_S), None)
    yield receiver, theirs
    receiver.close()
    theirs.close()


class _SlowPeer:
    """Memory whose other reader is still copying when the asking thread is interrupted."""

    def __init__(self, interrupted):
        self.interrupted, self.copying, self.copied = interrupted, threading.Event(), threading.Event()

    def read(self, local, remote):
        if threading.current_thread() is self.interrupted:
            assert self.copying.wait(LIMIT_S)
            raise KeyboardInterrupt
        self.copying.set()
        threading.Event().wait(0.3)
        self.copied.set()


def test_after_an_interrupt_no_thread_writes_to_the_memory_that_the_caller_has_back(big_reader):
    receiver, theirs = big_reader
    receiver._peer = peer = _SlowPeer(threading.current_thread())
    theirs.send(struct.pack("<BQ", 2, 4096) + wire._tensor_header(torch.uint8, (LARGE,)))
    with pytest.raises(KeyboardInterrupt):
        receiver.receive(torch.zeros(LARGE, dtype=torch.uint8))
    assert peer.copied.is_set()
    with pytest.raises(BrokenError):
        receiver.receive()


def test_an_interrupted_receive_does_not_lose_one_message_in_silence(ends, monkeypatch):
    receiver, theirs = ends
    theirs.send(_message(torch.ones(4)))
    theirs.send(_message(torch.ones(8)))
    recv_into = Lane.recv_into

    def receive_and_be_interrupted(lane, buffer):
        recv_into(lane, buffer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lane, "recv_into", receive_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        receiver.receive()
    monkeypatch.undo()
    with pytest.raises(BrokenError):
        receiver.receive()


# -- destinations -----------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [8, LARGE])
def test_a_destination_that_cannot_be_written_to_is_rejected_and_the_pipe_goes_on(numbers):
    pair = open_pair(ShmPipe)
    sending = spawn(lambda: pair.there.send_tensors([torch.ones(numbers), None]))
    with pytest.raises(TensorRejectedError, match="cannot be written"):
        pair.here.recv_tensor_into(torch.zeros(1).expand(numbers))
    assert pair.here.recv_tensor() is None
    sending.result(LIMIT_S)
    pair.close()


# -- meeting ------------------------------------------------------------------------------


def test_a_stranger_that_brings_a_file_is_turned_away_and_the_peer_gets_in():
    before = Holdings.now()
    listener = Listener()
    invitation = listener.invitation()
    read_end, write_end = os.pipe()
    for token in (bytes(16), invitation["token"]):
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.connect("\0" + invitation["name"])
        socket.send_fds(stranger, [token], [read_end])
        stranger.close()
    right = connect(invitation, 5.0)
    lanes = listener.accept(5.0, 5.0, None)
    right[0].send(b"x")
    assert lanes[1].recv_tag() == ord("x")
    for each in (*right, *lanes, listener):
        each.close()
    os.close(read_end)
    os.close(write_end)
    assert_nothing_left(before)


@pytest.mark.parametrize("change", [{"name": 5}, {"token": 1 << 60}, {"token": None}, {"token": [1, 2]}])
def test_an_invitation_that_is_none_is_refused(change):
    with pytest.raises(HandshakeError):
        connect({"name": "x", "token": bytes(16)} | change, 5.0)


@pytest.mark.parametrize("change", [{"pid": 1 << 40}, {"beacon": 1 << 60}, {"beacon": [0] * 32}])
def test_a_card_with_numbers_that_no_process_has_is_refused(change):
    with pytest.raises(HandshakeError):
        PeerMemory(Beacon().card() | change)


@pytest.mark.parametrize("call", ["socket", "socketpair"])
def test_a_system_without_sockets_is_an_error_of_ours_and_leaves_nothing(monkeypatch, call):
    before = Holdings.now()

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    listener = Listener()
    invitation = listener.invitation()
    made = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(socket, "socketpair", lambda *_: made)
    monkeypatch.setattr(socket, call, refuse)
    with pytest.raises(BrokenError, match="sockets"):
        connect(invitation, 5.0)
    if call == "socket":
        with pytest.raises(BrokenError, match="socket"):
            Listener()
    monkeypatch.undo()
    for each in (listener, *made):
        each.close()
    assert_nothing_left(before)


def test_a_sender_whose_peer_has_no_ring_memory_says_so(monkeypatch):
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def refuse(_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(ring, "create", refuse)
    sender = Sender(Lane(ours, LIMIT_S), 1 << 20, readable=False)
    theirs.send(b"\x06")
    with pytest.raises(BrokenError, match="no memory"):
        sender.send(torch.zeros(LARGE))
    sender.close()
    theirs.close()
