"""Interleaved rounds: every contender once a round, in a shuffled order, one at a time.

A shared machine drifts by the second, so only neighbours in time are compared: a
ratio is the median over rounds of reference time ÷ case time of the *same* round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Runs one sample for a round and returns its seconds.
Sample = Callable[[int], float]
CASE = "case"


class Clock:
    """The timer that pytest-benchmark reads around a case.

    A case ends when the *other* process holds the bytes, which only that process
    can stamp; `took` makes the next reading be that moment.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._end: float | None = None

    def __call__(self) -> float:
        """Return now, or the end that `took` set."""
        if self._end is not None:
            end, self._end = self._end, None
            return end
        self._start = time.perf_counter()
        return self._start

    def took(self, seconds: float) -> None:
        """Let the running measurement have taken ``seconds``."""
        self._end = self._start + seconds


clock = Clock()


class Rounds:
    """Runs a case's rounds as pytest-benchmark's pedantic mode does, without its tables."""

    def pedantic(
        self, function: Callable[[], None], *, setup: Callable[[], None], rounds: int, iterations: int
    ) -> None:
        """Call ``setup`` and ``function`` in turn; what they take is `Race.samples`."""
        for _ in range(rounds * iterations):
            setup()
            function()


@dataclass
class Race:
    """A case and its references over ``rounds`` rounds; `samples` holds seconds by contender and round."""

    case: Sample
    references: Mapping[str, Sample]
    rounds: int
    seed: int = 0
    samples: dict[str, list[float]] = field(default_factory=dict)

    def run(self, benchmark: Any) -> None:
        """Let pytest-benchmark run the case; the references run between its rounds.

        A round's order is a shuffle of all contenders. What comes before the case in
        it runs in the set-up, what comes after in the set-up of the next round.
        """
        rng = np.random.default_rng(self.seed)
        self.samples = {name: [] for name in (CASE, *self.references)}
        for warm_up in (self.case, *self.references.values()):
            warm_up(0)
        behind: list[str] = []
        current = iter(range(self.rounds))
        now = 0

        def before() -> None:
            nonlocal behind, now
            self._run(behind, now)
            now = next(current)
            order = [str(name) for name in rng.permutation(list(self.samples))]
            at = order.index(CASE)
            self._run(order[:at], now)
            behind = order[at + 1 :]

        def timed() -> None:
            seconds = self.case(now)
            self.samples[CASE].append(seconds)
            clock.took(seconds)

        benchmark.pedantic(timed, setup=before, rounds=self.rounds, iterations=1)
        self._run(behind, now)

    def _run(self, names: list[str], index: int) -> None:
        for name in names:
            self.samples[name].append(self.references[name](index))


def ratio(case: list[float], reference: list[float]) -> float:
    """Return how many times faster the case is than the reference, paired by round."""
    return float(np.median(np.asarray(reference) / np.asarray(case)))
