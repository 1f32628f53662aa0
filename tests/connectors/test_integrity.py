"""A load whose blocks arrived damaged is reported to vLLM as failed, which recomputes it (or fails the request)."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import registry
from kvconnect.testing.faults import Corrupt, faulty
from tests.buffers.engines import engines
from tests.connectors.test_timeline import planned, run, worker


def test_a_damaged_load_is_a_failed_load(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    damage, real = Corrupt(), registry.pipe
    monkeypatch.setattr(registry, "pipe", lambda name: faulty(real(name), damage))
    with engines(pipe="shm", checksum=True) as (p, d):
        assert run(worker(d), planned(p, d)) == ({"r"}, {"r"})
        assert "IntegrityError: the blocks that arrived are not those of the owner" in caplog.text
        assert d.workers[0].stats() == {
            "failed_integrity": 1,
            "microseconds_on_wire": d.workers[0].stats()["microseconds_on_wire"],
        }
