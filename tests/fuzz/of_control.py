"""Targets: the control channel, and the messages that schedulers exchange over it."""

from __future__ import annotations

import atexit
import functools
import itertools
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import msgpack
import zmq
from hypothesis import strategies as st
from zmq.utils import z85

from kvconnect import keys, messages
from kvconnect.buffers import layouts
from kvconnect.buffers import taker as taking
from kvconnect.buffers.base import Claim, LookupKey, Miss, Want
from kvconnect.buffers.directory import Directory, Producers
from kvconnect.buffers.hello import Hello, check_fit
from kvconnect.buffers.ledger import digest_of
from kvconnect.buffers.lender import Lender
from kvconnect.buffers.ticket import Ticket, unpack_ids
from kvconnect.clock import SYSTEM, Clock
from kvconnect.config import Config
from kvconnect.control import ControlClient, ControlServer, split, wait_for
from kvconnect.errors import ConfigError, KVConnectError
from kvconnect.paging import LayerLayout, PagedLayout
from kvconnect.pipes import host
from tests.fuzz.harness import Target, refused
from tests.fuzz.strategies import damaged, mutated, noise, values

# -- messages and their sockets ------------------------------------------------------

_REQUEST = {"p": [1, 1], "id": 7, "op": "ping", "body": {"n": 1, "list": [[1, 2], ["a"]], "raw": b"abc"}}
_REPLIES = [
    messages.pack_reply(1, {"a": 1, "list": [1, [2], {"b": b"c"}]}),
    messages.pack_error(1, KVConnectError("no")),
    messages.pack_error(1, ConfigError("no")),
]
_BOMBS = [b"\xdd\x00\x0f\xff\xff" * 60, b"\x91" * 900, b"\xdf\x00\x0f\xff\xff" * 60, b"\x84" + b"\x80" * 3000]
PACKED = [messages.pack_request(7, "ping", _REQUEST["body"]), *_REPLIES, *_BOMBS]


def packed_messages():
    return noise(PACKED) | mutated([_REQUEST]).map(msgpack.packb)


def run_message(data):
    with refused:
        message = messages.unpack(data)
        messages.error_of(message)
        messages.check_version(message)
    assert messages.unpack(messages.pack_reply(3, {}))["id"] == 3


class _Asker:
    """A peer of a real server that sends frames of its own making."""

    def __init__(self):
        self.server = ControlServer(name="fuzz-control-server")
        self.server.handle("ping", lambda body: {"echo": body})
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{self.server.endpoint}")
        self._numbers = itertools.count(1 << 40)

    def run(self, frames):
        if frames:
            self._socket.send_multipart(frames)
        number = next(self._numbers)
        self._socket.send(messages.pack_request(number, "ping", {"n": 1}))
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if self._socket.poll(1000):
                reply = messages.unpack(self._socket.recv())
                if reply["id"] == number:
                    assert reply["body"] == {"echo": {"n": 1}}
                    return
        raise AssertionError("the server does not answer any more")

    def close(self):
        self._context.destroy(linger=0)
        self.server.close()


class _Answerer:
    """A peer of a real client that answers with bytes of its own making."""

    def __init__(self):
        self.client = ControlClient(name="fuzz-control-client")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    def run(self, data):
        first = self.client.call(self.endpoint, "ping", {}, 5.0)
        peer, asked = self._socket.recv_multipart()
        # What looks like an answer is one to this very question.
        number = messages.unpack(asked)["id"]
        self._socket.send_multipart([peer, data.replace(b"\xa2id\x01", b"\xa2id" + msgpack.packb(number))])
        second = self.client.call(self.endpoint, "ping", {}, 5.0)
        peer, asked = self._socket.recv_multipart()
        self._socket.send_multipart([peer, messages.pack_reply(messages.unpack(asked)["id"], {"ok": 1})])
        assert wait_for(second, 6) == {"ok": 1}
        self._socket.send_multipart([peer, messages.pack_reply(number, {})])  # or it has not been answered yet
        with refused:
            assert isinstance(wait_for(first, 6), dict)

    def close(self):
        self._context.destroy(linger=0)
        self.client.close()


@functools.cache
def asker():
    found = _Asker()
    atexit.register(found.close)
    return found


@functools.cache
def answerer():
    found = _Answerer()
    atexit.register(found.close)
    return found


def run_endpoint(endpoint):
    with refused:
        split(endpoint)
    client = answerer().client
    # Only what no resolver would have to be asked for.
    if not endpoint.isascii() or "\0" in endpoint or not endpoint.rpartition(":")[0]:
        before = dict(client._peers)
        with refused:
            wait_for(client.call(endpoint, "ping", {}, 0.2), 2)
        assert dict(client._peers).keys() <= before.keys() | {answerer().endpoint}


_ENDPOINTS = [
    "127.0.0.1:80",
    "[::1]:80",
    "host:1",
    "\ud800:1",
    "a\ud8ff:80",
    "h:\u0663",
    "a\0b:1",
    ":1",
    "a:" + "9" * 900,
]


# -- who is let in ------------------------------------------------------------------------------------

_ZAP = [b"1.0", b"1", b"kvconnect", b"127.0.0.1", b"", b"CURVE", bytes(range(32))]


class _DoorBell:
    """The socket on which libzmq asks, and the loop that would watch it."""

    def __init__(self):
        self.context, self.frames, self.said = self, [], None

    def socket(self, _kind):
        return self

    def setsockopt(self, *_):
        pass

    bind = setsockopt

    def watch(self, _socket, answer):
        self.answer = answer

    def recv_multipart(self, _flags):
        return self.frames

    def send_multipart(self, frames):
        self.said = frames[2]


def run_door(told):
    bell = _DoorBell()
    keys._Door(bell, frozenset([z85.encode(_ZAP[6])]))
    for frames in (_ZAP, [*_ZAP[:3], *told]):
        bell.frames, bell.said = frames, None
        bell.answer()
        assert bell.said == (b"200" if frames[5:] == _ZAP[5:] else b"400")


# -- what engines say of themselves ---------------------------------------------------------------

LAYOUT = PagedLayout(
    (LayerLayout("l0", 0, 0, 0, 64, 8, 16, ((2, 32),)), LayerLayout("l1", 1, 1, 8, 64, 8, 64)), (512, 520)
)
ME = Hello("E", "i" * 16, {"model": "m", "dtype": "bf16", "block_size": 16}, 2, "both", 30.0)


def worker(rank):
    pipes = {"tcp": host.identity(), "shm": host.identity()}
    return {
        "rank": rank,
        "endpoint": "127.0.0.1:1",
        "pipes": pipes,
        "refused": {"nccl": "no GPU"},
        "layout": layouts.write(LAYOUT),
        "device": "cpu",
    }


def plain(hello):
    return {**hello.to_wire(), "workers": [worker(0), worker(1)]}


HELLOS = [plain(ME), {**plain(ME), "rank": 1}]


def run_hello(body):
    if not isinstance(body, dict):
        return  # the control channel has looked
    with refused:
        check_fit(Hello.from_wire(body), ME)
    with refused:
        theirs = Hello.from_wire(body)
        check_fit(ME, theirs)
        taking._check_workers([worker(0), worker(1)], theirs)
    check_fit(ME, Hello.from_wire(plain(ME)))


_LAYOUTS = [
    LAYOUT.to_wire(),
    {"regions": [1 << 48], "layers": [["l", 0, 0, 0, 0, 1 << 31, 1, [[1 << 20, 0], [1 << 20, 0]], ""]]},
    {"regions": [512], "layers": [["l", 4095, 0, 0, 64, 8, 64, [[1, 1]] * 40, "x"]]},
]


def run_layout(body):
    with refused:
        layout = PagedLayout.from_wire(body)
        assert len(repr(layout.shape())) < 1 << 20
        blocks = [[0, n - 1, 0] if n else [] for n in layout.num_blocks[:4]]
        layout.check(blocks)
        region, offset, nbytes = layout.pieces(blocks)
        assert int(nbytes.sum()) == layout.nbytes(blocks)
        assert all(o + n <= layout.region_bytes[r] for r, o, n in zip(region, offset, nbytes, strict=True))
        layouts.check_shapes({"layout": layouts.write(LAYOUT)}, {"layout": msgpack.packb(body)})


# -- tickets, and what their owner is asked -----------------------------------------------------------

KEY = LookupKey("ns", b"k" * 16, 32)
BLOCKS = ((1, 2, 3), (4,))
TICKET = Ticket("127.0.0.1:5", "E", "i" * 16, "e" * 16, 1, KEY, BLOCKS).to_wire()


def run_ticket(body):
    if not isinstance(body, dict):
        return  # the connector has looked
    with refused:
        ticket = Ticket.from_wire(body)
        again = Ticket.from_wire(ticket.to_wire())
        assert again == ticket
        look = taking.Look("r", Want(KEY), "g", "t")
        messages.pack_request(1, "claim", {"grant": "g", **taking._claim_of(look, ticket, SYSTEM).data})
    for packed in body.get("blocks", []) if isinstance(body.get("blocks"), list) else []:
        with refused:
            unpack_ids(packed)


_LONE = [{**TICKET, name: "\ud800x"} for name in ("at", "engine", "entry", "namespace")]


class _Ears:
    """A control server's place: keeps the handlers."""

    def __init__(self):
        self.handlers = {}

    def handle(self, op, handler):
        self.handlers[op] = handler

    def close(self):
        pass


_ENTRY = {"entry": "$entry", "generation": 1, "blocks": digest_of(BLOCKS)}
_CALLS = [
    ["hello", plain(ME)],
    ["misfit", {"engine": "D", "difference": "memory layout differs"}],
    ["match", {"namespace": "ns", "digest": (b"k" * 16).hex(), "length": 32, "taker": "t", "label": "l"}],
    ["claim", {"grant": "g", "taker": "t", **_ENTRY}],
    ["claim", {"grant": "g2", "taker": "t", **_ENTRY}],
    ["renew", {"grants": ["g", "h"], "done": ["x"]}],
    ["release", {"grant": "g", "part": 0, "taker": "t", **_ENTRY}],
    ["release", {"grant": "g", "part": 1, "taker": "t", **_ENTRY}],
    ["abandon", {"grants": ["g"]}],
    ["clock", 31],
]


class _Hand(Clock):
    """A clock that calls set."""

    time = 0.0

    def now(self):
        return self.time


def run_lender(calls):
    ears, hand = _Ears(), _Hand()
    lender = Lender(ME, ears, "127.0.0.1:5", clock=hand)
    lender.introduce([worker(0), worker(1)])
    ticket = lender.offer(KEY, BLOCKS, label="l", asked=True)
    returned = []
    for call in calls if isinstance(calls, list) else []:
        op, body = call if isinstance(call, list) and len(call) == 2 else ("hello", call)
        if op == "clock" and isinstance(body, int):
            hand.time += min(abs(body), 1 << 20)
        elif isinstance(op, str) and op in ears.handlers and isinstance(body, dict):
            if body.get("entry") == "$entry":
                body = {**body, "entry": ticket["entry"]}
            with refused:
                ears.handlers[op](body)
        returned += lender.drain_released()
    _still_lends(lender, ears)
    hand.time += 1 << 30
    returned += lender.drain_released()
    assert sorted(map(str, returned)).count(str(BLOCKS)) == 1, "an entry's blocks come back exactly once"


def _still_lends(lender, ears):
    ticket = lender.offer(LookupKey("ns", b"z" * 16, 8), ((7,),), label=None, asked=True)
    named = {"entry": ticket["entry"], "generation": ticket["generation"], "blocks": digest_of(((7,),))}
    body = {"grant": "last", "taker": "last", **named}
    assert ears.handlers["claim"](body)["state"] == "ok"
    assert [ears.handlers["release"]({**body, "part": part})["answer"] for part in (0, 1)] == ["ok", "ok"]
    assert lender.drain_released()[-1] == ((7,),)


# -- what owners answer -------------------------------------------------------------------------------


class _Oracle:
    """A control client's place: peers' answers are known before they are asked; nothing waits."""

    clock = SYSTEM

    def __init__(self, answers):
        self._answers, self.timers = answers, []

    def call(self, _endpoint, op, _body, _timeout_s):
        future = Future()
        answer = self._answers.get(op)
        if isinstance(answer, dict):
            future.set_result(answer)
        else:
            future.set_exception(KVConnectError("no answer"))
        return future

    def soon(self, call):
        call()
        return True

    def later(self, _delay_s, call):
        self.timers.append(call)

    def run_timers(self):
        timers, self.timers = self.timers, []
        for timer in timers:
            timer()

    def flush(self, timeout_s=1.0):
        pass


_ANSWERS = {
    "hello": {**plain(ME), "incarnation": "i" * 16},
    "match": {"ticket": TICKET, "labelled": True},
    "claim": {"state": "ok", "lease_ms": 30000, "clock": SYSTEM.identity, "now": 1e300},
    "renew": {"gone": ["x"], "lease_ms": 1000, "clock": "", "now": 0.0},
    "abandon": {},
    "misfit": {},
}


def run_answers(answers):
    client = _Oracle(answers if isinstance(answers, dict) else {})
    taker = taking.Taker(Config(), ME, client, Producers(["127.0.0.1:5"], None))
    taker.introduce([worker(0), worker(1)])
    for request, ticket in (("a", TICKET), ("b", None)):
        taker.look(request, Want(KEY, "l", ticket))
        client.run_timers()
        answer = taker.found(request)
        assert answer is None or isinstance(answer, (Claim, Miss))
        taker.settle(request)
    client._answers = {**_ANSWERS, "match": {}}
    taker.look("c", Want(LookupKey("ns", b"y" * 16, 8)))
    client.run_timers()
    client.run_timers()
    assert isinstance(taker.found("c"), Miss)


# -- files of engines of this host ----------------------------------------------------------------------

_CARD = {"endpoint": "127.0.0.1:5", "engine": "E", "incarnation": "i", "role": "both", "pid": 1, "started": 5}
_CARD["pidns"] = host.identity()["pidns"]


@functools.cache
def _folder():
    base = Path(tempfile.mkdtemp(prefix="kvconnect-fuzz-"))
    return Directory("g", base)


def run_file(data):
    folder = _folder()
    path = folder.path / "1-a"
    path.write_bytes(data)
    assert folder._read(path) is None or isinstance(folder._read(path), str)


TARGETS = [
    Target("control_message", packed_messages(), run_message, per_byte=128),
    Target("control_server", st.lists(packed_messages(), max_size=4), lambda frames: asker().run(frames), 256),
    Target("control_client", noise(_REPLIES) | packed_messages(), lambda data: answerer().run(data), 256),
    Target(
        "control_door",
        st.tuples(noise(_ZAP[3:4]), noise([b""]), noise(_ZAP[5:6]), st.lists(noise(_ZAP[6:]), max_size=2)).map(
            lambda told: [*told[:3], *told[3]]
        ),
        run_door,
    ),
    Target("control_endpoint", st.sampled_from(_ENDPOINTS) | mutated([["h", "1"]]).map(str), run_endpoint),
    Target("hello", mutated(HELLOS) | values().map(lambda v: {"workers": v}), run_hello, fixed_bytes=1 << 20),
    Target("layout", mutated(_LAYOUTS), run_layout, fixed_bytes=16 << 20),
    Target(
        "ticket",
        mutated([TICKET, *_LONE]) | damaged([b"AgIC"]).map(lambda b: {**TICKET, "blocks": [b.decode("latin1")]}),
        run_ticket,
        256,
    ),
    Target("lender", st.lists(mutated(_CALLS), max_size=6), run_lender, fixed_bytes=1 << 20),
    Target("owners_answers", mutated([_ANSWERS]), run_answers, fixed_bytes=2 << 20),
    Target(
        "directory", noise([msgpack.packb(_CARD)]) | mutated([_CARD]).map(msgpack.packb), run_file, fixed_bytes=1 << 20
    ),
]
