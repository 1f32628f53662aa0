"""What became of the pipes to each peer: which failed lately, and how fast others were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from kvconnect.buffers.choice import Candidate
from kvconnect.clock import SYSTEM, Clock

#: How long a pipe that failed is the last to be tried; each time that it fails again, twice as long.
_PASSED_OVER_S = 60.0
#: How long a measurement is believed, and the most that a pipe is passed over. To measure
#: again takes a load of some tenths of a second, and opens every pipe.
_BELIEVED_S = 1800.0
_MAX_PEERS = 1024


class Experience:
    """Failures by incarnation of a peer, and rates by its host: a restarted engine is as far away. Thread-safe."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        #: By peer and pipe: why, until when, and for how long it counts.
        self._failures: dict[tuple[str, str, str], tuple[str, float, float]] = {}
        #: By host and pipe: the rate, and until when it is believed.
        self._rates: dict[str, dict[str, tuple[float, float]]] = {}

    def fail(self, at: str, incarnation: str, name: str, reason: str) -> None:
        """Remember for a while that the pipe ``name`` is of no use."""
        now = self._clock.now()
        for key, (_, until, lasts_s) in list(self._failures.items()):
            if until + lasts_s <= now:
                self._failures.pop(key, None)
        _, until, lasts_s = self._failures.get((at, incarnation, name), ("", now, 0.0))
        if until <= now:  # else it is the same failure, told by another load
            lasts_s = min(max(_PASSED_OVER_S, 2 * lasts_s), _BELIEVED_S)
            until = now + lasts_s
        self._failures[at, incarnation, name] = (reason, until, lasts_s)

    def failure(self, at: str, incarnation: str, name: str) -> str | None:
        """Return why the pipe ``name`` failed lately, if it did."""
        reason, until, _ = self._failures.get((at, incarnation, name), ("", 0.0, 0.0))
        return reason if self._clock.now() < until else None

    def measure(self, at: str, rates: Mapping[str, float]) -> None:
        """Remember how fast pipes to a peer's host were, in bytes a second."""
        host = _host(at)
        until = self._clock.now() + _BELIEVED_S
        self._rates[host] = {**self._rates.pop(host, {}), **{name: (rate, until) for name, rate in rates.items()}}
        for oldest in list(self._rates)[:-_MAX_PEERS]:
            self._rates.pop(oldest, None)

    def rates(self, at: str) -> Mapping[str, float]:
        """Return how fast pipes to a peer's host were, in bytes a second, those that were measured lately."""
        now = self._clock.now()
        return {name: rate for name, (rate, until) in self._rates.get(_host(at), {}).items() if now < until}

    def holds_until(self, at: str, incarnation: str) -> float:
        """Return when the next of what is known of a peer's pipes will be too old, a time of the clock."""
        rates = self._rates.get(_host(at), {}).values()
        failures = [until for key, (_, until, _) in list(self._failures.items()) if key[:2] == (at, incarnation)]
        now = self._clock.now()
        return min((until for until in [*failures, *(until for _, until in rates)] if until > now), default=math.inf)

    def rank(self, at: str, incarnation: str, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Sort pipes, the best first: those that failed are the last, then the nearest come first, then the fastest."""
        rates = self._rates.get(_host(at), {})  # old ones, too: better than none

        def place(candidate: Candidate) -> tuple[bool, int, float]:
            failed = self.failure(at, incarnation, candidate.name) is not None
            return failed, int(candidate.cls.traits.reach), -rates.get(candidate.name, (0.0, 0.0))[0]

        return sorted(candidates, key=place)


def _host(at: str) -> str:
    return at.rpartition(":")[0]
