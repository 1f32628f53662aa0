"""How fast a pipe moves scattered blocks from a peer over the real hand-over path, against a ceiling."""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvconnect.buffers.base import Claim, EndSettings, LookupKey
from kvconnect.buffers.mover import Mover
from kvconnect.doctor.counterpart import Blocks, Case, other_device
from kvconnect.doctor.findings import Path
from kvconnect.errors import IntegrityError, KVConnectError
from kvconnect.paging import BlockIds

#: What each part of measuring may take, about, and the largest load.
_BUDGET_S = 3.0
_LARGE_S = 0.5
_SINGLES, _LEAST_SINGLES = 50, 5
_ROUNDS, _LEAST_ROUNDS = 9, 3
#: The first loads open pipes, and try several against each other where they are equally near.
_WARM_UPS = 2
_SLACK_S = 10.0


@dataclass(frozen=True)
class Ceiling:
    """What no pipe can be faster than: measured beside it, or known."""

    name: str
    #: Takes bytes, returns the seconds that they take.
    seconds: Callable[[int], float]


@dataclass(frozen=True)
class Owner:
    """Where blocks are read from: its scheduler's address and its incarnation."""

    at: str
    incarnation: str


class Reader:
    """This end of a measurement: a worker as an engine has it."""

    def __init__(self, settings: EndSettings, blocks: Blocks, owner: Owner) -> None:
        """Open it; raises `ConfigError` as `Mover` does. The pipe to the owner opens with the first load."""
        self._blocks, self._owner = blocks, owner
        self._limit_s = settings.options.transfer_timeout_s + _SLACK_S
        self._mover = Mover(settings, 0, blocks.memory)
        #: Name of the pipe that the last load went by.
        self.via = ""

    def load(self, count: int, seed: int) -> float:
        """Load ``count`` scattered blocks; return the seconds it took.

        Raises:
            KVConnectError: it failed, or what came are not the owner's blocks.

        """
        remote, local = self._blocks.draw(count, 2 * seed), self._blocks.draw(count, 2 * seed + 1)
        claim = Claim(
            secrets.token_hex(8),
            LookupKey("doctor", bytes(16), 0),
            tuple(map(tuple, remote)),
            {"at": self._owner.at, "incarnation": self._owner.incarnation},
        )
        seconds = self._fetch(claim, remote, local)
        if not self._blocks.arrived(remote, local):
            raise IntegrityError(f"pipe {self.via!r} brought other bytes than the peer's blocks have")
        return seconds

    def _fetch(self, claim: Claim, remote: BlockIds, local: BlockIds) -> float:
        start = time.perf_counter()
        transfer = self._mover.fetch(claim, remote, local, lambda _: None)
        try:
            transfer.wait(self._limit_s)
            return time.perf_counter() - start
        finally:
            self.via = transfer.via

    def close(self) -> None:
        """End the pipe and its threads."""
        self._mover.close()


@dataclass(eq=False)
class Contender:
    """A pipe that is measured; `loads` holds seconds by round."""

    reader: Reader
    taken: bool
    count: int
    once_s: float
    singles: list[float]
    loads: list[float] = field(default_factory=list)
    error: KVConnectError | None = None

    @classmethod
    def enter(cls, reader: Reader, case: Case, *, taken: bool) -> Contender:
        """Open whichever pipe ``reader`` takes, and measure loads of one block. Raises as `Reader.load`."""
        reader.load(1, 0)  # opens it
        one = min(reader.load(1, seed) for seed in (1, 2))
        count = min(case.blocks, max(1, int(_LARGE_S / one)))
        once = min(reader.load(count, seed) for seed in range(_WARM_UPS))
        singles = [reader.load(1, seed) for seed in range(_fitting(one, _LEAST_SINGLES, _SINGLES))]
        return cls(reader, taken, count, once, singles)

    def run(self, seed: int) -> None:
        """Run one round, unless an earlier one has failed."""
        if self.error is None:
            try:
                self.loads.append(self.reader.load(self.count, seed))
            except KVConnectError as error:
                self.error = error

    def path(self, case: Case, ceiling: Ceiling | None, bounds: Sequence[float]) -> Path:
        """Return what was measured; ``bounds`` is what a large load takes at the ceiling, by round, in seconds."""
        nbytes, sizes = self.count * case.block_bytes, (case.block_bytes, case.piece_bytes)
        p50, p99 = (round(float(value), 1) for value in np.percentile(np.asarray(self.singles) * 1e6, (50, 99)))
        rate = _rate(nbytes, self.loads)
        if ceiling is None:
            return Path(self.reader.via, self.taken, rate, p50, p99, nbytes, *sizes)
        share = self.count / case.blocks
        ratio = _short(float(np.median(np.asarray(bounds) * share / np.asarray(self.loads))))
        most = _rate(case.blocks * case.block_bytes, bounds)
        return Path(self.reader.via, self.taken, rate, p50, p99, nbytes, *sizes, ceiling.name, most, ratio)


def race(contenders: Sequence[Contender], case: Case, ceiling: Ceiling | None) -> list[float]:
    """Measure large loads in rounds, everybody and the ceiling in each; return the ceiling's seconds by round.

    A busy host changes by the second: only what ran side by side is compared.
    """
    bounds = []
    for number in range(_fitting(sum(one.once_s for one in contenders), _LEAST_ROUNDS, _ROUNDS)):
        if ceiling is not None:
            bounds.append(ceiling.seconds(case.blocks * case.block_bytes))
        for i in range(len(contenders)):
            contenders[(number + i) % len(contenders)].run(number)
    return bounds


def _fitting(seconds: float, least: int, most: int) -> int:
    """Return how many repetitions of ``seconds`` fit into the budget."""
    return max(least, min(most, int(_BUDGET_S / seconds)))


def _rate(nbytes: int, seconds: Sequence[float]) -> float:
    return _short(nbytes / float(np.median(seconds)) / 1e9)


def _short(value: float) -> float:
    """Return four digits of ``value``, however small it is."""
    return float(f"{value:.4g}")


def memory_copy(device: str, nbytes: int) -> Ceiling:
    """Copy contiguous memory within this process: on one thread, or between the two GPUs."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=other_device(device))
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        if device == "cpu":
            ctypes.memmove(target.data_ptr(), source.data_ptr(), count)
        else:
            target[:count].copy_(source[:count])
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(nbytes)
    return Ceiling("memcpy", seconds)


def known(name: str, bytes_a_second: float) -> Ceiling:
    """Return a ceiling that is told, not measured: a network interface's speed."""
    return Ceiling(name, lambda nbytes: nbytes / bytes_a_second)
