"""Processes of a measurement: spawned, answering commands, gone when the parent is."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from kvconnect.bench.link import TIMEOUT_S, Link

Handler = Callable[..., dict[str, Any]]
_PR_SET_PDEATHSIG = 1


class Process:
    """A spawned process that runs ``target(connection, *more)``; `link` talks to it."""

    def __init__(self, target: Callable[..., None], *more: Any, name: str, timeout_s: float = TIMEOUT_S) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=_run, args=(target, there, *more), name=name, daemon=True)
        self._process.start()
        there.close()
        self.link = Link(here, timeout_s)

    def stop(self) -> None:
        """Freeze every thread of the process, those that spin above all."""
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `stop`."""
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the process, frozen or not."""
        self._process.kill()
        self._process.join(10)

    @property
    def _pid(self) -> int:
        if self._process.pid is None:
            raise RuntimeError("the process was not started")
        return self._process.pid


def _run(target: Callable[..., None], connection: Connection, *more: Any) -> None:
    # A frozen process cannot notice that its parent was killed; the kernel can.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    target(connection, *more)


def serve(link: Link, handlers: dict[str, Handler]) -> None:
    """Answer commands with ``handlers[op](**body)`` until the parent is gone."""
    with suppress(EOFError, OSError):
        while True:
            body = link.await_message()
            try:
                answer = handlers[body.pop("op")](**body)
            except Exception:  # noqa: BLE001 - the parent raises it, with this text
                answer = {"failed": traceback.format_exc()}
            link.send(answer)
