"""Memory for large tensors: it comes back from wherever a tensor dies."""

from __future__ import annotations

import threading

import torch

from kvconnect.pipes import landing
from kvconnect.pipes.landing import LEAST_BYTES, Landing
from kvconnect.pipes.reactor import Reactor
from kvconnect.pipes.wire import Kind, Meta
from kvconnect.testing.peers import spawn

LIMIT_S = 10.0


def large() -> Meta:
    return Meta(Kind.TENSOR, torch.uint8, (LEAST_BYTES,), LEAST_BYTES)


def test_a_tensor_may_die_while_the_reactor_is_locked() -> None:
    loop = Reactor("test-reactor")
    areas = Landing(loop)
    kept = [areas.empty(large())]

    def die_with_the_lock() -> None:
        with loop._lock:  # as the collector may do it, in the middle of `call_soon`
            kept.clear()

    spawn(die_with_the_lock).result(LIMIT_S)
    assert len(areas._idle) == 1
    loop.close()


def test_what_is_not_used_again_is_given_back(monkeypatch) -> None:
    monkeypatch.setattr(landing, "_KEEP_S", 0.05)
    loop = Reactor("test-reactor")
    tidied = threading.Event()
    areas = Landing(loop)
    monkeypatch.setattr(areas, "_tidy", lambda: (Landing._tidy(areas), tidied.set()))
    address = areas.empty(large()).data_ptr()
    assert areas.empty(large()).data_ptr() == address
    assert tidied.wait(LIMIT_S)
    assert not areas._idle
    loop.close()
