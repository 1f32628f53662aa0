"""Targets: block paths and device pipes: what their ends tell each other beside the bytes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import msgpack
import torch
from hypothesis import strategies as st

from kvconnect.blocks import heap_memory
from kvconnect.buffers.base import Claim, EndSettings, LookupKey
from kvconnect.buffers.mover import Mover
from kvconnect.config import Backend, Config, parse_backend
from kvconnect.cuda import ipc
from kvconnect.errors import BrokenError, ClosedError, EndOfPipe, KVConnectError
from kvconnect.paging import LayerLayout, PagedLayout
from kvconnect.pipes import companion, flows, host, wire
from kvconnect.pipes.base import Pipe, PipeSpec
from kvconnect.pipes.cuda_ipc import CudaIpcPipe
from kvconnect.pipes.cuda_ipc_staging import CudaIpcMedium
from kvconnect.pipes.flows import Kind, pack
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.pipes.nccl import NcclPipe
from kvconnect.pipes.nccl_blocks import NcclBlocks
from kvconnect.pipes.nixl import NixlMedium
from kvconnect.pipes.nixl_blocks import NixlBlocks
from kvconnect.pipes.nixl_notes import Note, What
from kvconnect.pipes.nixl_place import Registration
from kvconnect.pipes.nixl_staging import Use
from kvconnect.pipes.peer_memory import Beacon
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.staged import StagedTensors
from kvconnect.pipes.stream import BlockStream
from kvconnect.pipes.tcp import TcpPipe
from tests.fuzz.harness import Target, refused
from tests.fuzz.of_bytes import MESSAGES
from tests.fuzz.strategies import damaged, mutated, noise

BLOCK = 64
LAYOUT = PagedLayout(
    (LayerLayout("l0", 0, 0, 0, BLOCK, 16, BLOCK), LayerLayout("l1", 1, 1, 0, BLOCK, 16, BLOCK)), (16 * BLOCK,) * 2
)
READ = {"transfer": 1, "groups": pack([[1, 2], [3]]), "nbytes": 3 * BLOCK, "credit": 8}


class _Beside:
    """A channel to nobody: keeps the handlers and what was told; every call is answered alike."""

    def __init__(self, answers=None):
        self.handlers, self.told, self.answers = {}, [], answers or {}

    def handle(self, op, handler):
        self.handlers[op] = handler

    def call(self, op, body):
        self.told.append((op, body))
        future = Future()
        answer = self.answers.get(op, {})
        if isinstance(answer, dict):
            future.set_result(answer)
        else:
            future.set_exception(BrokenError("nobody is there"))
        return future

    def hear(self, calls, prefix=""):
        """Have the peer make these calls: ``[op, body]`` each."""
        for call in calls if isinstance(calls, list) else []:
            op, body = call if isinstance(call, list) and len(call) == 2 else ("", None)
            if isinstance(op, str) and prefix + op in self.handlers and isinstance(body, dict):
                with refused:
                    reply = self.handlers[prefix + op](body)
                    msgpack.packb(dict(reply))


def _until(condition, what):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.001)


# -- streams of chunks -----------------------------------------------------------------------------


class _Sink(Pipe):
    """Takes whatever is sent; nothing comes."""

    def __init__(self):
        self.sent = []

    def send_tensor(self, tensor):
        self.sent.append(tensor.clone())

    def recv_tensor(self):
        raise EndOfPipe("nothing comes")

    def close(self):
        pass


def _chunk(kind, transfer, offset, nbytes):
    return bytes(range(nbytes)) + struct.pack("<4sI2Q", b"KVB1", kind, transfer, offset)


def _address(kind=0, transfer=1, receives=True):
    return {"kind": kind, "transfer": transfer, "receives": receives}


_STREAMS = [
    [
        ["read", {**READ, "transfer": 7}],
        ["credit", {**_address(0, 7, False), "chunks": 4}],
        ["stop", _address(0, 7, False)],
    ],
    [["place", _chunk(0, 1, 0, 100)], ["place", _chunk(0, 1, 100, 92)]],
    [["write", {**READ, "transfer": 9}], ["place", _chunk(1, 9, 0, 192)]],
    [["done", {**_address(), "error": None}], ["done", {**_address(1, 2, False), "error": "no"}]],
    [["stop", _address()], ["stop", _address(1, 2, False)], ["broken", {"error": "x"}], ["chunk", {}]],
]


def run_stream(calls):
    memory, beside, pipe = (
        heap_memory(LAYOUT),
        _Beside({"blocks.read": {"credit": 8}, "blocks.write": {"credit": 0}}),
        _Sink(),
    )
    stream = BlockStream(pipe, memory, LAYOUT, beside, 5.0)
    read, write = stream.read([[1, 2], [3]], [[4, 5], [6]]), stream.write([[1], []], [[2], []])
    flow = stream._flows[True][Kind.READ, 1]
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, list) and len(call) == 2 and call[0] == "place" and isinstance(call[1], bytes):
            with refused:
                stream._receiver._place(torch.frombuffer(bytearray(call[1]), dtype=torch.uint8) if call[1] else None)
        else:
            beside.hear([call], "blocks.")
    assert not read.done or read.error is not None or flow.moved == flow.nbytes, "it succeeded without its bytes"
    stream.close()
    assert read.done
    assert write.done or flow.copying
    _still_streams(memory)


def _still_streams(memory):
    beside, pipe = _Beside(), _Sink()
    stream = BlockStream(pipe, memory, LAYOUT, beside, 5.0)
    beside.handlers["blocks.read"]({**READ, "transfer": 3})
    _until(lambda: pipe.sent, "a valid request was not served")
    assert flows.read_tag(pipe.sent[0])[1] == (Kind.READ, 3)
    stream.close()


def run_tag(data):
    with refused:
        found, _, _ = flows.read_tag(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None)
        assert found.nbytes < len(data)


# -- NIXL -----------------------------------------------------------------------------------------------


class _Agent:
    """A NIXL agent's place: steps run when `drain` is called; every peer is known and nothing is ever read."""

    name, eager = "kvconnect-fuzz", False

    def __init__(self):
        self.jobs, self.followed, self.listeners, self.notes = deque(), [], {}, []

    def soon(self, job):
        self.jobs.append(job)

    soon_long = soon

    def watch(self, who, hot_s):
        pass

    def unwatch(self, who):
        pass

    def listen(self, token, listener):
        self.listeners[token] = listener

    def unlisten(self, token):
        self.listeners.pop(token, None)

    def register(self, place, iov, owner):
        return Registration((place, iov.tobytes()), None, b"meta", owner)

    def deregister(self, registration):
        pass

    def meet(self, name, metadata):
        if metadata != b"meta":
            raise BrokenError("NIXL does not take these metadata")
        return SimpleNamespace(name=name, leave=lambda: None)

    def notify(self, name, token, note):
        self.notes.append(Note.unpack(note))
        return True

    def follow(self, is_over, then):
        self.followed.append((is_over, then))

    def read(self, request):
        self.soon(lambda: request.on_over(BrokenError("nobody can be read from")))

    def drain(self):
        for _ in range(20000):
            while self.jobs:
                with refused:
                    self.jobs.popleft()()
            waiting, self.followed = self.followed, []
            for is_over, then in waiting:
                try:
                    over, error = is_over(), None
                except KVConnectError as caught:
                    over, error = True, caught
                then(error) if over else self.followed.append((is_over, then))
            if not self.jobs and not self.followed:
                return
            threading.Event().wait(0.0002)
        raise AssertionError("the agent's steps never end")


_NIXL_CARD = {
    "agent": "peer",
    "metadata": b"meta",
    "kind": "DRAM",
    "device": 0,
    "bases": [4096, 8192],
    "token": b"t" * 8,
}
_NIXL_CARD["slot_bytes"] = 256
_BEGIN = {"transfer": 5, "groups": READ["groups"], "portion_bytes": 128}
_PULL = {"transfer": 4, "from": READ["groups"], "into": READ["groups"], "nbytes": 3 * BLOCK}


def _note(what, transfer, portion=0, address=0):
    return ["note", {"note": Note(what, transfer, portion, address).pack()}]


_NIXL = [
    [["card", _NIXL_CARD], ["memory", _NIXL_CARD], ["begin", _BEGIN], _note(What.TAKEN, 5), ["end", {"transfer": 5}]],
    [["begin", _BEGIN], ["begin", _BEGIN], ["begin", {**_BEGIN, "portion_bytes": 0}], _note(What.END, 5)],
    [["card", _NIXL_CARD], _note(What.FULL, 1, 0, 4096), _note(What.FULL, 1, 0, 1), _note(What.ENDED, 1)],
    [["card", _NIXL_CARD], ["pull", _PULL], ["running", {"transfer": 4}], ["stop", {"transfer": 4}]],
    [["refused", {"transfer": 1, "error": "x"}], ["pulled", {"transfer": 2, "error": None}], ["closed", {}]],
]


def run_nixl(calls):
    agent, memory, beside = _Agent(), heap_memory(LAYOUT), _Beside({"nixl.begin": {}, "nixl.card": None})
    end = NixlBlocks(agent, memory, LAYOUT, beside, mode="staged", portion_bytes=256, timeout_s=5.0)
    read, write = end.read([[1, 2], [3]], [[4, 5], [6]]), end.write([[1], []], [[2], []])
    for step in range(2):
        # Once with a thread that keeps up, once with one that is behind.
        for call in calls if isinstance(calls, list) else []:
            beside.hear([call], "nixl.")
            if step == 0:
                _settle(agent)
        _settle(agent)
    end.close(ClosedError("over"))
    _settle(agent)
    assert read.done
    assert read.error is not None, "nothing was ever read"
    assert write.done
    held = end.shared.slots._held
    assert held == {Use.LENDING: 0, Use.LANDING: 0}, f"slots were lost: {held}"
    _still_lends()


def _settle(agent):
    """Let it do all there is to do, what other threads bring meanwhile included."""
    agent.drain()
    threading.Event().wait(0.001)
    agent.drain()


def _still_lends():
    agent, beside = _Agent(), _Beside({"nixl.card": None})
    memory = heap_memory(LAYOUT)
    end = NixlBlocks(agent, memory, LAYOUT, beside, mode="staged", portion_bytes=256, timeout_s=5.0)
    beside.handlers["nixl.card"](_NIXL_CARD)
    beside.handlers["nixl.begin"](_BEGIN)
    _settle(agent)
    assert any(note.what is What.FULL for note in agent.notes), "a valid request was not served"
    end.close(ClosedError("over"))
    agent.drain()


def run_note(data):
    with refused:
        assert Note.unpack(data).pack() == data


# -- NCCL -------------------------------------------------------------------------------------------------


class _Now:
    """The loop and the threads for meetings: whatever it is, it is done at once."""

    def bring(self, line, call):
        try:
            call()
            line.start()
        except KVConnectError as error:
            line.fail(error)

    post = bring

    def is_current(self):
        return True

    def add(self, step):
        step()


class _Wire:
    """Checks what is launched."""

    def __init__(self, slot_bytes):
        self.slot_bytes = slot_bytes

    def settled(self):
        return True

    def launch(self, move):
        ids = move.ids or []
        LAYOUT.check([[]] * move.group + [ids])
        assert move.nbytes == len(ids) * BLOCK or move.ids is None
        return lambda: True

    def abort(self):
        pass

    def at_rest(self):
        return True


def _wires():
    now = _Now()
    return SimpleNamespace(
        loop=now, meetings=now, name=lambda: b"n", make=lambda _, slot_bytes, **__: _Wire(slot_bytes)
    )


_ASK = {"number": 6, "groups": READ["groups"], "nbytes": 3 * BLOCK}
_ROWS = [[0, 6, 0, 0, 2], [0, 6, 1, 0, 1]]
_NCCL = [
    [
        ["meet", {"name": b"n", "slot_bytes": 1 << 20}],
        ["orders", {"first": 0, "asks": [_ASK], "rows": _ROWS, "drops": [[0, 6]]}],
    ],
    [["write", _ASK], ["stop", {"number": 6}], ["alive", {}]],
    [
        ["orders", {"first": 0, "asks": [], "rows": [[1, 2, 0, 0, 1]], "drops": []}],
        ["done", {"number": 2, "error": None}],
    ],
    [["done", {"number": 2, "error": "x"}], ["broken", {"error": "x"}]],
]


def run_nccl(calls):
    beside = _Beside({"nccl.meet": {"slot_bytes": 1 << 20}})
    end = NcclBlocks(LAYOUT_MEMORY, LAYOUT, beside, _wires(), slot_bytes=1 << 20, timeout_s=5.0)
    read, write = end.read([[1, 2], [3]], [[4, 5], [6]]), end.write([[1], []], [[2], []])
    lines = (end._into, end._out)
    for call in [["", None], *(calls if isinstance(calls, list) else [])]:
        beside.hear([call], "nccl.")
        for line in lines:
            _step(line)
    end.end(ClosedError("over"))
    for line in lines:
        _step(line)
    assert read.done
    assert write.done
    assert all(line.ended.is_set() for line in lines)
    _still_sends()


def _step(line):
    try:
        for _ in range(20):
            line.step(time.monotonic())
    except KVConnectError as error:
        line.fail(error)


def _still_sends():
    beside = _Beside({"nccl.meet": {"slot_bytes": 1 << 20}})
    end = NcclBlocks(LAYOUT_MEMORY, LAYOUT, beside, _wires(), slot_bytes=1 << 20, timeout_s=5.0)
    beside.hear(_NCCL[0][:1], "nccl.")
    _step(end._out)
    beside.hear(_NCCL[0][1:], "nccl.")
    _step(end._out)
    assert end._out.error is None
    assert end._out._next == len(_ROWS)
    end.end(ClosedError("over"))


LAYOUT_MEMORY = heap_memory(LAYOUT)

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


@functools.cache
def _worker():
    settings = EndSettings("P", {"model": "m"}, 1, True, False, Config(transfer_timeout_s=2.0), Backend("auto"))
    mover = Mover(settings, 0, LAYOUT_MEMORY)
    atexit.register(mover.close)
    return mover


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


# -- pipes that a worker asks its peers for -----------------------------------------------------------------------


@functools.cache
def _consumer():
    settings = EndSettings("D", {"model": "m"}, 1, False, True, Config(transfer_timeout_s=2.0), Backend("shm"))
    mover = Mover(settings, 0, LAYOUT_MEMORY)
    atexit.register(mover.close)
    return mover


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
    hello = {**station.me.to_wire(), "workers": [theirs], "worker": False, "incarnation": "i"}
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


_SLOT_CARD = {"agent": "peer", "metadata": b"meta", "kind": "DRAM", "device": 0}


def run_slot_card(data):
    medium = NixlMedium(_Agent(), "cpu", 2.0, 1 << 14)
    with refused:
        medium.meet(data)
    medium.meet(msgpack.packb(_SLOT_CARD))
    assert medium._peer is not None


TARGETS = [
    Target("block_stream", mutated(_STREAMS), run_stream, per_byte=256, fixed_bytes=4 << 20),
    Target("block_tag", noise([_chunk(0, 1, 0, 10), _chunk(1, 1 << 40, 5, 1)]), run_tag),
    Target("nixl_blocks", mutated(_NIXL), run_nixl, per_byte=256, fixed_bytes=4 << 20),
    Target("nixl_card", noise([msgpack.packb(_SLOT_CARD)]) | mutated([_SLOT_CARD]).map(msgpack.packb), run_slot_card),
    Target("nixl_note", damaged([Note(What.FULL, 1, 2, 3).pack()]), run_note),
    Target("nccl_blocks", mutated(_NCCL), run_nccl, per_byte=256, fixed_bytes=1 << 20),
    Target("cuda_ipc_export", mutated([_EXPORT]), run_export),
    Target(
        "cuda_ipc_card", noise([msgpack.packb(_STAGING)]) | mutated([_STAGING]).map(msgpack.packb), run_staging_card
    ),
    Target("staged_tensors", st.tuples(mutated(_STAGED), mutated(_ACKS)), run_staged, fixed_bytes=1 << 20),
    Target("companion", st.deferred(lambda: mutated([_offer()])), run_companion, fixed_bytes=1 << 20),
    Target("tcp_opening", mutated([{"tcp": 2, "checksum": True}]), run_opening, fixed_bytes=1 << 20),
    Target("pipe_cards", mutated(_CARDS), run_cards),
    Target("asking_worker", st.deferred(lambda: mutated(_told())), run_asking, per_byte=256, fixed_bytes=4 << 20),
    Target("worker_pipes", st.deferred(lambda: mutated(_asked())), run_worker, per_byte=256, fixed_bytes=4 << 20),
]
