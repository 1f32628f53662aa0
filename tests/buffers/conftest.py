"""What the tests of the workers' ends share."""

import threading
from collections import Counter

import pytest

from kvconnect import registry
from tests.buffers.faults import FaultyPipe, engines


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
