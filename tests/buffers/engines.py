"""Engines without a model: a scheduler's and its workers' ends of `RemoteBuffer`, over real sockets."""

import dataclasses
import itertools
import os
import threading
import time
from contextlib import contextmanager

import torch

from kvconnect.buffers.base import EndSettings, LookupKey, Miss, Want
from kvconnect.buffers.remote import RemoteBuffer
from kvconnect.config import Backend, Config
from kvconnect.paging import LayerLayout, PagedLayout
from kvconnect.testing.layouts import blank_memory, noisy_memory

BLOCKS, PIECE, LAYERS = 64, 512, 3
_groups = itertools.count()


def group():
    """Return a name that no other test's engines have."""
    return f"test-{os.getpid()}-{next(_groups)}"


def layout(blocks=BLOCKS, piece=PIECE, layers=LAYERS):
    return PagedLayout(
        tuple(LayerLayout(f"l{i}", 0, i, 0, piece, blocks, piece) for i in range(layers)), (blocks * piece,) * layers
    )


def key(number, length=32, namespace="ns"):
    return LookupKey(namespace, number.to_bytes(16, "big"), length)


class Engine:
    """One engine; ``options`` are `Config`'s."""

    def __init__(
        self,
        name,
        *,
        produces=False,
        consumes=False,
        parts=1,
        pipe="inproc",
        shape=None,
        introduce=True,
        marks=None,
        device="cpu",
        **options,
    ):
        """``marks`` are added to the workers' fingerprint only; their memory is on ``device``."""
        fingerprint = {"model": "m", "dtype": "bfloat16", **options.pop("fingerprint", {})}
        config = Config(**{"connect_timeout_s": 3.0, "transfer_timeout_s": 10.0, **options})
        settings = EndSettings(
            name, fingerprint, parts, produces, consumes, config, Backend(pipe) if isinstance(pipe, str) else pipe
        )
        shape = shape or layout()
        self.memories = [
            noisy_memory(shape, rank + 1, device) if produces else blank_memory(shape, device) for rank in range(parts)
        ]
        self.end = RemoteBuffer.scheduler_end(settings)
        own = dataclasses.replace(settings, fingerprint={**fingerprint, **(marks or {})})
        self.workers = [RemoteBuffer.worker_end(own, rank, memory) for rank, memory in enumerate(self.memories)]
        if introduce:
            self.end.introduce([worker.describe() for worker in self.workers])

    def offer(self, number=1, blocks=((1, 2, 3),), label=None, asked=True):
        return self.end.offer(key(number), blocks, label=label, asked=asked)

    def find(self, request, want, limit_s=8.0):
        """Look and poll, as a scheduler does."""
        self.end.look(request, want)
        return self.answer(request, limit_s)

    def answer(self, request, limit_s=8.0):
        return eventually(lambda: self.end.found(request), limit_s)

    def read(self, claim, local=None, remote=None, rank=0):
        remote = claim.blocks if remote is None else remote
        local = tuple(tuple(range(10, 10 + len(ids))) for ids in remote) if local is None else local
        return self.workers[rank].read(claim, remote, local, lambda _: None)

    def block(self, number, rank=0):
        """Return the bytes of one block, all layers."""
        return torch.cat([r.view(BLOCKS, PIECE)[number] for r in self.memories[rank].owner])

    def freed(self):
        return eventually(self.end.drain_released)

    def close(self):
        for worker in self.workers:
            worker.close()
        self.end.close()


def eventually(call, limit_s=8.0):
    """Return the first true answer of ``call``."""
    deadline = time.monotonic() + limit_s
    while not (answer := call()):
        assert time.monotonic() < deadline, "it did not come about in time"
        threading.Event().wait(0.005)
    return answer


def is_miss(answer, cause):
    assert isinstance(answer, Miss), answer
    assert answer.cause == cause, answer
    return True


@contextmanager
def engines(producer=None, consumer=None, **both):
    options = {"group": group(), **both}
    p = Engine("P", produces=True, **{**options, **(producer or {})})
    d = Engine("D", consumes=True, **{**options, **(consumer or {})})
    try:
        yield p, d
    finally:
        d.close()
        p.close()


def meet(p, d):
    """Let D read something of P's once."""
    claim = d.find("meet", Want(key(99), ticket=p.offer(99, ((63,),))))
    d.read(claim).wait(8)
    d.end.settle("meet")
    p.freed()
