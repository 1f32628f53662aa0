"""What the tests of the workers' ends share."""

import secrets
import threading
from collections import Counter

import pytest

from kvconnect import registry
from kvconnect.buffers.filesystem import FilesystemStore
from kvconnect.buffers.redis import RedisStore
from tests.buffers.faults import FaultyPipe, engines
from tests.buffers.redis_server import RedisServer
from tests.buffers.stores import backend


@pytest.fixture
def faulty(monkeypatch):
    own = {"opened": Counter(), "started": [], "held": [], "stalled": threading.Event(), "gate": threading.Event()}
    own["opens_stall"] = {}
    cls = type("Faulty", (FaultyPipe,), own)
    real = registry.pipe
    monkeypatch.setattr(registry, "pipe", lambda name: cls if name == "inproc" else real(name))
    return cls


@pytest.fixture
def pair(faulty):  # noqa: ARG001 - its pipes are in use
    p, d = engines(transfer_timeout_s=0.5)
    yield p, d
    d.close()
    p.close()


@pytest.fixture(scope="session")
def redis_server():
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["filesystem", "redis"])
def store(request, tmp_path):
    """A store for one test's engines, as their configuration names it."""
    if request.param == "filesystem":
        return backend("filesystem", path=str(tmp_path / "kv"))
    server = request.getfixturevalue("redis_server")
    return backend("redis", url=server.url, prefix=f"test-{secrets.token_hex(4)}")


@pytest.fixture
def store_class(store):
    """What engines open for it."""
    return {"filesystem": FilesystemStore, "redis": RedisStore}[store.name]
