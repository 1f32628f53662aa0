"""What an owner has promised a taker: to leave the blocks of its claim as they are, for a lease.

Every answer that grants, renews or holds a claim is such a promise, if both count by one clock,
as the processes of a host do. A reader whose bytes are in place before it runs out need not ask
whether they were still the right ones. Clocks of two hosts may part (a virtual machine that was
paused does not notice): a peer's promise is no ground to decode from what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from kvconnect.clock import SYSTEM, Clock

_MAX_LEASE_MS = 1 << 31

Answer = Future[dict[str, Any]]


class Promise:
    """Until when the owner of one claim leaves its blocks as they are, as far as is known here.

    The scheduler's and the workers' halves of one process share it, so that every renewal
    counts at once. Another process of the host gets a copy of what was known when the claim
    left; another host gets nothing, for its clock is another one. Thread-safe.
    """

    __slots__ = ("clock", "foreign", "question", "until")

    def __init__(self, until: float = 0.0, clock: Clock = SYSTEM, *, foreign: bool = False) -> None:
        self.clock = clock
        #: Whether the owner is known to count by another clock: to ask it for a promise is of no use.
        self.foreign = foreign
        #: A time of that clock.
        self.until = until
        #: The latest claim; its answer may be under way.
        self.question: Answer | None = None

    def holds(self, for_s: float = 0.0) -> bool:
        """Whether it reaches to ``for_s`` seconds from now."""
        return self.clock.now() + for_s < self.until

    def ask(self, call: Callable[[], Answer]) -> Answer:
        """Claim the blocks by ``call``, be it for the first time or again: an ``"ok"`` is good for a lease."""
        # From before the question: the owner counts from when it heard it.
        asked = self.clock.now()
        self.question = question = call()
        question.add_done_callback(lambda answer: self._heard(answer, asked))
        return question

    def prolong(self, answer: Mapping[str, Any], asked: float) -> None:
        """Take note of the lease in a good ``answer`` to what was asked then."""
        lease_ms = answer.get("lease_ms")
        self.foreign = not self._is_of_our_clock(answer, asked)
        if not self.foreign and type(lease_ms) is int and 0 < lease_ms < _MAX_LEASE_MS:
            self.until = max(self.until, asked + lease_ms / 1000)

    def _is_of_our_clock(self, answer: Mapping[str, Any], asked: float) -> bool:
        """By its name, and by what it read between our question and now (sandboxes may fake names)."""
        now, name = answer.get("now"), self.clock.identity
        return bool(name) and answer.get("clock") == name and type(now) is float and asked <= now <= self.clock.now()

    def _heard(self, answer: Answer, asked: float) -> None:
        if answer.exception() is None and answer.result().get("state") == "ok":
            self.prolong(answer.result(), asked)

    def __reduce__(self) -> tuple[Callable[[float, str, bool], Promise], tuple[float, str, bool]]:
        """Pickle what is known."""
        return _arrived, (self.until, self.clock.identity, self.foreign)


def _arrived(until: float, clock: str, foreign: bool) -> Promise:  # noqa: FBT001 - as pickle calls it
    return Promise(until if clock == SYSTEM.identity else 0.0, foreign=foreign)
