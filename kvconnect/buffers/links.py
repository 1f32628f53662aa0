"""Links to peers' workers: the pipe, or for a while the pipes, that this worker reads each over.

The nearest pipe that can be opened is taken. Where others are as near, they are measured
against it (`kvconnect.buffers.trial`). One that fails before it has moved anything, or does
not move it in time, is passed over for a while. When what was known of pipes is too old,
a link is reviewed beside its loads: another pipe may be better by now. Readers of a peer
that is just being met wait on one opening.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvconnect.buffers import layouts
from kvconnect.buffers.choice import AutoOptions, Candidate, choose_pipe, told
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.experience import Experience
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.lines import Line, Lines
from kvconnect.buffers.peers import RETRY_S, Peer, Peers, worker_of
from kvconnect.buffers.recent import Recent
from kvconnect.buffers.station import Station, foreign
from kvconnect.buffers.trial import Outcome, Setting, Trial
from kvconnect.errors import BrokenError, ClosedError, HandshakeError, KVConnectError, LoadError
from kvconnect.pipes.base import Pipe, Transfer

logger = logging.getLogger(__name__)

#: From here on, failures whose time is over are forgotten.
_MAX_LINKS = 1024
#: A pipe that has moved nothing yet and is slower than this may hang.
_SLOW_BYTES_A_S = 64e6
#: Given to loads that are being given up to let go of their pipe.
_SLACK_S = 10.0

Then = Callable[["Link | KVConnectError"], None]


@dataclass(eq=False)
class Link:
    """One peer worker, as the asking end sees it. Lives on the control client's thread."""

    at: str
    incarnation: str
    #: What to read over; None until it is open.
    pipe: Pipe | Trial | None = None
    name: str = ""
    #: All that was opened for it, ended ones included.
    lines: list[Line] = field(default_factory=list)
    #: Pipes that join it; those of them not taken that could be tried; and why each that is not taken is not.
    found: Sequence[Candidate] = ()
    spare: list[Candidate] = field(default_factory=list)
    passed: dict[str, str] = field(default_factory=dict)
    #: Whether a read has succeeded; whether it was given up because none did.
    proved: bool = False
    unfit: bool = False
    #: From when on another pipe may be the better one.
    review_at: float = math.inf
    #: When a load last asked for it.
    used_at: float = 0.0
    failure: KVConnectError | None = None
    retry_at: float = 0.0
    waiting: list[Then] = field(default_factory=list)

    @property
    def immediate(self) -> bool:
        """Whether its pipe is open and only enqueues what is to be read."""
        pipe = self.pipe  # any thread may ask
        return pipe is not None and pipe.traits.immediate

    @property
    def line(self) -> Line | None:
        """One of its lines that is open."""
        return next((line for line in self.lines if not line.ended), None)


class Links:
    """Pipes that this worker asked for, by owner."""

    def __init__(self, station: Station, crew: Crew, opening: Crew, ending: Crew) -> None:
        """Join ``station`` to its counterparts.

        What waits for pipes runs on ``crew``; they are opened on ``opening`` and aborted on ``ending``.

        Raises:
            ConfigError: a wrong option of the pipe ``"auto"``.

        """
        self._station, self._crew, self._client = station, crew, station.client
        options = station.settings.options
        self._auto = AutoOptions.of(station.settings.pipe)
        self._limit_s = options.connect_timeout_s
        self._peers = Peers(station.me, station.client, options.connect_timeout_s)
        self._lines = Lines(station, opening, ending)
        self._links: dict[tuple[str, str], Link] = {}
        #: Replaced ones, over which loads may still run.
        self._retired: set[Link] = set()
        self._experience = Experience(station.client.clock)
        self._trials = threading.Lock()
        self._told: Recent[str] = Recent()

    def at_hand(self, at: str, incarnation: str) -> Link | None:
        """Return the link to an owner if its pipe is open and may be asked by any thread there and then."""
        link, now = self._links.get((at, incarnation)), self._client.clock.now()
        if link is None or not link.immediate or now >= link.review_at:
            return None
        link.used_at = now
        return link

    def patience_s(self, link: Link, nbytes: int) -> float | None:
        """Return how long a load may take before `overdue` is told; ``None`` if its pipe is known to work."""
        return None if link.proved or not link.spare else self._limit_s + nbytes / _SLOW_BYTES_A_S

    # -- on the client's thread -----------------------------------------------------

    def get(self, at: str, incarnation: str, then: Then) -> None:
        """Call ``then`` with the open link to the owner at ``at``, or with why there is none."""
        link = self._links.setdefault((at, incarnation), Link(at, incarnation))
        link.used_at = self._client.clock.now()
        if link.pipe is not None:
            then(link)
            if self._client.clock.now() >= link.review_at:
                self._review(link)
        elif link.failure is not None and self._client.clock.now() < link.retry_at:
            then(link.failure)
        else:
            link.waiting.append(then)
            if len(link.waiting) == 1:
                self._peers.meet(at, lambda peer: self._met(link, peer), incarnation)

    def _met(self, link: Link, peer: Peer) -> None:
        hello = peer.hello
        if hello is None:
            self._opened(link, BrokenError(peer.failure.detail if peer.failure else "the peer cannot be reached"))
        elif hello.incarnation != link.incarnation:
            self._opened(link, BrokenError(f"engine {hello.engine} was restarted"))
        elif not self._crew.submit(lambda: self._open(link, hello), lane=link.at):
            self._opened(link, ClosedError("the buffer was closed"))

    def _opened(self, link: Link, failure: KVConnectError | None = None) -> None:
        link.failure, link.retry_at = failure, self._client.clock.now() + RETRY_S
        link.review_at = self._experience.holds_until(link.at, link.incarnation)
        if len(self._links) > _MAX_LINKS:
            self._forget_failed()
        for key in [key for key, other in self._links.items() if key[0] == link.at and other is not link]:
            if self._links[key].pipe is not None and failure is None:
                self.drop(self._links[key])  # of an earlier incarnation
        waiting, link.waiting = link.waiting, []
        for then in waiting:
            then(failure or link)

    def _forget_failed(self) -> None:
        """Forget failures whose time is over; addresses and incarnations are whatever tickets say."""
        now = self._client.clock.now()
        for key, link in list(self._links.items()):
            if link.failure is not None and not link.waiting and link.retry_at <= now:
                del self._links[key]

    def failed(self, link: Link, error: KVConnectError, *, retried: bool) -> bool:
        """Give a link up if ``error`` says so, that of a read; return whether to `get` another and read again.

        A broken pipe may have been dead for long, so it is opened anew once. One that has
        never worked gives way to the next, whatever the error.
        """
        if self._links.get((link.at, link.incarnation)) is not link:
            return link.unfit or not retried  # another read has seen to it
        broken = isinstance(error, (BrokenError, ClosedError))
        unfit = not link.proved and not isinstance(error, (LoadError, HandshakeError))
        if unfit and link.spare:
            self._pass_over(link, link.name, f"it failed: {error}")
        if broken or (unfit and link.spare):
            self.drop(link)
        return (broken and not retried) or (unfit and bool(link.spare))

    def overdue(self, link: Link, moving: Transfer | None) -> None:
        """A load takes too long for a pipe that has never worked: it gives way to the next, and its loads go there."""
        tried = isinstance(link.pipe, Trial) and link.pipe.is_trial(moving)
        if self._links.get((link.at, link.incarnation)) is not link or link.proved or not link.spare or tried:
            return
        self._pass_over(link, link.name, f"it moved nothing within {self._limit_s:.3g} s")
        link.unfit = True
        self.drop(link)

    def drop(self, link: Link) -> None:
        """Forget a link and end its pipes; the next `get` opens another."""
        self._retired.discard(link)
        if self._links.get((link.at, link.incarnation)) is link:
            del self._links[link.at, link.incarnation]
        pipe, link.pipe = link.pipe, None
        if isinstance(pipe, Trial):
            pipe.end()
        for line in link.lines:
            self._lines.end(line)

    def drop_unused(self, since: float, busy: Collection[Link | None]) -> None:
        """Forget open links that no load has asked for since then, but for those that are ``busy`` with one."""
        for link in list(self._links.values()):
            if link.pipe is not None and link.used_at < since and link not in busy:
                logger.debug("nothing was read from %s over %s for long: it is closed", link.at, link.name)
                self.drop(link)

    def lost(self, pipe: str) -> None:
        """The other end of a pipe is gone."""
        for link in [*self._links.values(), *self._retired]:
            if any(line.id == pipe for line in link.lines):
                self.drop(link)

    def drop_all(self) -> None:
        """End every pipe, and tell the peers so."""
        for link in [*self._links.values(), *self._retired]:
            self.drop(link)

    def _review(self, link: Link) -> None:
        """What was known is too old: look for a better pipe, if there may be one, while loads go on."""

        def met(peer: Peer) -> None:
            hello = peer.hello
            if hello is not None and hello.incarnation == link.incarnation:
                self._crew.submit(lambda: self._reopen(link, hello), lane=link.at)

        link.review_at = self._experience.holds_until(link.at, link.incarnation)
        best = self._experience.rank(link.at, link.incarnation, link.found)[0]
        if best.name != link.name or (not isinstance(link.pipe, Trial) and self._rivals(link)):
            self._peers.meet(link.at, met, link.incarnation)

    def _replace(self, link: Link, fresh: Link) -> None:
        """Have later loads go over ``fresh``, which may have taken the line of ``link`` over."""
        shared = fresh.lines[0] in link.lines
        if self._links.get((link.at, link.incarnation)) is not link:
            self.drop(fresh)
            return
        if shared and isinstance(link.pipe, Trial):
            return  # nothing else could be opened
        self._links[link.at, link.incarnation] = fresh
        fresh.review_at = self._experience.holds_until(link.at, link.incarnation)
        fresh.proved, fresh.used_at = shared and link.proved, link.used_at
        link.lines = [line for line in link.lines if line not in fresh.lines]
        self._retired.add(link)
        trial = fresh.pipe

        def retire() -> None:  # no load takes longer
            self.drop(link)
            if shared and isinstance(trial, Trial):
                trial.let_go()

        self._client.later(self._station.settings.options.transfer_timeout_s + _SLACK_S, retire)

    def _settle(self, link: Link, outcome: Outcome) -> None:
        """A trial is over: one line is left."""
        for name, reason in outcome.failures.items():
            self._pass_over(link, name, reason)
        self._experience.measure(link.at, outcome.rates)
        if link.pipe is None:
            return  # it was dropped meanwhile
        if outcome.best is None or outcome.best.ended:
            self.drop(link)
            return
        link.pipe = outcome.best.pipe
        link.review_at = self._experience.holds_until(link.at, link.incarnation)
        self._take(link, outcome.best.name)
        self._say(link, f"; measured in {outcome.seconds:.3g} s")

    # -- on the crew: may block -------------------------------------------------------

    def _open(self, link: Link, hello: Hello) -> None:
        try:
            line = self._join(link, hello)
        except Exception as error:  # noqa: BLE001 - a third party's pipe may raise anything; the readers must hear of it
            failure = foreign(error)
            self._tell(logging.WARNING, f"no pipe to {link.at}: {failure}")
            self._client.soon(lambda: self._opened(link, failure))
            return

        def opened() -> None:
            if self._links.get((link.at, link.incarnation)) is link:
                self._opened(link)
                return
            self.drop(link)  # it was dropped meanwhile
            self._opened(link, ClosedError("the pipe was closed while it was opened"))

        if not self._client.soon(opened):
            self._lines.end(line)

    def _reopen(self, link: Link, hello: Hello) -> None:
        fresh = Link(link.at, link.incarnation)
        try:
            line = self._join(fresh, hello, link)
        except Exception as error:  # noqa: BLE001 - a third party's pipe may raise anything; there is one that works
            logger.debug("no other pipe to %s: %s", link.at, error)
            return
        if not self._client.soon(lambda: self._replace(link, fresh)):
            self._lines.end(line)

    def _join(self, link: Link, hello: Hello, old: Link | None = None) -> Line:
        """Open the best pipe that can be opened, to be tried against those that are as near.

        If the best is that of ``old``, it is taken over.
        """
        theirs = worker_of(hello, self._station.worker["rank"])
        layouts.check_shapes(self._station.worker, theirs)
        link.found, link.passed = choose_pipe(self._station.worker, theirs)
        line = self._first(link, theirs, old)
        link.lines = [line]
        traits = self._take(link, line.name).traits
        rivals = self._rivals(link)
        pipe: Pipe | Trial | None = line.pipe
        if rivals:
            link.passed |= {rival.name: f"as near as {line.name}, a large load will tell" for rival in rivals}
            layout = self._station.memory.layout
            setting = Setting(self._lines, self._crew, self._trials, layout, theirs, self._limit_s)
            in_use = old is not None and line in old.lines

            def over(outcome: Outcome) -> None:
                self._client.soon(lambda: self._settle(link, outcome))

            pipe = Trial(setting, link.lines, traits, rivals, over, in_use=in_use)
        self._say(link)
        link.pipe = pipe
        return line

    def _rivals(self, link: Link) -> list[Candidate]:
        """Return the pipes that are as near as the one taken and are to be measured against it."""
        known = self._experience.rates(link.at)
        reach = next(taken.cls.traits.reach for taken in link.found if taken.name == link.name)
        rivals = [other for other in link.found if other.cls.traits.reach == reach and other.name not in known]
        rivals = [other for other in rivals if other.name != link.name and self._failure(link, other) is None]
        return rivals if self._auto.measure else []

    def _first(self, link: Link, theirs: Mapping[str, Any], old: Link | None) -> Line:
        """Open the best pipe that can be opened; raise why none can."""
        for candidate in self._experience.rank(link.at, link.incarnation, link.found):
            if old is not None and candidate.name == old.name:
                return next(line for line in old.lines if line.name == old.name)
            try:
                return self._lines.open(candidate, theirs, self._lines.limit_s)
            except KVConnectError as error:
                if len(link.found) == 1:
                    raise
                link.passed[candidate.name] = f"it cannot be opened: {error}"
                self._pass_over(link, candidate.name, link.passed[candidate.name])
        raise BrokenError(f"no pipe to the peer can be opened ({told(link.passed)})")

    # -- on either ----------------------------------------------------------------------

    def _take(self, link: Link, name: str) -> type[Pipe]:
        """Note which pipe is taken, and why each other is not; return its class."""
        link.name, link.spare = name, []
        taken = next(candidate.cls for candidate in link.found if candidate.name == name)
        rates = self._experience.rates(link.at)
        for other in link.found:
            failure = self._failure(link, other)
            if other.name == name:
                continue
            if failure is None:
                link.spare.append(other)
            if other.cls.traits.reach > taken.traits.reach:
                nearness = f"{name} is nearer"
            else:
                nearness = _rate(rates, other.name) or f"as near as {name}, which comes first"
            link.passed[other.name] = failure or nearness
        return taken

    def _failure(self, link: Link, candidate: Candidate) -> str | None:
        return self._experience.failure(link.at, link.incarnation, candidate.name)

    def _pass_over(self, link: Link, name: str, reason: str) -> None:
        self._experience.fail(link.at, link.incarnation, name, reason)

    def _say(self, link: Link, addition: str = "") -> None:
        """Tell what is taken and why each other pipe is not; the level is that of the worst reason."""
        rate = _rate(self._experience.rates(link.at), link.name)
        passed = "; ".join(f"not {name}: {reason}" for name, reason in sorted(link.passed.items()) if name != link.name)
        line = f"reading from {link.at} over {link.name}" + (rate and f", {rate}") + (passed and f" ({passed})")
        as_wanted = len(link.spare) == len(link.found) - 1
        self._tell(logging.INFO if as_wanted else logging.WARNING, line, addition)

    def _tell(self, level: int, line: str, addition: str = "") -> None:
        logger.log(level if self._told.add(line) else logging.DEBUG, "%s%s", line, addition)


def _rate(rates: Mapping[str, float], name: str) -> str:
    return f"{rates[name] / 1e9:.3g} GB/s" if name in rates else ""
