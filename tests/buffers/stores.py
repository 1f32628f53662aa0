"""Engines without a model over a store: a scheduler's and its workers' ends, which share nothing but it."""

import multiprocessing
import threading
import tomllib
from contextlib import contextmanager
from pathlib import Path

from kvconnect import registry
from kvconnect.buffers.base import Claim, EndSettings, LookupKey, Want
from kvconnect.config import Backend, Config
from kvconnect.testing.layouts import blank_memory, naive_stream, noisy_memory, separate_layers
from tests.buffers.engines import eventually

SPAWN = multiprocessing.get_context("spawn")
LAYOUT = separate_layers(layers=3, blocks=32, heads=2, piece_bytes=700, groups=1)


def key(number, length=32, namespace="ns"):
    return LookupKey(namespace, number.to_bytes(16, "big"), length)


class StoreEngine:
    """One engine over ``store``, a `Backend`; ``options`` are `Config`'s."""

    def __init__(self, store, *, layouts=(LAYOUT,), device="cpu", produces=True, consumes=True, **options):
        config = Config(**{"transfer_timeout_s": 10.0, "lookup_timeout_s": 5.0, "buffer": store, **options})
        settings = EndSettings("e", {"model": "m"}, len(layouts), produces, consumes, config)
        make = noisy_memory if produces else lambda layout, _, device: blank_memory(layout, device)
        self.memories = [make(layout, rank + 1, device) for rank, layout in enumerate(layouts)]
        buffer = registry.buffer(store.name)
        self.end = buffer.scheduler_end(settings)
        self.workers = [buffer.worker_end(settings, rank, memory) for rank, memory in enumerate(self.memories)]
        self.end.introduce([worker.describe() for worker in self.workers])

    def stream(self, rank, blocks):
        return naive_stream(self.memories[rank], blocks)

    def put(self, number=1, blocks=((1, 2, 3),), *, asked=True):
        """Store a prompt to the end; return whether it is there."""
        before = self.count("stored")
        self.end.offer(key(number), blocks, label=None, asked=asked)
        assert self.freed() == [blocks]
        eventually(lambda: self.end._offers._under_way.nbytes == 0)
        return self.count("stored") > before

    def freed(self):
        return eventually(self.end.drain_released)

    def find(self, number=1, request="r"):
        """Look and poll, as a scheduler does."""
        self.end.look(request, Want(key(number)))
        return eventually(lambda: self.end.found(request))

    def claim(self, number=1, request="r"):
        found = self.find(number, request)
        assert isinstance(found, Claim), found
        return found

    def reads(self, claim, remote=None, local=None, rank=0):
        remote = claim.blocks if remote is None else remote
        local = tuple(tuple(range(10, 10 + len(ids))) for ids in remote) if local is None else local
        return self.workers[rank].read(claim, remote, local, lambda _: None)

    def count(self, name):
        return self.end.stats().get(name, 0)

    def close(self):
        for worker in self.workers:
            worker.close()
        self.end.close()


@contextmanager
def pair(store, **both):
    """Return a producer and a consumer."""
    p, d = StoreEngine(store, consumes=False, **both), StoreEngine(store, produces=False, **both)
    try:
        yield p, d
    finally:
        d.close()
        p.close()


class Stall:
    """Makes one method of a store's class hang until it is let go."""

    def __init__(self, monkeypatch, cls, method):
        self.entered, self.gate = threading.Event(), threading.Event()
        real = getattr(cls, method)

        def hang(store, *args, **options):
            self.entered.set()
            assert self.gate.wait(30)
            return real(store, *args, **options)

        monkeypatch.setattr(cls, method, hang)


def install_sqlite(monkeypatch, folder):
    """Put the third party's buffer of three methods on the path, with its entry point; return its class."""
    package = Path(__file__).parents[2] / "examples" / "third_party_buffer"
    info = folder / "kvconnect_sqlite_buffer-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvconnect-sqlite-buffer\nVersion: 0.1\n", "utf-8")
    points = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for group, each in points.items()]
    (info / "entry_points.txt").write_text("".join(lines), "utf-8")
    for path in (folder, package):
        monkeypatch.syspath_prepend(path)
    return registry.buffer("sqlite")


def backend(name, **options):
    return Backend(name, {"chunk_bytes": 5000, **options})
