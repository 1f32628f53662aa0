"""Where device work runs: a fixed few streams of one device, each with a thread that waits for it.

vLLM computes on streams of its own and in its own threads; copies may neither wait in
these nor order themselves behind them. A thread per stream waits on an event without
spinning, so *over* means that the device is done. Long works take turns chunk by chunk.
"""

from __future__ import annotations

import logging
import queue
import threading
from abc import ABC, abstractmethod
from typing import Any

from kvconnect.cuda import driver
from kvconnect.errors import BrokenError, KVConnectError

logger = logging.getLogger(__name__)

#: Two, so that a short work never waits behind more than one chunk of a long one.
LANES = 2


class Work(ABC):
    """Something for a device to do, in steps."""

    @abstractmethod
    def step(self, stream: Any) -> bool:
        """Enqueue the next chunk on ``stream``, a CuPy stream; return whether another follows it.

        What the chunk uses must live until the next call of `step` or `over`. May raise
        `KVConnectError`, which ends the work.
        """

    @abstractmethod
    def over(self, error: KVConnectError | None) -> None:
        """Hear that the device has finished all that was enqueued, or failed. Must not block."""


class Lanes:
    """The streams of one device and their threads."""

    def __init__(self, device: int, count: int = LANES) -> None:
        self.device = device
        self._works: queue.SimpleQueue[Work] = queue.SimpleQueue()
        for number in range(count):
            name = f"kvconnect-cuda{device}-lane{number}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Work) -> None:
        """Have ``work`` done after what is waiting already; never blocks."""
        self._works.put(work)

    def _run(self) -> None:
        lane: _Lane | None = None
        while True:
            work = self._works.get()
            try:
                with driver.errors("copy"), driver.use(self.device):
                    lane = lane or _Lane()
                    more = lane.run(work)
            except KVConnectError as error:
                _end(work, error)
            except Exception as error:  # noqa: BLE001 - whatever a work raises, its waiters must hear of it
                broken = BrokenError(f"{type(error).__name__}: {error}")
                broken.__cause__ = error
                _end(work, broken)
            else:
                if more:
                    self._works.put(work)
                else:
                    _end(work, None)


class _Lane:
    """One stream of the current device, and how to wait for it."""

    def __init__(self) -> None:
        cuda = driver.cupy().cuda
        # Above vLLM's own priority: a few multiprocessors shortly, rather than soon.
        self._stream = cuda.Stream(non_blocking=True, priority=-1)
        self._event = cuda.Event(block=True, disable_timing=True)

    def run(self, work: Work) -> bool:
        try:
            return work.step(self._stream)
        finally:
            # Also after an error: what was enqueued before it still uses the work's memory.
            self._event.record(self._stream)
            self._event.synchronize()


@driver.per_process
def lanes(device: int) -> Lanes:
    """Return this process's lanes of ``device``."""
    return Lanes(device)


def _end(work: Work, error: KVConnectError | None) -> None:
    try:
        work.over(error)
    except Exception:  # the lane serves others, too
        logger.exception("a callback of a copy failed")
