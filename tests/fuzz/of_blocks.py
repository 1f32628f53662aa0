"""Targets: block paths and device pipes: what their ends tell each other beside the bytes."""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import msgpack
import torch

from kvconnect.blocks import heap_memory
from kvconnect.errors import BrokenError, ClosedError, EndOfPipe, KVConnectError
from kvconnect.paging import LayerLayout, PagedLayout
from kvconnect.pipes import flows
from kvconnect.pipes.base import Pipe
from kvconnect.pipes.flows import Kind, pack
from kvconnect.pipes.nccl_blocks import NcclBlocks
from kvconnect.pipes.nixl_blocks import NixlBlocks
from kvconnect.pipes.nixl_notes import Note, What
from kvconnect.pipes.nixl_place import Registration, card
from kvconnect.pipes.nixl_staging import Use
from kvconnect.pipes.stream import BlockStream
from tests.fuzz.harness import Target, refused
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
        return Registration((place, iov.tobytes()), 0, None, b"meta", owner)

    def deregister(self, registration):
        pass

    def card(self, place, registration):
        return card(self.name, place, registration, [0])

    def meet(self, card):
        if card.metadata != b"meta":
            raise BrokenError("NIXL does not take these metadata")
        return SimpleNamespace(name=card.agent, leave=lambda: None)

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
    "number": 0,
    "valid": [0, 3],
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

TARGETS = [
    Target("block_stream", mutated(_STREAMS), run_stream, per_byte=256, fixed_bytes=4 << 20),
    Target("block_tag", noise([_chunk(0, 1, 0, 10), _chunk(1, 1 << 40, 5, 1)]), run_tag),
    Target("nixl_blocks", mutated(_NIXL), run_nixl, per_byte=256, fixed_bytes=4 << 20),
    Target("nixl_note", damaged([Note(What.FULL, 1, 2, 3).pack()]), run_note),
    Target("nccl_blocks", mutated(_NCCL), run_nccl, per_byte=256, fixed_bytes=1 << 20),
]
