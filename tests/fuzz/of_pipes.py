"""Targets: how pipes are opened, by whom, and how the tensors of device pipes travel."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import struct
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import msgpack
import torch
from hypothesis import strategies as st

from kvconnect import sums
from kvconnect.buffers.base import Claim, EndSettings, LookupKey
from kvconnect.buffers.integrity import Integrity
from kvconnect.buffers.mover import Mover
from kvconnect.config import Backend, Config, parse_backend
from kvconnect.cuda import ipc
from kvconnect.errors import BrokenError, EndOfPipe, KVConnectError
from kvconnect.pipes import companion, host, wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.cuda_ipc import CudaIpcPipe
from kvconnect.pipes.cuda_ipc_staging import CudaIpcMedium
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.pipes.nccl import NcclPipe
from kvconnect.pipes.nixl import NixlMedium
from kvconnect.pipes.peer_memory import Beacon
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.staged import StagedTensors
from kvconnect.pipes.tcp import TcpPipe
from tests.fuzz.harness import Target, refused
from tests.fuzz.of_blocks import LAYOUT_MEMORY, READ, _Agent, _Beside, _Sink
from tests.fuzz.of_bytes import MESSAGES
from tests.fuzz.strategies import mutated, noise

# -- CUDA IPC ------------------------------------------------------------------------------------------------

_EXPORT = {"process": "p" * 16, "regions": [[b"h" * 64, 1 << 40, 0], [b"h" * 64, 1 << 40, 512]]}
_STAGING = {"process": "p" * 16, "regions": [[b"h" * 64, 1 << 40, 0]], "address": 1 << 40, "nbytes": 1 << 20}


def run_export(body):
    if isinstance(body, dict):
        with refused:
            rows = ipc._checked(body, 2)
            assert all(len(handle) == 64 and address >= 0 <= offset for handle, address, offset, _ in rows)


def run_staging_card(data):
    def mapped(exported, sizes, device):
        assert device == 0
        assert len(ipc._checked(exported, len(sizes))) == 1
        return SimpleNamespace(bases=[0], close=lambda: None)

    with mock.patch.object(ipc, "Mapped", mapped):
        medium = CudaIpcMedium(0)
        with refused:
            medium.meet(data)
        medium.meet(msgpack.packb(_STAGING))
        assert medium._theirs == (1 << 40, 1 << 20)


# -- tensors by way of staging memory --------------------------------------------------------------------------

_AREA = torch.arange(1 << 16, dtype=torch.int64).view(torch.uint8)


class _Medium:
    device = "cpu"

    def allocate(self, nbytes):
        area = torch.zeros(nbytes, dtype=torch.uint8)
        return SimpleNamespace(address=area.data_ptr(), card=b"card", free=lambda **_: area)

    def stage(self, source, address):
        ctypes.memmove(address, source.data_ptr(), source.nbytes)

    def meet(self, card):
        if card != b"card":
            raise BrokenError("no card")

    def fetch(self, address, out):
        if not 0 <= address <= address + out.nbytes <= _AREA.nbytes:
            raise BrokenError("outside")
        out.copy_(_AREA[address : address + out.nbytes])

    def end(self):
        pass


class _Frames(_Sink):
    """A host pipe on which these frames come."""

    def __init__(self, frames):
        super().__init__()
        self._frames = deque(frames if isinstance(frames, list) else [])

    def recv_tensor(self):
        if not self._frames:
            raise EndOfPipe("no more")
        frame = self._frames.popleft()
        if not isinstance(frame, bytes):
            return None
        return torch.frombuffer(bytearray(frame), dtype=torch.uint8) if frame else torch.empty(0, dtype=torch.uint8)

    def abort(self):
        pass


_BIG = wire.encode(torch.zeros(50_000, dtype=torch.uint8))[0]
_STAGED = [
    [b"T" + message for message in MESSAGES[:6]],
    [b"Ccard", b"T" + _BIG, b"S" + struct.pack("<IQQ", 0, 40_000, 0), b"S" + struct.pack("<IQQ", 1, 10_000, 64)],
    [b"T" + _BIG, b"Ccard", b"T" + MESSAGES[0], b"X", b""],
]
_ACKS = [[struct.pack("<I", n) for n in (0, 1, 0, 1)], [struct.pack("<I", 9)], [b"", b"abc"]]


def run_staged(example):
    frames, acknowledgements = example
    host_pipes = companion.Companion("fake", _Frames(acknowledgements), _Frames(frames), {})
    tensors = StagedTensors(
        host_pipes, _Medium(), slots=2, slot_bytes=1 << 14, timeout_s=2.0, max_message_bytes=1 << 16
    )
    with refused:
        while True:
            tensors.receive()
    with refused:
        tensors.send(torch.zeros(50_000, dtype=torch.uint8))
    tensors.abort()


# -- the host pipes beside --------------------------------------------------------------------------------------

_BEACON = Beacon()


def _offer():
    shm = {**_BEACON.card(), "pidns": host.identity()["pidns"]}
    hosts = [["shm", {"at": host.identity(), "messages": [shm, shm]}]]
    hosts.append(["tcp", {"at": host.identity(), "messages": [{"tcp": 2, "checksum": True}] * 2}])
    return {"own": {"uuid": "GPU-1", "nccl": 22809}, "hosts": hosts}


def run_companion(theirs):
    if not isinstance(theirs, dict):
        return  # `fields.mapping` has looked
    spec = PipeSpec("serves", lambda _: theirs, "cpu", 2.0)
    with refused:
        companion.join(spec, {}, parse_backend("pipe.companion", "auto")).abort()


def run_opening(theirs):
    """Serving ends of host pipes open whatever the other end sends, or refuse."""
    if isinstance(theirs, dict):
        with refused:
            TcpPipe(PipeSpec("serves", lambda _: theirs, "cpu", 2.0)).abort()


# -- pipes that peers ask a worker for ---------------------------------------------------------------------------


def _mover(engine, pipe, *, produces):
    options = Config(transfer_timeout_s=2.0)
    mover = Mover(
        EndSettings(engine, {"model": "m"}, 1, produces, not produces, options, Backend(pipe)), 0, LAYOUT_MEMORY
    )
    atexit.register(mover.close)
    return mover


@functools.cache
def _worker():
    return _mover("P", "auto", produces=True)


def _opening(pipe="n1", name="tcp"):
    station = _worker()._pipes._station
    theirs = {**station.worker, "endpoint": "127.0.0.1:9", "device": "cpu"}
    message = {"tcp": 2, "checksum": True}
    return {"pipe": pipe, "name": name, "message": message, "hello": station.me.to_wire(), "worker": theirs}


@functools.cache
def _asked():
    shm = {**_opening(name="shm"), "message": _offer()["hosts"][0][1]["messages"][0]}
    call = {"pipe": "n1/serves", "op": "shm.memory", "body": {"direct": True, "streams": True, "bases": [1, 2]}}
    return [
        [["open", _opening()], ["ready", {"pipe": "n1"}], ["ping", {"pipe": "n1/serves"}], ["close", {"pipe": "n1"}]],
        [
            ["open", shm],
            ["call", call],
            ["call", {**call, "op": "blocks.read", "body": READ}],
            ["close", {"pipe": "n1"}],
        ],
        [
            ["open", _opening()],
            ["sum", {"pipe": "n1", "groups": READ["groups"], "device": "cpu"}],
            ["sum", {"pipe": "n1", "groups": [bytes(4) * 64, b""], "device": "cuda:0"}],
        ],
        [["call", call], ["ready", {"pipe": "n2"}], ["open", _opening()], ["open", _opening()]],
    ]


def run_worker(calls):
    mover = _worker()
    beside = _Beside()
    beside.handlers = {op: _answered(handler) for op, handler in mover._server._handlers.items()}
    beside.hear(calls, "pipe.")
    mover._pipes.drop_all()
    beside.handlers["pipe.open"](_opening("good"))
    assert mover._pipes.count == 1
    beside.handlers["pipe.close"]({"pipe": "good"})
    assert mover._pipes.count == 0


def _answered(handler):
    """Wait for an opening; what waits for the peer's next question is not waited for."""

    def answer(body):
        reply = handler(body)
        if isinstance(reply, Future):
            with contextlib.suppress(TimeoutError):
                return reply.result(3.0 if "hello" in body else 0.01)
            return {}
        return reply

    return answer


# -- what owners say that their blocks add up to -----------------------------------------------------------------

_BLOCKS = ((1, 2), (3,))
_SUMS = [
    {"kind": kind, "sum": sums.of_blocks(LAYOUT_MEMORY, _BLOCKS, kind).to_bytes(8, "little").hex()}
    for kind in (sums.XXH3, sums.WORDS)
]


def run_sums(answer):
    crew = SimpleNamespace(submit=lambda call, **_: call() or True)
    compare = Integrity(SimpleNamespace(memory=LAYOUT_MEMORY), _Beside(), crew, bool).compare
    for told in (answer, *_SUMS):
        asked, heard = Future(), []
        compare(asked, _BLOCKS, heard.append)
        asked.set_result(told if isinstance(told, dict) else {})
        assert len(heard) == 1
        if heard != [None]:
            assert isinstance(heard[0], KVConnectError)
            assert told not in _SUMS
        else:
            assert {**told, "sum": bytes.fromhex(told["sum"]).hex()} in _SUMS


# -- pipes that a worker asks its peers for -----------------------------------------------------------------------


@functools.cache
def _consumer():
    return _mover("D", "shm", produces=False)


@functools.cache
def _told():
    station = _worker()._pipes._station
    theirs = {**station.worker, "endpoint": "127.0.0.1:9"}
    invitation = {
        **_BEACON.card(),
        "pidns": host.identity()["pidns"],
        "name": "kvconnect-fuzz-nobody",
        "token": b"t" * 16,
    }
    hello = {**station.me.to_wire(), "workers": [theirs], "incarnation": "i"}
    return [{"hello": hello, "pipe.open": {"message": invitation}, "pipe.ready": {}, "release": {"answer": "ok"}}]


def run_asking(answers):
    mover, beside = _consumer(), _Beside(answers if isinstance(answers, dict) else {})
    claim = Claim("g", LookupKey("ns", b"k", 1), ((1,),), {"at": f"127.0.0.1:{next(_ports)}", "incarnation": "i"})
    with mock.patch.object(mover._client, "call", lambda _at, op, body, _timeout_s: beside.call(op, body)):
        transfer = mover.read(claim, ((1,),), ((2,),), lambda _: None)
        with contextlib.suppress(KVConnectError):
            transfer.wait(8)
        assert transfer.done
        assert isinstance(transfer.error, KVConnectError), "nobody was there to read from"
        mover._client.soon(mover._links.drop_all)
        mover._client.flush()


_ports = itertools.count(1024)

# -- what pipes tell of where they are ----------------------------------------------------------------------------

_CARDS = [{**host.identity(), "uuid": "GPU-2", "nccl": 22809, "token": 7}, {"pid": os.getpid()}]


def run_cards(theirs):
    if not isinstance(theirs, dict):
        return  # `fields.mapping` has looked
    mine = {**host.identity(), "uuid": "GPU-1", "nccl": 22809}
    for cls in (NcclPipe, CudaIpcPipe, ShmPipe, TcpPipe):
        assert cls.can_reach(mine, mine) is not None
        assert isinstance(bool(cls.can_reach(mine, theirs)), bool)
        assert isinstance(bool(cls.can_reach(theirs, mine)), bool)
    with refused:
        InprocPipe(PipeSpec("asks", lambda _: theirs))


_SLOT_CARD = {"agent": "peer", "metadata": b"meta", "kind": "DRAM", "device": 0, "number": 3, "valid": [0, 3]}


def run_slot_card(data):
    medium = NixlMedium(_Agent(), "cpu", 2.0, 1 << 14)
    with refused:
        medium.meet(data)
    medium.meet(msgpack.packb(_SLOT_CARD))
    assert medium._peer is not None


TARGETS = [
    Target("nixl_card", noise([msgpack.packb(_SLOT_CARD)]) | mutated([_SLOT_CARD]).map(msgpack.packb), run_slot_card),
    Target("cuda_ipc_export", mutated([_EXPORT]), run_export),
    Target(
        "cuda_ipc_card", noise([msgpack.packb(_STAGING)]) | mutated([_STAGING]).map(msgpack.packb), run_staging_card
    ),
    Target("staged_tensors", st.tuples(mutated(_STAGED), mutated(_ACKS)), run_staged, fixed_bytes=1 << 20),
    Target("companion", st.deferred(lambda: mutated([_offer()])), run_companion, fixed_bytes=1 << 20),
    Target("tcp_opening", mutated([{"tcp": 2, "checksum": True}]), run_opening, fixed_bytes=1 << 20),
    Target("pipe_cards", mutated(_CARDS), run_cards),
    Target("sums", mutated(_SUMS), run_sums, fixed_bytes=1 << 20),
    Target("asking_worker", st.deferred(lambda: mutated(_told())), run_asking, per_byte=256, fixed_bytes=4 << 20),
    Target("worker_pipes", st.deferred(lambda: mutated(_asked())), run_worker, per_byte=256, fixed_bytes=4 << 20),
]
