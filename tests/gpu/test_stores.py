"""Stores between engines whose blocks are on GPUs: a directory, and a Redis server where there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvconnect.testing.layouts import separate_layers, shared_region
from tests.buffers.stores import StoreEngine, backend

pytestmark = pytest.mark.gpu

LENT = ((7, 3, 30, 31), (0, 0, 12, 9, 2))
"""Blocks of two groups; a sliding window has left null blocks in the second."""


@pytest.fixture(params=["filesystem", "redis"])
def store(request, tmp_path: Path):
    """A store for one test's engines."""
    if request.param == "filesystem":
        yield backend("filesystem", path=str(tmp_path / "kv"))
        return
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here")
    from tests.buffers.redis_server import RedisServer

    with RedisServer() as server:
        yield backend("redis", url=server.url)


@pytest.fixture
def on(store):
    """Make an engine on a device; all are closed."""
    made = []

    def make(device, layout, **options):
        made.append(StoreEngine(store, layouts=[layout], device=device, **options))
        return made[-1]

    yield make
    for engine in reversed(made):
        engine.close()


def test_blocks_come_from_one_device_to_another_whatever_their_strides(on, devices):
    p = on(devices[0], separate_layers(4, 40, 2, 300, groups=2), consumes=False)
    d = on(devices[1], shared_region(4, 40, 2, 300, groups=2), produces=False)
    assert p.put(1, LENT)
    remote, local = ((2, 3, 4), (3, 1)), ((20, 5, 6), (1, 39))
    d.reads(d.claim(), remote, local).wait(8)
    assert d.stream(0, local).equal(p.stream(0, ((3, 30, 31), (2, 12))))
    nowhere = ((*range(1, 5), *range(7, 20)), (*range(2, 39),))
    assert not d.stream(0, nowhere).any(), "only what was asked for was written"


@pytest.mark.parametrize(("of", "to"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_blocks_go_between_host_and_device(on, of, to):
    layout = separate_layers(4, 40, 2, 300, groups=2)
    p, d = on(of, layout, consumes=False), on(to, layout, produces=False)
    assert p.put(1, LENT)
    local = ((20, 5, 6, 8), (1, 39, 2))
    d.reads(d.claim(), ((1, 2, 3, 4), (1, 2, 3)), local).wait(8)
    assert d.stream(0, local).equal(p.stream(0, ((7, 3, 30, 31), (12, 9, 2))))


def test_a_long_prompt_comes_in_many_chunks_while_others_do(on, devices):
    layout = separate_layers(layers=8, blocks=512, heads=2, piece_bytes=700)  # 36 chunks each
    p, d = on(devices[0], layout, consumes=False), on(devices[1], layout, produces=False)
    lent = [(tuple(range(1 + 16 * n, 17 + 16 * n)),) for n in range(4)]
    assert all(p.put(n + 1, blocks) for n, blocks in enumerate(lent))
    claims = [d.claim(n + 1, f"r{n}") for n in range(4)]
    local = [(tuple(range(500 - 16 * n, 484 - 16 * n, -1)),) for n in range(4)]
    loads = [d.reads(claim, local=blocks) for claim, blocks in zip(claims, local, strict=True)]
    for load in loads:
        load.wait(30)
    for ours, theirs in zip(local, lent, strict=True):
        assert d.stream(0, ours).equal(p.stream(0, theirs))
