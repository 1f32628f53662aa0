"""Targets: what lies in a store that others may write to, and what a worker is asked to write there."""

from __future__ import annotations

import atexit
import functools
import tempfile

import msgpack
from hypothesis import strategies as st

from kvconnect.blocks import heap_memory
from kvconnect.buffers import store_manifest
from kvconnect.buffers.base import EndSettings, LookupBuffer, LookupKey
from kvconnect.buffers.filesystem import FilesystemStore
from kvconnect.buffers.store import Found, StoreOptions
from kvconnect.buffers.store_manifest import Manifest, Part
from kvconnect.buffers.store_over_table import TableStore
from kvconnect.buffers.store_parts import PartReader, Rooms
from kvconnect.buffers.store_worker import StoreWorker
from kvconnect.buffers.ticket import pack_ids
from kvconnect.config import Config
from kvconnect.errors import IntegrityError
from kvconnect.paging import LayerLayout, PagedLayout
from tests.fuzz.harness import Target, refused
from tests.fuzz.strategies import mutated, noise

LAYOUT = PagedLayout((LayerLayout("l", 0, 0, 0, 64, 16, 64),), (1024,))
_PART = Part(128, store_manifest.shape_of(LAYOUT), b"s" * 16)
_WHOLE = Manifest(LookupKey("ns", b"d" * 16, 32), ((1, 0, 2),), 100, (_PART,), 1.5).pack()
_HEAD = len(_WHOLE) - len(msgpack.packb(msgpack.unpackb(_WHOLE[24:])))
_BODY = msgpack.unpackb(_WHOLE[_HEAD:])
_ASKED = {"secret": "secret", "draft": "ab12", "blocks": [pack_ids((1, 0, 2))], "chunk_bytes": 100}


class _Empty(LookupBuffer):
    def insert(self, key, kv):
        raise NotImplementedError

    def drop_select(self, key):
        return None

    def close(self):
        pass


@functools.cache
def memory():
    return heap_memory(LAYOUT)


def run_manifest(data):
    if not isinstance(data, bytes):
        body = msgpack.packb(data)
        data = _WHOLE[: _HEAD - 8] + store_manifest.sum_of(body) + body
    TableStore(_Empty(), StoreOptions(), 1)._drop_chunks(Found(data, "ab"))
    try:
        found = Manifest.unpack(data)
    except IntegrityError:
        return
    if len(found.blocks) != 1 or len(found.blocks[0]) != 3:
        return  # the connector pairs them with as many of its own
    with refused:
        for part in found.parts:
            reader = PartReader(memory(), None, Rooms("cpu"), part, found.chunk_bytes)
            reader.plan([max(ids, default=0) for ids in found.blocks], found.blocks[:1], ((4, 5, 6),))


@functools.cache
def worker():
    folder = tempfile.TemporaryDirectory()
    settings = EndSettings("fuzz", {}, 1, True, False, Config())
    found = StoreWorker("filesystem", settings, 0, memory(), FilesystemStore(folder.name))
    found._secret = "secret"  # noqa: S105 - a test's own
    atexit.register(folder.cleanup)
    atexit.register(found.close)
    return found


def run_worker(body):
    if not isinstance(body, dict):
        return  # the control server has refused it
    with refused:
        worker()._stop(body).result(5)
    with refused:
        worker()._write(body).result(5)


TARGETS = [
    Target("store_manifest", st.one_of(mutated([_BODY]), noise([_WHOLE])), run_manifest, per_byte=256),
    Target("store_worker", mutated([_ASKED]), run_worker, per_byte=512, fixed_bytes=32 << 20),
]
