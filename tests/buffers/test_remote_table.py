"""`RemoteBuffer` as a table of tensors: two ends in one process, and the owner in another."""

import contextlib
import multiprocessing
import threading

import pytest
import torch

from kvconnect import registry
from kvconnect.buffers.arena import decode, encode
from kvconnect.buffers.base import LookupBuffer, LookupKey
from kvconnect.buffers.remote import RemoteBuffer, TableOptions
from kvconnect.config import Backend, Config
from kvconnect.errors import ConfigError
from kvconnect.testing.buffer_laws import LIMIT_S, ROOM_BYTES, Ends, key, tensor
from kvconnect.testing.buffer_tests import BufferTests
from kvconnect.testing.channels import ConnectionChannel
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from kvconnect.testing.peers import spawn

SPAWN = multiprocessing.get_context("spawn")


def table(policy="wait", ttl_s=600.0, wait_s=LIMIT_S, pipe="auto", peers=()):
    options = Config(lease_s=ttl_s, pipe=Backend(pipe), peers=peers)
    return RemoteBuffer(
        options, TableOptions(capacity_bytes=ROOM_BYTES, block_bytes=4096, policy=policy, wait_s=wait_s)
    )


def needs(pipe):
    try:
        registry.pipe(pipe)
    except ConfigError as error:
        pytest.skip(str(error))


class TestOneTable(BufferTests):
    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = table(policy, ttl_s, wait_s)
        return Ends(buffer, buffer)


class TestTwoTablesInOneProcess(BufferTests):
    def open_ends(self, *, policy, ttl_s, wait_s):
        put = table(policy, ttl_s, wait_s)
        return Ends(put, table(peers=(put.endpoint,)))


# -- the owner in another process -------------------------------------------------


def later(call):
    """Run ``call`` on a thread of its own: inserts may wait for room, a channel's handlers must not."""
    return spawn(lambda: call() or {})


def serve(connection):
    """Keep tables and do what the other process says."""
    tables = []
    over = threading.Event()
    channel = ConnectionChannel(connection, "test-owner")

    def open_table(body):
        tables.append(table(**body))
        return {"number": len(tables) - 1, "endpoint": tables[-1].endpoint}

    def insert(body):
        kv = decode(torch.frombuffer(bytearray(body["stream"]), dtype=torch.uint8))
        key = LookupKey("laws", body["digest"], body["length"])
        return later(lambda: tables[body["number"]].insert(key, kv))

    channel.handle("open", open_table)
    channel.handle("insert", insert)
    channel.handle("close", lambda body: later(tables[body["number"]].close))
    channel.handle("end", lambda _: over.set() or {})
    channel.start()
    over.wait(300)


class OwnerElsewhere(LookupBuffer):
    """The inserting end of a table that another process keeps."""

    def __init__(self, channel, **options):
        self.channel = channel
        opened = channel.call("open", options).result(LIMIT_S)
        self.number, self.endpoint = opened["number"], opened["endpoint"]

    def insert(self, key, kv):
        stream = torch.cat([piece.reshape(-1) for piece in encode(kv)]).numpy().tobytes()
        body = {"number": self.number, "digest": key.digest, "length": key.length, "stream": stream}
        self.channel.call("insert", body).result(LIMIT_S)

    def drop_select(self, key):
        raise NotImplementedError

    def close(self):
        self.channel.call("close", {"number": self.number}).result(LIMIT_S)


@pytest.fixture(scope="module")
def owner():
    """A channel to one process that keeps tables."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    channel = ConnectionChannel(ours, "test-taker")
    channel.start()
    yield channel
    with contextlib.suppress(Exception):
        channel.call("end", {}).result(LIMIT_S)
    process.join(LIMIT_S)
    channel.close()


class AcrossProcesses(BufferTests):
    pipe = ""

    @pytest.fixture(autouse=True)
    def _have_owner(self, owner):
        needs(self.pipe)
        self.owner = owner

    def open_ends(self, *, policy, ttl_s, wait_s):
        put = OwnerElsewhere(self.owner, policy=policy, ttl_s=ttl_s, wait_s=wait_s, pipe=self.pipe)
        return Ends(put, table(pipe=self.pipe, peers=(put.endpoint,)))


class TestOverTcp(AcrossProcesses):
    pipe = "tcp"


class TestOverShm(AcrossProcesses):
    pipe = "shm"


def test_closing_leaves_nothing_behind():
    with contextlib.closing(table(pipe="inproc")) as warm:  # process-wide threads stay
        warm.insert(key(1), [tensor(1)])
        warm.drop_select(key(1))
    before = Holdings.now()
    put = table()
    take = table(peers=(put.endpoint,))
    put.insert(key(1), [tensor(1)])
    assert take.drop_select(key(1)) is not None
    take.close()
    put.close()
    assert_nothing_left(before)


def test_an_owner_that_cannot_be_reached_is_a_miss():
    with contextlib.closing(table(peers=("127.0.0.1:1",))) as take:
        assert take.drop_select(key(1)) is None
