"""The device's part of the NCCL pipe over simulated streams: what the events order, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections import deque
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from kvconnect.cuda import driver, nccl
from kvconnect.cuda.tiles import FROM, NBYTES, TO, table
from kvconnect.errors import BrokenError, HandshakeError
from kvconnect.pipes import nccl_wire
from kvconnect.pipes.nccl_lines import Move, Sender
from kvconnect.pipes.nccl_loop import Pace
from kvconnect.pipes.nccl_wire import RecvWire, SendWire, Setting
from kvconnect.pipes.turns import Turns
from kvconnect.testing.layouts import naive_stream, noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S

BLOCKS, SLOT = 32, 1 << 14


class Device:
    """Streams that run in any order that their events allow, one of them far slower than the rest."""

    def __init__(self, seed):
        self.random, self.streams, self.slow = random.Random(seed), [], seed % 4  # noqa: S311 - a schedule

    def run(self, steps=20):
        for _ in range(steps):
            weights = [1 if i == self.slow else 40 for i in range(len(self.streams))]
            (stream,) = self.random.choices(self.streams, weights)
            if stream.ops and stream.ops[0]():
                stream.ops.popleft()


class Stream:
    def __init__(self, device):
        self.ops, self.ptr = deque(), len(device.streams) + 1
        device.streams.append(self)

    def wait_event(self, event):
        assert event.recorded
        self.ops.append(lambda: event.over)


class Event:
    def __init__(self):
        self.recorded, self.over, self.ptr = False, False, self

    def record(self, stream):
        def op():
            self.over = True
            return True

        self.recorded = True
        stream.ops.append(op)


class Copier:
    def table(self, source, target):
        return table(source, target, 0, 512)

    def launch(self, tiles, part, stream, multiprocessors):
        assert multiprocessors == 3
        pairs = list(zip(part.from_ids, part.to_ids, strict=True))

        def op():
            for a, b in pairs:
                for row in tiles.astype(np.int64).tolist():
                    start = row[FROM] + a * row[FROM + 1] + len(pairs) * row[FROM + 2] + part.from_shift
                    end = row[TO] + b * row[TO + 1] + len(pairs) * row[TO + 2] + part.to_shift
                    ctypes.memmove(end, start, row[NBYTES])
            return True

        stream.ops.append(op)
        return pairs


class Communicator:
    """Two of them copy what one sends to where the other receives, in order."""

    line: ClassVar[deque]
    device: ClassVar[Device]

    def __init__(self, name, *, sends, max_ctas, address, stream):
        assert (name, max_ctas) == (b"name", 7)
        assert address % 256 == 0
        assert stream == len(self.device.streams)
        self.move = self._send if sends else self._recv
        self.looks, self.aborted = 2, False

    def settled(self):
        self.looks -= 1
        return self.looks < 0

    def _send(self, address, nbytes, stream):
        def op():
            if not sent:
                sent.append(True)
                self.line.append((address, nbytes, taken))
            return bool(taken) or self.aborted

        sent, taken = [], []
        self._enqueue(op, stream)

    def _recv(self, address, nbytes, stream):
        def op():
            if self.line:
                start, length, taken = self.line.popleft()
                assert length == nbytes
                ctypes.memmove(address, start, nbytes)
                taken.append(True)
                return True
            return self.aborted

        self._enqueue(op, stream)

    def _enqueue(self, op, stream):
        assert self.looks < 0, "the ranks have not met"
        next(s for s in self.device.streams if s.ptr == stream).ops.append(op)

    def abort(self):
        self.aborted = True


@pytest.fixture(params=range(5))
def device(request, monkeypatch):
    device = Device(request.param)
    kept = []

    def malloc(nbytes):
        kept.append(ctypes.create_string_buffer(nbytes + 256))
        return -(-ctypes.addressof(kept[-1]) // 256) * 256

    runtime = SimpleNamespace(
        malloc=malloc,
        setDevice=lambda _: None,
        eventQuery=lambda event: 0 if event.over else 600,
        streamQuery=lambda ptr: 600 if device.streams[ptr - 1].ops else 0,
        CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {"status": 600}),
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        driver=SimpleNamespace(CUDADriverError=type("CUDADriverError", (RuntimeError,), {})),
        Stream=lambda **_: Stream(device),
        Event=lambda **_: Event(),
        Device=lambda _: contextlib.nullcontext(),
    )
    monkeypatch.setattr(driver, "cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(nccl_wire, "copier", lambda _: Copier())
    staging = nccl_wire._Staging(0)
    monkeypatch.setattr(nccl_wire, "_staging", lambda _: staging)
    monkeypatch.setattr(nccl, "Communicator", Communicator)
    Communicator.device, Communicator.line = device, deque()
    device.staging = staging
    return device


@pytest.fixture
def meetings():
    meetings = Turns("kvconnect-test-meets", 1)
    yield meetings
    meetings.close()


@pytest.fixture
def ends(device, meetings):
    assert not device.streams
    layout = separate_layers(3, BLOCKS, 2, 128)
    memories = [noisy_memory(layout, seed) for seed in (1, 2)]
    settings = [Setting(0, memory, SLOT, max_ctas=7, multiprocessors=3, meetings=meetings) for memory in memories]
    return SendWire(settings[0], b"name"), RecvWire(settings[1], b"name"), *memories


def drive(device, sender, receiver, chunks):
    """Have two lines do the chunks, with the device at its own pace."""
    lines = [Sender(None, LIMIT_S, []) for _ in range(2)]
    for line, wire, side in zip(lines, (sender, receiver), zip(*chunks, strict=True), strict=True):
        line._due.extend((move, None) for move in side)
        line.wired(wire)
    for _ in range(40_000):
        device.run(3)
        if {line.step(0.0) for line in lines} == {Pace.IDLE}:
            return
    raise AssertionError("it never ended")


def moves(theirs, ours, step=2):
    block = 3 * 2 * 128
    pairs = [(theirs[i : i + step], ours[i : i + step]) for i in range(0, len(theirs), step)]
    return [(Move(0, a, len(a) * block), Move(0, b, len(b) * block)) for a, b in pairs]


def test_slots_are_used_anew_only_when_they_are_free(device, ends):
    sender, receiver, source, target = ends
    theirs, ours = (device.random.sample(range(BLOCKS), BLOCKS) for _ in range(2))
    drive(device, sender, receiver, moves(theirs, ours))
    assert naive_stream(target, [ours]).equal(naive_stream(source, [theirs]))


def test_a_chunk_that_nobody_wants_any_more_leaves_the_blocks_alone(device, ends):
    sender, receiver, source, target = ends
    before = naive_stream(target, [range(5, 10)])
    chunks = moves(list(range(20)), list(range(20)), 5)
    chunks[1] = chunks[1][0], Move(0, None, chunks[1][1].nbytes)
    drive(device, sender, receiver, chunks)
    assert naive_stream(target, [range(5, 10)]).equal(before)
    assert naive_stream(target, [range(10, 20)]).equal(naive_stream(source, [range(10, 20)]))


def test_a_chunk_larger_than_a_slot_is_refused(ends):
    for wire in ends[:2]:
        with pytest.raises(HandshakeError, match="does not fit a slot of 16384"):
            wire.launch(Move(0, [1], SLOT + 1))


def test_an_aborted_wire_gives_its_slots_back_when_its_streams_are_empty(device, ends):
    sender, _, _, _ = ends
    while not sender.settled():
        pass
    over = sender.launch(Move(0, [1], 3 * 2 * 128))  # and nobody receives
    device.run(100)
    assert not over()
    assert not sender.at_rest()
    sender.abort()
    assert sender._aborted.wait(LIMIT_S)
    assert not device.staging._free.get(SLOT)
    device.run(2000)
    assert sender.at_rest()
    assert sender.at_rest()
    assert len(device.staging._free[SLOT]) == nccl_wire.SLOTS
    assert len(set(device.staging.take(SLOT, 2))) == 2
    assert not device.staging._free[SLOT]


def test_a_device_that_failed_is_an_error_and_not_a_wait(device, monkeypatch):
    assert not device.streams
    runtime = driver.cupy().cuda.runtime
    monkeypatch.setattr(runtime, "eventQuery", lambda _: 700)
    with pytest.raises(BrokenError, match="700"):
        nccl_wire._event_is_over(Event())
    monkeypatch.setattr(runtime, "streamQuery", lambda _: 700)
    assert nccl_wire._is_over(SimpleNamespace(ptr=1))  # nothing runs on it any more
