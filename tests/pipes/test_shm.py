"""`kvconnect.pipes.shm`: the laws in both modes, and what only this medium has to withstand."""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import struct
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from kvconnect import blocks as paged
from kvconnect.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    DeadlineError,
    EndOfPipe,
    HandshakeError,
    KVConnectError,
    UnavailableBackendError,
)
from kvconnect.paging import LayerLayout, PagedLayout
from kvconnect.pipes import huge_pages, turns, wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.chunks import Threads
from kvconnect.pipes.peer_memory import Beacon
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.shm_lane import Lane, Listener, connect, hung_up
from kvconnect.pipes.shm_messages import INLINE_BYTES, Receiver
from kvconnect.testing.channels import ConnectionChannel
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from kvconnect.testing.peers import open_pair, spawn
from kvconnect.testing.pipe_tests import PipeTests

LIMIT_S = 30.0
LARGE = 8 << 20
MODES = ("direct", "ring")
BLOCKS = 256


class TestDirect(PipeTests):
    """Large messages and blocks are read from the peer's memory."""

    pipe_class = ShmPipe
    options: ClassVar = {"copy": "direct"}


class TestRing(PipeTests):
    """Large messages go through the ring, blocks through the default block path."""

    pipe_class = ShmPipe
    options: ClassVar = {"copy": "ring", "ring_bytes": 1 << 20}
    one_sided = False


@pytest.fixture(params=MODES)
def pair(request):
    pair = open_pair(ShmPipe, {"copy": request.param})
    yield pair
    pair.close()


# -- a peer in a process of its own, which gets killed --------------------------


def _layout():
    layers = tuple(LayerLayout(f"layer{i}", 0, i, 0, 1 << 16, BLOCKS, 1 << 16) for i in range(4))
    return PagedLayout(layers, (BLOCKS << 16,) * 4)


def _serve(connection, blocks_end, mode, deed):
    """Run the serving end of a pipe: open it, do ``deed``, and wait to be killed."""

    def exchange(mine):
        theirs = connection.recv()
        connection.send(mine)
        return theirs

    pipe = ShmPipe.open(PipeSpec("serves", exchange, timeout_s=LIMIT_S, options={"copy": mode}))
    large = torch.full((LARGE,), 5, dtype=torch.uint8)
    if deed == "sends small":
        pipe.send_tensors([torch.ones(10), None])
    elif deed == "announces":
        threading.Thread(target=pipe.send_tensor, args=(large,), daemon=True).start()
        pipe._meet(LIMIT_S)
        threading.Event().wait(0.3)
    elif deed == "receives":
        threading.Thread(target=pipe.recv_tensor, daemon=True).start()
        pipe._meet(LIMIT_S)
    elif deed == "sends on":
        threading.Thread(target=pipe.send_tensors, args=([large] * 10_000,), daemon=True).start()
    elif deed == "lends blocks":
        memory = paged.heap_memory(_layout())
        channel = ConnectionChannel(blocks_end, "peer-channel")
        pipe.attach(memory, _layout(), channel)
        channel.start()
    connection.send("ready")
    threading.Event().wait(120)


class _Peer:
    """The asking end here, the serving end in another process."""

    def __init__(self, context, mode, deed):
        self.connection, theirs = context.Pipe()
        self.channel_end, their_channel_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, their_channel_end, mode, deed), daemon=True)
        self.process.start()
        theirs.close()
        their_channel_end.close()
        spec = PipeSpec("asks", self._exchange, timeout_s=LIMIT_S, options={"copy": mode})
        self.pipe = ShmPipe.open(spec)
        assert self.connection.poll(LIMIT_S)
        assert self.connection.recv() == "ready"

    def _exchange(self, mine):
        self.connection.send(mine)
        assert self.connection.poll(LIMIT_S)
        return self.connection.recv()

    def kill(self):
        self.process.kill()

    def end(self):
        self.kill()
        self.process.join(LIMIT_S)
        self.process.close()
        self.connection.close()
        self.channel_end.close()
        self.pipe.close()


@pytest.fixture
def peer(context):
    """Start a peer that does a deed; afterwards nothing of it may be left in this process."""
    turns.shared().add(lambda: False)  # these threads stay
    Threads.current()
    huge_pages.collapse(paged.heap_memory(PagedLayout((), (64,))))
    before, maps, started = Holdings.now(), _ring_maps(), []

    def start(mode, deed):
        started.append(_Peer(context, mode, deed))
        return started[0]

    yield start
    for each in started:
        each.end()
    del each
    started.clear()
    assert_nothing_left(before)
    assert _ring_maps() == maps


@pytest.fixture(scope="module")
def context():
    """Processes forked from a server that has loaded all they need and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    server = multiprocessing.forkserver._forkserver
    server.ensure_running()
    yield context
    server._stop()


def _ring_maps():
    return Path("/proc/self/maps").read_text().count("kvconnect-ring")


def _kill_while(peer, call):
    """Kill the peer while ``call`` is blocked in a thread; return what it raised."""
    blocked = spawn(call)
    with pytest.raises(TimeoutError):
        blocked.result(0.3)
    peer.kill()
    return blocked.exception(LIMIT_S)


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_killed_before_it_lets_this_end_in_is_broken(peer, mode):
    other = peer(mode, "opens only")
    assert isinstance(_kill_while(other, other.pipe.recv_tensor), BrokenError)
    with pytest.raises(BrokenError):
        other.pipe.send_tensor(torch.ones(3))


def test_a_peer_killed_while_this_end_waits_for_a_message_is_broken(peer):
    other = peer("direct", "receives")
    assert isinstance(_kill_while(other, other.pipe.recv_tensor), BrokenError)


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_killed_while_this_end_waits_for_its_acknowledgement_is_broken(peer, mode):
    other = peer(mode, "opens only")
    large = torch.zeros(LARGE)
    assert isinstance(_kill_while(other, lambda: other.pipe.send_tensor(large)), BrokenError)


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_killed_after_it_announced_a_large_message_is_broken_and_nothing_is_received(peer, mode):
    other = peer(mode, "announces")
    other.kill()
    other.process.join(LIMIT_S)
    out = torch.full((LARGE,), 9, dtype=torch.uint8)
    with pytest.raises(BrokenError):
        other.pipe.recv_tensor_into(out)


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_killed_in_the_middle_of_large_messages_costs_the_message_and_no_more(peer, mode):
    other = peer(mode, "sends on")
    got = []

    def receive():
        while True:
            got.append(int(other.pipe.recv_tensor().sum()))

    receiving = spawn(receive)
    with pytest.raises(TimeoutError):
        receiving.result(0.5)
    other.kill()
    assert isinstance(receiving.exception(LIMIT_S), BrokenError)
    assert got
    assert set(got) == {5 * LARGE}


def test_small_messages_of_a_killed_peer_still_arrive(peer):
    other = peer("direct", "sends small")
    other.kill()
    other.process.join(LIMIT_S)
    assert torch.equal(other.pipe.recv_tensor(), torch.ones(10))
    assert other.pipe.recv_tensor() is None
    with pytest.raises(BrokenError):
        other.pipe.recv_tensor()


def test_a_peer_killed_while_its_blocks_are_read_breaks_the_transfers(peer):
    other = peer("direct", "lends blocks")
    memory = paged.heap_memory(_layout())
    channel = ConnectionChannel(other.channel_end, "own-channel")
    other.pipe.attach(memory, _layout(), channel)
    channel.start()
    ids = [list(range(BLOCKS))]
    other.pipe.read_blocks(ids, ids).wait(LIMIT_S)

    def read_on():
        while True:
            other.pipe.read_blocks(ids, ids).wait(LIMIT_S)

    assert isinstance(_kill_while(other, read_on), BrokenError)
    other.process.join(LIMIT_S)
    with pytest.raises(BrokenError):
        other.pipe.write_blocks(ids, ids)
    channel._reader.join(LIMIT_S)


# -- being sure whose memory it is ------------------------------------------------


def _attached(options=None):
    pair = open_pair(ShmPipe, options or {"copy": "direct"})
    mine, theirs = paged.heap_memory(_layout()), paged.heap_memory(_layout())
    for region in theirs.owner:
        region.fill_(3)
    return pair, mine, theirs


def test_blocks_of_a_process_that_is_no_longer_the_peer_never_count_as_read():
    pair, mine, theirs = _attached()
    pair.there.attach(theirs, mine.layout, pair.channels[1])
    pair.here.attach(mine, theirs.layout, pair.channels[0])
    pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    # Another program under the same number would not show these bytes.
    pair.there._beacon._bytes[:] = 0
    with pytest.raises(BrokenError, match="beacon"):
        pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    pair.close()


def test_the_peer_is_looked_at_again_after_the_copy(monkeypatch):
    pair, mine, theirs = _attached()
    pair.there.attach(theirs, mine.layout, pair.channels[1])
    pair.here.attach(mine, theirs.layout, pair.channels[0])
    pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    peer = pair.here._peer
    read = peer.read

    def read_and_vanish(local, remote):
        read(local, remote)
        if int(remote[0, 1]) > 1000:
            pair.there._beacon._bytes[:] = 0

    monkeypatch.setattr(peer, "read", read_and_vanish)
    transfer = pair.here.read_blocks([[1]], [[2]])
    with pytest.raises(BrokenError, match="beacon"):
        transfer.wait(LIMIT_S)
    pair.close()


def test_a_tensor_of_a_process_that_is_no_longer_the_peer_is_not_delivered():
    pair = open_pair(ShmPipe, {"copy": "direct"})
    sending = spawn(lambda: pair.there.send_tensor(torch.ones(LARGE)))
    pair.there._beacon._bytes[:] = 0
    with pytest.raises(BrokenError, match="beacon"):
        pair.here.recv_tensor()
    assert isinstance(sending.exception(LIMIT_S), BrokenError)
    pair.close()


def test_blocks_of_a_closed_pipe_are_not_read():
    pair, mine, theirs = _attached()
    pair.there.attach(theirs, mine.layout, pair.channels[1])
    pair.here.attach(mine, theirs.layout, pair.channels[0])
    pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    pair.there.close()
    with pytest.raises(BrokenError, match="closed"):
        pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    pair.close()


# -- falling back to the ring -----------------------------------------------------


def _uses_ring(pair):
    sending = spawn(lambda: pair.there.send_tensor(torch.arange(LARGE // 8)))
    assert torch.equal(pair.here.recv_tensor(), torch.arange(LARGE // 8))
    sending.result(LIMIT_S)
    return pair.here._ends[1]._ring is not None


def test_where_the_peer_may_be_read_no_ring_is_made():
    pair = open_pair(ShmPipe)
    assert not _uses_ring(pair)
    pair.close()


@pytest.mark.parametrize("change", [{"pid": 1 << 22}, {"beacon": bytes(32)}, {"address": 8}, {"pidns": 1}])
def test_a_peer_that_cannot_be_read_is_reached_through_the_ring(monkeypatch, change):
    card = Beacon.card
    if "pidns" in change:
        namespaces = iter(range(9))
        monkeypatch.setattr("kvconnect.pipes.shm.host.identity", lambda: {"pidns": next(namespaces)})
    else:
        monkeypatch.setattr(Beacon, "card", lambda self: card(self) | change)
    if "pid" in change:
        monkeypatch.setattr("kvconnect.pipes.shm.Listener.accept", _accept_any(Listener.accept))
    pair = open_pair(ShmPipe)
    assert pair.here._peer is None
    assert _uses_ring(pair)
    pair.close()


def _accept_any(accept):
    return lambda self, wait_s, timeout_s, _pid: accept(self, wait_s, timeout_s, None)


def test_direct_copy_that_is_not_possible_says_so_at_opening(monkeypatch):
    card = Beacon.card
    monkeypatch.setattr(Beacon, "card", lambda self: card(self) | {"beacon": bytes(32)})
    before = Holdings.now()
    with pytest.raises(UnavailableBackendError, match="cannot be read"):
        open_pair(ShmPipe, {"copy": "direct"})
    assert_nothing_left(before)


@pytest.mark.parametrize("first", ["here", "there"])
def test_if_one_end_cannot_read_the_other_both_stream_their_blocks(first):
    pair, mine, theirs = _attached({"copy": "auto"})
    pair.there._peer.close()
    pair.there._peer = None
    ends = [(pair.here, mine, 0), (pair.there, theirs, 1)]
    for pipe, memory, number in ends if first == "here" else reversed(ends):
        pipe.attach(memory, _layout(), pair.channels[number])
    pair.here.read_blocks([[5, 6]], [[1, 9]]).wait(LIMIT_S)
    assert [int(mine.owner[2][block << 16]) for block in (1, 9, 5)] == [3, 3, 0]
    mine.owner[0].fill_(8)
    pair.there.read_blocks([[0]], [[0]]).wait(LIMIT_S)
    assert int(theirs.owner[0][0]) == 8
    pair.close()


def test_a_transfer_asked_for_before_the_peer_is_attached_waits_for_it():
    pair, mine, theirs = _attached()
    pair.here.attach(mine, _layout(), pair.channels[0])
    early, unwanted = pair.here.read_blocks([[5]], [[1]]), pair.here.read_blocks([[5]], [[2]])
    unwanted.cancel()
    with pytest.raises(KVConnectError, match="cancelled"):
        unwanted.wait(LIMIT_S)
    with pytest.raises(DeadlineError):
        early.wait(0.1)
    pair.there.attach(theirs, _layout(), pair.channels[1])
    early.wait(LIMIT_S)
    assert int(mine.owner[0][1 << 16]) == 3
    assert int(mine.owner[0][2 << 16]) == 0
    pair.close()


def test_a_transfer_that_waits_for_the_peer_ends_with_the_pipe():
    pair, mine, _ = _attached()
    pair.here.attach(mine, _layout(), pair.channels[0])
    early = pair.here.read_blocks([[5]], [[1]])
    pair.here.close()
    with pytest.raises(ClosedError):
        early.wait(LIMIT_S)
    pair.close()


# -- messages ---------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, (4 << 20) + 1, (6 << 20) + 3])
def test_messages_around_each_limit_arrive_whole(pair, nbytes):
    sent = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
    for _ in range(2):
        sending = spawn(lambda: pair.here.send_tensor(sent))
        assert torch.equal(pair.there.recv_tensor(), sent)
        sending.result(LIMIT_S)


def test_two_ends_that_both_send_small_messages_first_do_not_wait_for_each_other(pair):
    for end in (pair.here, pair.there):
        spawn(lambda end=end: end.send_tensor(torch.ones(INLINE_BYTES // 4))).result(LIMIT_S)
    for end in (pair.here, pair.there):
        assert torch.equal(end.recv_tensor(), torch.ones(INLINE_BYTES // 4))


def test_a_large_message_is_received_into_strided_memory(pair):
    out = torch.zeros(LARGE // 8, 2, dtype=torch.int32).t()
    sent = torch.arange(LARGE // 4, dtype=torch.int32).reshape(2, -1)
    sending = spawn(lambda: pair.here.send_tensor(sent))
    pair.there.recv_tensor_into(out)
    sending.result(LIMIT_S)
    assert torch.equal(out, sent)


def test_a_message_that_its_sender_gave_up_is_never_delivered(pair):
    short = pair.another(timeout_s=0.2)
    tensor = torch.ones(LARGE)
    with pytest.raises(DeadlineError):
        short.here.send_tensor(tensor)
    tensor.fill_(7)
    with pytest.raises(BrokenError):
        short.there.recv_tensor()


def test_closing_while_the_own_send_waits_is_no_orderly_end(pair):
    sending = spawn(lambda: pair.here.send_tensor(torch.ones(LARGE)))
    with pytest.raises(TimeoutError):
        sending.result(0.2)
    pair.here.close()
    assert isinstance(sending.exception(LIMIT_S), ClosedError)
    with pytest.raises(BrokenError):
        pair.there.recv_tensor()


def test_a_serving_end_that_closes_before_it_met_its_peer_ends_the_pipe_in_order():
    pair = open_pair(ShmPipe)
    pair.there.close()
    with pytest.raises(EndOfPipe):
        pair.here.recv_tensor()
    pair.close()


GARBAGE = [
    b"\x09",
    b"\x01",
    b"\x01" + bytes(100),
    b"\x01" + wire.encode(torch.ones(4))[0] + b"too short",
    b"\x01" + wire.encode(torch.ones(4))[0] + bytes(17),
    b"\x02",
    struct.pack("<BQ", 2, 4096),
    struct.pack("<BQ", 2, 4096) + wire.encode(torch.ones(4))[0][:-1],
    struct.pack("<BQ", 2, 4096) + wire.control(wire.Kind.NONE),
    b"\x03",
]


@pytest.mark.parametrize("packet", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_not_a_message_breaks_the_pipe_at_the_receiver(packet):
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver = Receiver(Lane(ours, 1.0), None)
    theirs.send(packet)
    for _ in range(2):
        with pytest.raises(BrokenError):
            receiver.receive()
    receiver.close()
    theirs.close()


# -- meeting ------------------------------------------------------------------------


def test_a_stranger_is_turned_away_and_the_peer_gets_in():
    listener = Listener()
    invitation = listener.invitation()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect("\0" + invitation["name"])
    stranger.send(b"let me in")
    wrong = connect(invitation | {"token": bytes(16)}, 5.0)
    right = connect(invitation, 5.0)
    out, into = listener.accept(5.0, 5.0, os.getpid())
    right[0].send(b"x")
    assert into.recv_tag() == ord("x")
    assert all(hung_up(lane) for lane in wrong)
    for each in (*wrong, *right, out, into, stranger, listener):
        each.close()


def test_nobody_from_another_process_is_let_in():
    listener = Listener()
    lanes = connect(listener.invitation(), 5.0)
    with pytest.raises(DeadlineError):
        listener.accept(0.3, 5.0, os.getpid() + 1)
    for each in (*lanes, listener):
        each.close()


@pytest.mark.parametrize("theirs", [{}, {"pid": 1}, {"pid": "x", "address": 1, "beacon": b""}])
def test_an_answer_that_is_no_invitation_is_refused_at_opening(theirs):
    before = Holdings.now()
    with pytest.raises((HandshakeError, BrokenError)):
        ShmPipe.open(PipeSpec("asks", lambda _: theirs))
    assert_nothing_left(before)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"copy": "fast"}, "pipe.copy"), ({"ring_bytes": 10}, "pipe.ring_bytes"), ({"rings": 2}, "pipe.rings")],
)
def test_a_wrong_option_is_named(options, names):
    with pytest.raises(ConfigError, match=names):
        ShmPipe.open(PipeSpec("asks", dict, options=options))


def test_only_one_host_and_one_network_namespace_can_be_reached():
    here = ShmPipe.descriptor("cpu")
    assert ShmPipe.can_reach(here, here)
    assert ShmPipe.can_reach(here, here | {"pidns": 1})
    assert "hosts" in ShmPipe.can_reach(here, here | {"host": "x"}).reason
    assert "network" in ShmPipe.can_reach(here, here | {"netns": 1}).reason


def test_availability_is_an_answer_and_not_an_error(monkeypatch):
    assert ShmPipe.availability()

    def refuse(*_):
        raise PermissionError("filtered")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert "pidfd" in ShmPipe.availability().reason
