"""What the two ends of a TCP block connection ask of each other at the same time."""

from __future__ import annotations

import socket

from kvconnect.pipes import tcp_frames
from kvconnect.pipes.base import Transfer
from kvconnect.pipes.tcp_frames import READS
from kvconnect.pipes.tcp_requests import BlockRequests
from kvconnect.pipes.wire import Kind
from kvconnect.testing.layouts import naive_stream, noisy_memory, separate_layers


def test_a_cancel_does_not_touch_a_request_of_the_peer_with_the_same_number() -> None:
    mine = noisy_memory(separate_layers(2, 8, 2, 64), 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        requests = BlockRequests(mine, 1 << 20)
        requests.read(1, mine.iovec([[0]]), Transfer(1), tcp_frames.pack_ids([[0]]))
        request = tcp_frames.pack(Kind.READ, READS, 1, payload=tcp_frames.pack_ids([[5, 6]]))
        theirs.sendall(request[:-6])  # the ids are not whole yet
        requests.reader.pump(ours.fileno(), 1 << 20)
        requests.cancel(1)
        theirs.sendall(request[-6:])
        requests.reader.pump(ours.fileno(), 1 << 20)
        while requests.writer.busy:
            requests.writer.pump(ours.fileno())
        sent = theirs.recv(1 << 20)
    assert sent.endswith(naive_stream(mine, [[5, 6]]).numpy().tobytes())
