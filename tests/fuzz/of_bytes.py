"""Targets: what sockets and shared memory bring: headers, frames, packets, chunks, checksums."""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import struct

import numpy as np
import torch
from hypothesis import strategies as st

from kvconnect.blocks import heap_memory
from kvconnect.buffers import arena
from kvconnect.errors import BrokenError, LoadError
from kvconnect.paging import LayerLayout, PagedLayout
from kvconnect.pipes import reactor, ring, tcp_checksum, tcp_frames, tcp_handshake, tcp_listener, tcp_meeting, wire
from kvconnect.pipes.base import Transfer
from kvconnect.pipes.peer_memory import Beacon, PeerMemory
from kvconnect.pipes.peer_process import PeerProcess
from kvconnect.pipes.shm_blocks import Word
from kvconnect.pipes.shm_lane import Lane, Listener, connect
from kvconnect.pipes.shm_messages import Receiver, Sender
from kvconnect.pipes.tcp_link import Link
from kvconnect.pipes.tcp_messages import messages
from kvconnect.pipes.tcp_requests import BlockRequests
from kvconnect.pipes.wire import HEADER_BYTES, Kind
from tests.fuzz.harness import Target, refused
from tests.fuzz.strategies import EDGES, damaged, mutated, noise

LIMIT = 1 << 16
TENSORS = [torch.arange(6.0).reshape(2, 3), torch.zeros(0, 4), torch.ones(()), torch.zeros([1] * 9), torch.ones(700)]


def message(tensor):
    header, dense = wire.encode(tensor)
    return header + (b"" if dense is None else dense.reshape(-1).view(torch.uint8).numpy().tobytes())


MESSAGES = [*map(message, TENSORS), wire.control(Kind.NONE), wire.control(Kind.END), wire.control(Kind.ACK)]

# -- headers, checksums, streams of an entry -----------------------------------------------------


def run_header(data):
    with refused:
        size = HEADER_BYTES + wire.read(data[:HEADER_BYTES])
        meta = wire.decode(data[:size], LIMIT)
        assert meta.nbytes <= LIMIT
        assert meta.kind is not Kind.TENSOR or meta.empty().nbytes == meta.nbytes


def run_seal(data):
    with refused:
        tcp_checksum.check_seal(data[:24], data[24:40].ljust(16, b"\0"))
    assert tcp_checksum.check_seal(b"head", tcp_checksum.seal(b"head", 7)) == 7


def _entry(tensors):
    return torch.cat(arena.encode(tensors)).numpy().tobytes()


_NONES = struct.pack("<II", 1 << 31, 64 * 4000) + wire.control(Kind.NONE) * 4000
_ENTRIES = [_entry(TENSORS), _entry([]), _entry([torch.zeros(0)] * 300), _NONES]


def run_entry(data):
    try:
        found = arena.decode(
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
    except LoadError:
        return
    assert sum(tensor.nbytes for tensor in found) <= len(data)


# -- tensors over TCP ------------------------------------------------------------------------------


@functools.cache
def _door():
    sock = socket.create_server(("127.0.0.1", 0))
    sock.settimeout(5)
    return sock


def tcp_pair():
    theirs = socket.create_connection(_door().getsockname(), 5)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no TIME_WAIT for each example
    ours, _ = _door().accept()
    return theirs, ours


def sealed(data):
    """What a sender with checksums makes of one message."""
    fixed, rest = data[:HEADER_BYTES], data[HEADER_BYTES:]
    return fixed + tcp_checksum.seal(fixed, tcp_checksum.of(rest)) + rest


def run_tensors(example):
    checksum, data = example
    theirs, ours = tcp_pair()
    link = Link(ours, 5.0)
    protocol = messages(checksum=bool(checksum))
    try:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with refused:
            while True:
                header = protocol.recv_head(link)
                assert header is not None
                meta = wire.decode(header, LIMIT)
                place = np.empty(max(1, meta.nbytes), dtype=np.uint8)
                protocol.recv_body(link, place.ctypes.data, meta.nbytes)
    finally:
        link.end(reset=True)
        theirs.close()


# -- blocks over TCP -------------------------------------------------------------------------------

_PIECE, _STRIDE = 48, 64
BLOCKS_LAYOUT = PagedLayout(
    (
        LayerLayout("l0", 0, 0, 0, 4 * _STRIDE, 8, _PIECE, ((2, _STRIDE),)),
        LayerLayout("l1", 1, 0, 2 * _STRIDE, 4 * _STRIDE, 8, _PIECE),
    ),
    (8 * 4 * _STRIDE,),
)
_IDS = tcp_frames.pack_ids([[1, 2], [3]])
_SIZE = BLOCKS_LAYOUT.nbytes([[1, 2], [3]])
_BITS = bytes(range(256)) * 4
#: Frames as ``[kind, side, transfer, offset, bytes announced beyond the payload, payload]``.
FRAMES = [
    [[Kind.READ, 0, 5, 0, 0, _IDS]],
    [[Kind.READ, 0, 5, 0, 0, _IDS], [Kind.CANCEL, 0, 5, 0, 0, b""], [Kind.CANCEL, 0, 6, 0, 0, b""]],
    [
        [Kind.WRITE, 1, 9, 0, 0, _IDS],
        [Kind.DATA, 1, 9, 0, 0, _BITS[:100]],
        [Kind.DATA, 1, 9, 100, 0, _BITS[: _SIZE - 100]],
    ],
    [[Kind.DATA, 0, 1, 0, 0, _BITS[:_SIZE]], [Kind.ACK, 1, 2, 0, 0, b""]],
    [[Kind.DATA, 0, 1, 0, 0, _BITS[:64]], [Kind.ERROR, 0, 1, 0, 0, b"LoadError: gone"], [Kind.ERROR, 1, 2, 0, 0, b"x"]],
    [[Kind.WRITE, 1, 9, 0, 0, _IDS], [Kind.CANCEL, 1, 9, 0, 0, b""]],
]


def pack_frames(frames, checksum):
    data = b""
    for frame in frames if isinstance(frames, list) else []:
        if not isinstance(frame, list) or len(frame) != 6 or not isinstance(frame[5], bytes):
            continue
        kind, side, transfer, offset, beyond = (n if isinstance(n, int) else 0 for n in frame[:5])
        numbers = kind & 255, side & 255, transfer & 0xFFFFFFFF, offset & ((1 << 64) - 1)
        header = struct.pack("<HBBIQQ", tcp_frames.MAGIC, *numbers, (len(frame[5]) + beyond) & ((1 << 64) - 1))
        seal = tcp_checksum.seal(header, tcp_checksum.of(frame[5])) if checksum else b""
        data += header + seal + frame[5]
    return data


def _requests(memory, checksum):
    """Both ends' requests, with a read (1) and a write (2) of this end under way."""
    requests = BlockRequests(memory, 4096, checksum=checksum)
    transfers = [Transfer(_SIZE), Transfer(_SIZE)]
    requests.read(1, memory.iovec([[4, 5], [4]]), transfers[0], _IDS)
    requests.write(2, memory.iovec([[6, 7], [5]]), transfers[1], _IDS)
    return requests, transfers


def _pump(requests, ours, theirs):
    """Move all that comes, and all that goes, until neither moves."""
    moved = True
    while moved:
        moved = requests.reader.pump(ours.fileno(), 1 << 20)
        while requests.writer.busy and requests.writer.pump(ours.fileno()):
            moved = True
            theirs.recv(1 << 20)


def unix_pair():
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
    return pair


def run_frames(example):
    checksum, frames = bool(example[0]), example[1]
    data = frames if isinstance(frames, bytes) else pack_frames(frames, checksum)
    memory = heap_memory(BLOCKS_LAYOUT)
    requests, transfers = _requests(memory, checksum)
    theirs, ours = unix_pair()
    try:
        with refused:
            for start in range(0, len(data), 65536):
                theirs.send(data[start : start + 65536])
                _pump(requests, ours, theirs)
        for transfer in requests.clear():
            transfer.finish(BrokenError("over"))
        assert all(transfer.done for transfer in transfers)
    finally:
        ours.close()
        theirs.close()
    (region,) = memory.owner
    assert not region.view(-1, _STRIDE)[:, _PIECE:].any(), "bytes between the blocks were written"
    _still_reads(memory, checksum)


def _still_reads(memory, checksum):
    """The same memory serves another connection."""
    requests = BlockRequests(memory, 4096, checksum=checksum)
    theirs, ours = unix_pair()
    try:
        theirs.send(pack_frames(FRAMES[0], checksum))
        requests.reader.pump(ours.fileno(), 1 << 20)
        requests.writer.pump(ours.fileno())
        got = theirs.recv(1 << 20)
        head = tcp_frames.unpack(got[: tcp_frames.FRAME_BYTES])
        assert (head.kind, head.transfer, head.nbytes) == (Kind.DATA, 5, _SIZE)
    finally:
        ours.close()
        theirs.close()


def run_ids(data):
    with refused:
        blocks = tcp_frames.unpack_ids(data)
        BLOCKS_LAYOUT.check(blocks)
        BLOCKS_LAYOUT.pieces(blocks)


# -- how ends of TCP pipes meet --------------------------------------------------------------------------


@functools.cache
def _listener():
    return tcp_listener.acquire(reactor.shared(), "127.0.0.1", 0)


def run_newcomer(data):
    listener, arrived = _listener(), []
    for hello in (data, tcp_listener.GREETING + listener.expect(arrived.append)):
        with socket.create_connection(("127.0.0.1", listener.port), 5) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if hello is data:
                with refused_by_peer:
                    sock.sendall(hello)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(4096):
                        pass
                assert not arrived, "somebody without a token was let in"
                continue
            sock.sendall(hello)
            _wait_for(lambda: arrived)
    arrived[0].close()


class _RefusedByPeer:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        return isinstance(error, OSError)


refused_by_peer = _RefusedByPeer()


def _wait_for(condition):
    assert reactor.shared().run(lambda: None, 5)
    for _ in range(200):
        if condition():
            return
        assert reactor.shared().run(lambda: None, 5)
    raise AssertionError("a valid newcomer was not let in")


_INVITATION = {
    "tcp": 2, "checksum": True, "tls": True, "secret": b"s" * 16,
    "host": "127.0.0.1", "port": 80, "token": b"t" * 16, "blocks": b"b" * 16,
}  # fmt: skip


def run_tcp_meeting(body):
    if not isinstance(body, dict):
        return  # `fields.mapping` has looked
    with refused:
        tcp_meeting._wants_checksum(body)
    for ours in (False, True):
        with refused:
            tcp_meeting._check_tls(body, ours=ours)
    with refused:
        assert len(tcp_meeting._secret(body)) == tcp_handshake.SECRET_BYTES
    with refused:
        host, port, token, blocks = tcp_meeting._checked(body)
        assert 0 < port < 65536
        assert len(token) == len(blocks) == 16
        assert host.encode("idna")


# -- shared memory -----------------------------------------------------------------------------------------

_beacon = Beacon()
_PEER = {**_beacon.card(), "pidns": PeerProcess.card()["pidns"], "name": "kvconnect-fuzz-nobody", "token": b"t" * 16}
_WORD = {"direct": True, "streams": False, "bases": [4096, 1 << 40]}


def run_shm_meeting(body):
    if not isinstance(body, dict):
        return
    for make in (PeerMemory, PeerProcess):
        with refused:
            make(body).close()
    with refused:
        connect(body, 0.5)
    with refused:
        word = Word.read(body, 2)
        assert word.bases.shape == (2,)
    PeerMemory(_PEER).close()


def _fd(kind):
    """Return a descriptor of some kind to pass along."""
    if kind == "ring":
        made, fd = ring.create(1 << 16)
        made.close()
        return fd
    if kind == "unsealed":
        fd = os.memfd_create("fuzz")
        os.ftruncate(fd, 1 << 16)
        return fd
    if kind == "socket":
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.close()
        return one.detach()
    return os.open("/dev/null", os.O_RDONLY)


def _send_packets(sock, packets):
    """Send packets: bytes, or ``[bytes, kind of a descriptor]``."""
    for packet in packets if isinstance(packets, list) else []:
        data, fds = packet, []
        if isinstance(packet, list) and len(packet) == 2 and isinstance(packet[0], bytes):
            data, fds = packet[0], [_fd(packet[1])]
        if isinstance(data, bytes):
            try:
                socket.send_fds(sock, [data[:60000]], fds)
            except OSError:
                pass  # the other end's buffer is full: it has enough
            finally:
                for fd in fds:
                    os.close(fd)


_LARGE = wire.encode(torch.zeros(40000))[0]
_TAG_LARGE = struct.pack("<BQ", 2, 4096)
PACKETS = [
    [b"\x01" + one for one in MESSAGES],
    [b"\x01" + MESSAGES[0], b"\x01" + MESSAGES[0], b"\x01" + MESSAGES[6]],
    [_TAG_LARGE + _LARGE, [b"\x03", "ring"], *[b"\x04"] * 10, b"\x01" + MESSAGES[0]],
    [_TAG_LARGE + _LARGE, [b"\x03", "unsealed"], b"\x04"],
    [_TAG_LARGE + _LARGE, [b"\x03", "socket"], b"\x04"],
    [b"", b"\x01", b"\x02", b"\x09"],
]


def run_lane(packets):
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    receiver = Receiver(Lane(ours, 2.0), None)
    try:
        _send_packets(theirs, packets)
        theirs.shutdown(socket.SHUT_WR)
        with refused:
            while True:
                receiver.receive()
    finally:
        receiver.close()
        theirs.close()


REPLIES = [[b"\x05"], [b"\x06", *[b"\x07"] * 3, b"\x05"], [b"\x06", b"\x07"], [b"\x06\x07"], [[b"\x05", "ring"]]]


def run_replies(packets):
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    sender = Sender(Lane(ours, 2.0), 1 << 16, readable=True)
    try:
        _send_packets(theirs, packets)
        theirs.shutdown(socket.SHUT_WR)
        with refused:
            sender.send(torch.ones(120_000))
    finally:
        sender.close()
        theirs.close()


def run_visitor(packets):
    """Somebody else comes to where the peer is expected, and then the peer."""
    listener = Listener()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.setblocking(False)
    try:
        stranger.connect("\0" + listener.invitation()["name"])
        _send_packets(stranger, packets)
        stranger.close()
        theirs = connect(listener.invitation(), 2.0)
        ours = listener.accept(2.0, 2.0, os.getpid())
        for out, into in ((theirs[0], ours[1]), (ours[0], theirs[1])):
            out.send(b"x")
            assert into.recv_tag() == ord("x")
            out.close()
            into.close()
    finally:
        stranger.close()
        listener.close()


def run_ring(example):
    size, seal = example
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size & 0x7FFFFFFF)
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal & 15)
        with refused:
            found = ring.adopt(fd)
            ctypes.string_at(found.slot(ring.SLOTS - 1), found.slot_bytes if found.slot_bytes < 1 << 20 else 1)
            found.close()
    finally:
        os.close(fd)


_checked_frames = st.tuples(st.booleans(), mutated(FRAMES))
_raw_frames = st.tuples(
    st.booleans(), st.booleans().flatmap(lambda on: noise([pack_frames(one, on) for one in FRAMES]))
)
_tensors = st.one_of(
    st.tuples(st.just(0), noise([a + b for a in MESSAGES for b in MESSAGES[:3]])),
    st.tuples(st.just(1), noise([sealed(a) + sealed(b) for a in MESSAGES for b in MESSAGES[:3]])),
    st.tuples(st.just(1), damaged(MESSAGES).map(sealed)),
)
_HELLO = tcp_listener.GREETING + b"t" * 16

TARGETS = [
    Target("wire_header", noise(MESSAGES), run_header),
    Target("tcp_seal", noise([b"h" * 24 + tcp_checksum.seal(b"h" * 24, 1)]), run_seal),
    Target("stored_entry", noise(_ENTRIES), run_entry, per_byte=256),
    Target("tcp_tensors", _tensors, run_tensors, fixed_bytes=LIMIT),
    Target("tcp_blocks", _checked_frames | _raw_frames, run_frames, per_byte=256, fixed_bytes=1 << 20),
    Target(
        "tcp_block_ids", noise([_IDS, tcp_frames.pack_ids([]), tcp_frames.pack_ids([[]] * 9)]), run_ids, per_byte=256
    ),
    Target("tcp_newcomer", noise([_HELLO, tcp_listener.GREETING]), run_newcomer),
    Target("tcp_meeting", mutated([_INVITATION]), run_tcp_meeting),
    Target("shm_meeting", mutated([_PEER, _WORD, {**_PEER, **_WORD}]), run_shm_meeting),
    Target("shm_visitor", mutated([[[b"t" * 16, "socket"]], [b"", b"x"], *PACKETS[:1]]), run_visitor),
    Target("shm_messages", mutated(PACKETS), run_lane, fixed_bytes=4 << 20),
    Target("shm_replies", mutated(REPLIES), run_replies, fixed_bytes=4 << 20),
    Target("shm_ring", st.tuples(st.sampled_from(EDGES), st.integers(0, 15)), run_ring),
]
