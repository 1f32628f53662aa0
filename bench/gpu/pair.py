"""A pair of processes from the parent's point of view: whatever fails or hangs costs its own contenders only."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from bench.gpu import side
from bench.gpu.memory import Int64Array, Selection, mismatch
from kvconnect.bench.process import Process

#: Longest wait for one answer. Larger than what the processes wait for each other.
LIMIT_S = 40.0
#: The same for a process that has to load torch and CUDA first, together with all others.
START_S = 90.0


class LostError(Exception):
    """The pair is gone, with the reason."""


class Pair:
    """D on one GPU and P on another (or the same), with one medium between them."""

    def __init__(self, name: str, near_device: str, far_device: str, blocks: int) -> None:
        self.name = name
        self.lost: str | None = None
        context = multiprocessing.get_context("spawn")
        peers, channels = context.Pipe(), context.Pipe()
        self._near, self._far = (
            Process(side.main, who, device, blocks, peer, channel, name=f"bench {who} of {name}", timeout_s=LIMIT_S)
            for who, device, peer, channel in (
                (side.NEAR, near_device, peers[0], channels[0]),
                (side.FAR, far_device, peers[1], channels[1]),
            )
        )
        for process in (self._near, self._far):
            process.link.send({"op": "start"})
        for connection in (*peers, *channels):
            connection.close()

    def started(self) -> dict[str, Any]:
        """Wait until both processes have their pools; return what D says of its GPU."""
        return self._guarded(lambda: (self._far.link.recv(START_S), self._near.link.recv(START_S))[1])

    def ask(self, near: bool, op: str, /, **body: Any) -> dict[str, Any]:  # noqa: FBT001 - near or far
        """Ask one process.

        Raises:
            RuntimeError: it failed, with its traceback; it goes on.
            LostError: the pair is gone.

        """
        process = self._near if near else self._far
        return self._guarded(lambda: process.link.ask(op, **body), fatal=False)

    def both(self, op: str, near: dict[str, Any], far: dict[str, Any], far_op: str = "") -> dict[str, Any]:
        """Ask both at the same time; return D's answer. A failure of either ends the pair, for the other may wait."""

        def swap() -> dict[str, Any]:
            self._far.link.send({"op": far_op or op, **far})
            self._near.link.send({"op": op, **near})
            answer = self._near.link.recv()
            self._far.link.recv()
            return answer

        return self._guarded(swap)

    def connect(self, name: str, kind: str, options: dict[str, Any]) -> None:
        """Prepare a contender on both sides and let them meet."""
        body = {"name": name, "kind": kind, "options": options}
        theirs = self.ask(False, "prepare", **body)
        mine = self.ask(True, "prepare", **body)
        self.both("meet", {"name": name, "theirs": theirs}, {"name": name, "theirs": mine})

    def used(self, free: tuple[int, int]) -> int:
        """Return how many bytes fewer are free than ``free``, on the GPU where it is more."""
        return max(before - after for before, after in zip(free, self.free(), strict=True))

    def free(self) -> tuple[int, int]:
        """Return the free bytes of D's and of P's GPU."""
        return self.ask(True, "free")["bytes"], self.ask(False, "free")["bytes"]

    def signatures(self, near: bool, layout: str) -> Int64Array:  # noqa: FBT001 - near or far
        """Return a number for the bytes of each block of one side."""
        return np.frombuffer(self.ask(near, "signatures", layout=layout)["sums"], dtype=np.int64)

    def check(self, move: Callable[[], object], layout: str, chosen: Selection, *, local: bool = False) -> None:
        """Run ``move`` with destinations that differ beforehand; raise `RuntimeError` unless it moved just them.

        Args:
            move: copies ``chosen.far`` of P, or with ``local`` of D itself, onto ``chosen.near`` of D.
            layout: of which pool.
            chosen: the blocks.
            local: as said.

        """
        self.ask(True, "flip", layout=layout, ids=chosen.near)
        before = self.signatures(True, layout)
        source = before if local else self.signatures(False, layout)
        move()
        wrong = mismatch(before, self.signatures(True, layout), source, chosen)
        if wrong is not None:
            raise RuntimeError(wrong)

    def kill(self) -> None:
        """End both processes."""
        self.lost = self.lost or "it was ended"
        for process in (self._near, self._far):
            process.kill()

    def _guarded(self, call: Callable[[], dict[str, Any]], *, fatal: bool = True) -> dict[str, Any]:
        if self.lost is not None:
            raise LostError(self.lost)
        try:
            return call()
        except RuntimeError as error:
            if not fatal:
                raise
            self._lose(error)
        except (EOFError, OSError) as error:  # TimeoutError is one
            self._lose(error)

    def _lose(self, error: Exception) -> NoReturn:
        self.lost = f"{type(error).__name__}: {str(error).strip() or 'a process ended'}"
        self.kill()
        raise LostError(self.lost) from error
