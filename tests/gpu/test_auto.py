"""The pipe ``auto`` between two processes, each with a GPU of its own."""

from __future__ import annotations

import logging
import time
from concurrent.futures import wait
from contextlib import ExitStack, closing

import pytest
import torch

from kvconnect import registry
from kvconnect.buffers.base import Want
from kvconnect.buffers.trial import Trial
from kvconnect.cuda import ipc
from kvconnect.errors import BrokenError
from kvconnect.testing.layouts import noisy_memory
from tests.buffers.engines import Engine, key
from tests.gpu.producing import BLOCKS, LIMITS, SHAPE, having, producing

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(75)]

log = logging.getLogger("tests.gpu.test_auto")


def cannot_be_opened(*_: object) -> None:
    raise BrokenError("CUDA failed to open memory of another process: as this test wants it")


@pytest.mark.parametrize(
    ("names", "opens", "taken"),
    [
        (["cuda_ipc", "nccl", "nixl"], True, {"cuda_ipc"}),
        (["cuda_ipc", "nccl", "nixl"], False, {"nccl", "nixl"}),
        (["nccl", "nixl"], True, {"nccl", "nixl"}),
    ],
    ids=["nearest", "nearest_cannot_open", "as_between_hosts"],
)
def test_auto_takes_the_nearest_pipe_that_works_and_of_equally_near_ones_the_fastest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, names: list[str], opens: bool, taken: set[str]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, here is one")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(registry, "pipes", registry.pipes)  # what `having` changes is put back
    having(names)
    if not opens:
        monkeypatch.setattr(ipc, "Mapped", cannot_be_opened)
    with ExitStack() as stack:
        name, tickets = stack.enter_context(producing(names, "cuda:1"))
        d = Engine("D", consumes=True, device="cuda:0", pipe="auto", group=name, shape=SHAPE, **LIMITS)
        stack.enter_context(closing(d))
        for number, ticket in enumerate(tickets):
            claim = d.find(f"r{number}", Want(key(number), ticket=ticket), 30)
            began = time.monotonic()
            d.read(claim, local=(BLOCKS,), remote=(BLOCKS,)).wait(60)
            log.info("%s: load %d took %.1f ms", "/".join(names), number, 1e3 * (time.monotonic() - began))
            (link,) = d.workers[0]._links._links.values()
            if isinstance(link.pipe, Trial) and link.pipe._opening is not None:
                wait([link.pipe._opening], 30)  # they are measured with the next one
        wanted = noisy_memory(SHAPE, 1, "cuda:0")
        for got, want in zip(d.memories[0].owner, wanted.owner, strict=True):
            half = got.nbytes // 2
            assert torch.equal(got[:half], want[:half])
        assert link.name in taken
        said = [record.getMessage() for record in caplog.records if "reading from" in record.getMessage()]
        assert len(said) == (1 if len(taken) == 1 else 3 if not opens else 2), said
        if len(taken) > 1:
            assert said[-1].count("GB/s") == 2
