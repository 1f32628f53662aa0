"""Loads wait for what the device was still computing when they were ordered.

A block that vLLM frees may still be written by a step that is under way, for a request
that has ended meanwhile. Current releases hand such a block out only after that step
(`compat.defers_freed_blocks`); before 0.26 the load itself has to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Fence:
    """Makes calls once the work before them is done, in order, on one thread of its own."""

    def __init__(self, device: str) -> None:
        """Watch ``device``, a CUDA device."""
        self._device = torch.device(device)
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="kvconnect-fence")

    def then(self, call: Callable[[], object]) -> None:
        """Make ``call`` once the work has finished that the caller's current stream has now."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._waiter.submit(self._make, event, call)

    def close(self) -> None:
        """Make no more calls."""
        self._waiter.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _make(event: torch.cuda.Event, call: Callable[[], object]) -> None:
        event.synchronize()
        call()
