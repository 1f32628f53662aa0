"""Loads wait for what the device was still computing when they were ordered.

A block that vLLM frees may still be written by a step that is under way, for a request
that has ended meanwhile. Current releases hand such a block out only after that step
(`compat.defers_freed_blocks`); before 0.24 the load itself has to wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

log = logging.getLogger(__name__)


class Fence:
    """Makes calls once the work before them is done, in order, on one thread of its own."""

    def __init__(self, device: str) -> None:
        """Watch ``device``, a CUDA device."""
        self._device = torch.device(device)
        self._waiting: SimpleQueue[tuple[torch.cuda.Event, Callable[[], object]] | None] = SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name="kvconnect-fence", daemon=True).start()

    def then(self, call: Callable[[], object]) -> None:
        """Make ``call`` once the work has finished that the caller's current stream has now."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._waiting.put((event, call))

    def close(self) -> None:
        """Make no more calls."""
        self._closed = True
        self._waiting.put(None)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            event, call = item
            try:
                event.synchronize()
                if not self._closed:
                    call()
            except Exception:  # whatever one of them raises, those behind it are to be made
                log.exception("a load could not be started")
