"""What became of the pipes to each peer: which failed lately, and how fast others were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvconnect.buffers.choice import Candidate
from kvconnect.clock import SYSTEM, Clock

#: How long a pipe that failed is the last to be tried.
_PASSED_OVER_S = 60.0
_MAX_PEERS = 1024


class Experience:
    """Failures by incarnation of a peer, and rates by its host: a restarted engine is as far away. Thread-safe."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._failures: dict[tuple[str, str, str], tuple[str, float]] = {}
        self._rates: dict[str, dict[str, float]] = {}

    def fail(self, at: str, incarnation: str, name: str, reason: str) -> None:
        """Remember for a while that the pipe ``name`` is of no use."""
        now = self._clock.now()
        for key, (_, until) in list(self._failures.items()):
            if until <= now:
                self._failures.pop(key, None)
        self._failures[at, incarnation, name] = (reason, now + _PASSED_OVER_S)

    def failure(self, at: str, incarnation: str, name: str) -> str | None:
        """Return why the pipe ``name`` failed lately, if it did."""
        reason, until = self._failures.get((at, incarnation, name), ("", 0.0))
        return reason if self._clock.now() < until else None

    def measure(self, at: str, rates: Mapping[str, float]) -> None:
        """Remember how fast pipes to a peer's host were, in bytes a second."""
        host = _host(at)
        self._rates[host] = {**self._rates.pop(host, {}), **rates}
        for oldest in list(self._rates)[:-_MAX_PEERS]:
            self._rates.pop(oldest, None)

    def rates(self, at: str) -> Mapping[str, float]:
        """Return how fast pipes to a peer's host were, in bytes a second, those that were measured."""
        return self._rates.get(_host(at), {})

    def rank(self, at: str, incarnation: str, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Sort pipes, the best first: those that failed are the last, then the nearest come first, then the fastest."""
        rates = self.rates(at)

        def place(candidate: Candidate) -> tuple[bool, int, float]:
            failed = self.failure(at, incarnation, candidate.name) is not None
            return failed, int(candidate.cls.traits.reach), -rates.get(candidate.name, 0.0)

        return sorted(candidates, key=place)


def _host(at: str) -> str:
    return at.rpartition(":")[0]
