"""A pipe that is closed because nobody uses it returns what it held of both GPUs' memory."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, closing

import pytest
import torch

from kvconnect import registry
from kvconnect.buffers.base import Want
from kvconnect.testing.layouts import noisy_memory
from tests.buffers.engines import Engine, eventually, key
from tests.gpu.producing import BLOCKS, LIMITS, SHAPE, having, producing

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(75)]

IDLE_S = 2.0
#: What CUDA's own caches may take meanwhile.
SLACK = 16 << 20

log = logging.getLogger("tests.gpu.test_idle_pipes")


def free() -> list[int]:
    """Return the bytes that are free on each device, whoever has the others."""
    torch.cuda.synchronize()
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]


@pytest.mark.parametrize("pipe", ["cuda_ipc", "nccl", "nixl"])
def test_a_closed_pipe_holds_no_memory_of_either_device_and_the_next_load_opens_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pipe: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, here is one")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(registry, "pipes", registry.pipes)  # what `having` changes is put back
    having([pipe])
    wanted = noisy_memory(SHAPE, 1, "cuda:0")
    with ExitStack() as stack:
        name, tickets = stack.enter_context(producing([pipe], "cuda:1"))
        d = Engine(
            "D", consumes=True, device="cuda:0", pipe="auto", group=name, shape=SHAPE, pipe_idle_s=IDLE_S, **LIMITS
        )
        stack.enter_context(closing(d))
        links = d.workers[0]._links._links
        closed = []
        for number, ticket in enumerate(tickets[:3]):
            claim = d.find(f"r{number}", Want(key(number), ticket=ticket), 30)
            began = time.monotonic()
            d.read(claim, local=(BLOCKS,), remote=(BLOCKS,)).wait(60)
            seconds = time.monotonic() - began
            for got, want in zip(d.memories[0].owner, wanted.owner, strict=True):
                half = got.nbytes // 2
                assert torch.equal(got[:half], want[:half])
                got.zero_()
            opened = free()
            eventually(lambda: not links, 2 * IDLE_S + 5)
            threading.Event().wait(2.0)  # both ends let go in the background
            closed.append(free())
            held = [(after - before) / 1e6 for before, after in zip(opened, closed[-1], strict=True)]
            log.info(
                "%s: load %d took %.2f s with its pipe, which held %s MB of the devices", pipe, number, seconds, held
            )
    # What the first one took for all that come after it stays.
    first, last = closed[0], closed[-1]
    assert all(now > before - SLACK for before, now in zip(first, last, strict=True)), closed
