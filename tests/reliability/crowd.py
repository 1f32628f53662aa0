"""A crowd: producers and consumers that come and go while requests are sent to any two of them.

Engines are processes without a model (`tests.faults.engine`), on ports that the kernel chooses and tickets tell.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from kvconnect.testing.engine import BLOCK, BLOCKS
from kvconnect.testing.leaks import Holdings
from tests.faults.engine import EngineProcess
from tests.reliability.parties import LEASE_S, eventually, start
from tests.reliability.storm import ENOUGH_S, LATE

#: Requests of one engine at once, so few that none is preempted, and no producer waits for blocks.
_AT_ONCE = 4
_crowds = itertools.count()


@dataclass
class _Request:
    """One request under way."""

    name: str
    producer: str
    consumer: str
    since: float = field(default_factory=time.monotonic)


class Crowd:
    """All engines of a group, and the router before them."""

    def __init__(self, pipe: str, producers: int, consumers: int) -> None:
        self._pipe, self._group = pipe, f"crowd-{os.getpid()}-{next(_crowds)}"
        self._numbers, self._names = itertools.count(1), itertools.count()
        self._dice = random.Random(pipe)  # noqa: S311 - who serves a request
        self.engines: dict[str, EngineProcess] = {}
        self._under_way: dict[str, _Request] = {}
        #: How requests ended, by whether their producer was there to the end.
        self.how: Counter[tuple[str, bool]] = Counter()
        for kind, count in (("P", producers), ("D", consumers)):
            for _ in range(count):
                self.join(kind)

    def join(self, kind: str) -> str:
        """Have one more producer (``P``) or consumer (``D``)."""
        name = f"{kind}{next(self._names)}"
        self.engines[name] = start(name, self._group, self._pipe, "recompute")
        return name

    def leave(self, name: str) -> None:
        """Have one shut down in good order, whatever is under way."""
        self.engines[name].call("close")
        self.die(name)

    def die(self, name: str) -> None:
        """Have one killed; a consumer's requests go with it, as its clients hear."""
        self.engines.pop(name).close()
        self._under_way = {each.name: each for each in self._under_way.values() if each.consumer != name}

    def of(self, kind: str) -> list[str]:
        """Return who is there."""
        return [name for name in self.engines if name.startswith(kind)]

    def serve(self, requests: int, producer: str | None = None) -> None:
        """Send requests to any two engines, and wait until all have ended."""
        self.send(requests, producer)
        while self._under_way:
            self.step()

    def send(self, requests: int, producer: str | None = None) -> None:
        """Send requests; those that there is no room for wait for others."""
        for _ in range(requests):
            while not (pairs := list(itertools.product(self._free(producer or "P"), self._free("D")))):
                self.step()
            self._send_one(*self._dice.choice(pairs))

    def step(self) -> None:
        """Have everybody take a step."""
        for name, engine in list(self.engines.items()):
            report = engine.call("step")
            assert not report.wrong, f"{name}: {report.wrong}"
            for ended in self._under_way.keys() & report.outcomes.keys():
                request = self._under_way.pop(ended)
                self.how[report.outcomes[ended], request.producer in self.engines] += 1
        late = [each for each in self._under_way.values() if time.monotonic() > each.since + ENOUGH_S]
        assert not late, f"{late} hang"

    def settle(self) -> None:
        """Within a lease every block of everybody is free."""

        def held() -> dict[str, int]:
            self.step()
            free = {name: engine.call("report").free for name, engine in self.engines.items()}
            return {name: BLOCKS - 1 - count for name, count in free.items() if count != BLOCKS - 1}

        eventually(lambda: not held(), LEASE_S + 2.0, lambda: f"blocks are held: {held()}")

    def holdings(self) -> dict[str, Holdings]:
        """Return what each engine holds."""
        return {name: engine.call("holdings") for name, engine in self.engines.items()}

    def new_threads(self, before: dict[str, Holdings]) -> list[str]:
        """Name threads of who was there before that are more now, but for pools of fixed size."""
        lines = (
            line for name, now in self.holdings().items() if name in before for line in now.more_than(before[name])
        )
        return [line for line in lines if line.startswith("thread") and not LATE.search(line)]

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def _free(self, kind: str) -> list[str]:
        """Return who has room for one more request."""
        held = Counter(name for each in self._under_way.values() for name in (each.producer, each.consumer))
        return [name for name in self.of(kind) if held[name] < _AT_ONCE]

    def _send_one(self, producer: str, consumer: str) -> None:
        number = next(self._numbers)
        tokens = self._dice.randrange(1, 8) * BLOCK - self._dice.randrange(BLOCK - 1)
        prompt = list(range(number, number + tokens))
        ticket = self.engines[producer].call("offer", f"p{number}", prompt)
        self.engines[consumer].call("add", f"d{number}", prompt, ticket)
        self._under_way[f"d{number}"] = _Request(f"d{number}", producer, consumer)
