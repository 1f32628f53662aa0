"""The consumer's half of a store buffer's end in a scheduler process: entries found and taken."""

from __future__ import annotations

import collections
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from kvconnect.buffers.base import Claim, LookupKey, Miss, Want
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.store import Found, Store, StoreOptions
from kvconnect.buffers.store_manifest import Manifest, name_of
from kvconnect.buffers.store_segments import claim
from kvconnect.buffers.store_silence import Silence
from kvconnect.config import Config
from kvconnect.control import ControlClient
from kvconnect.errors import IntegrityError, named

logger = logging.getLogger(__name__)

#: Looks that wait for the store; beyond them requests are computed at once.
_MAX_WAITING: Final = 1024
_MAX_PAUSE_S: Final = 0.1
#: Of the time that a look may take: a failure that took longer is not one that everybody can be left to find.
_SLOW: Final = 0.1


@dataclass(eq=False)
class _Hold:
    """An entry that this engine has taken, for all its requests that want it (the children of one ``n > 1``)."""

    name: str
    claim: Claim
    users: int = 0
    #: Somebody is done with it, so it has served its purpose.
    used: bool = False


@dataclass(eq=False)
class _Look:
    """One request's. Its fields change under the lock of `Looks`."""

    want: Want
    #: When it has to be answered, and when what has been found by then is enough.
    until: float
    enough: float
    answer: Claim | Miss | None = None
    hold: _Hold | None = None
    committed: bool = False
    over: bool = False
    #: Whether a question of this look is at the store.
    asks: bool = False
    pause_s: float = 0.002
    #: The segments found so far, from the prompt's first on.
    have: list[tuple[Found, Manifest]] = field(default_factory=list)


class Looks:
    """Finds entries by content, and takes each once for this engine if the store is one to take from.

    Where prompts are stored in segments, those are found that a prompt begins with, as many as there are.
    """

    def __init__(self, store: Store, options: StoreOptions, config: Config, crew: Crew, client: ControlClient) -> None:
        """Ask the store on ``crew``, where looks for one entry wait for each other; ``client`` has the timers."""
        self._store, self._options, self._config, self._crew, self._client = store, options, config, crew, client
        self._takes = options.mode == "take"
        self._lock = threading.Lock()
        self._shapes: tuple[str, ...] = ()
        self._looks: dict[str, _Look] = {}
        self._holds: dict[str, _Hold] = {}
        self._waiting = 0
        self._counts: collections.Counter[str] = collections.Counter()
        # Nobody has an entry of this name; looking for it takes nothing.
        self._silence = Silence(partial(self._find, "0" * 32, "0" * 16), crew, client)

    # -- the scheduling thread ----------------------------------------------------------

    def look(self, request_id: str, want: Want) -> None:
        """Start to look."""
        now, limit_s = self._client.clock.now(), self._config.lookup_timeout_s
        look = _Look(want, now + limit_s, now + 0.9 * limit_s)
        with self._lock:
            if request_id in self._looks:
                return
            self._looks[request_id] = look
        if self._silence.lasts:
            self._miss(look, Miss("unreachable", "the store does not answer"))
        else:
            self._queue(look)

    def _queue(self, look: _Look) -> None:
        with self._lock:
            full = self._waiting >= _MAX_WAITING
            self._waiting += not full
        # One entry's looks in a lane, so that they follow each other.
        if full or not self._crew.submit(partial(self._search, look), lane=name_of(look.want.key)):
            self._miss(look, Miss("busy", "the store has not answered earlier questions"))

    def found(self, request_id: str) -> Claim | Miss | None:
        """Return the answer, in time."""
        with self._lock:
            look = self._looks.get(request_id)
        if look is None:
            return Miss("absent", "nobody looked for this request")
        if look.answer is None and self._client.clock.now() >= look.until:
            if look.asks:
                self._silence.begin()
            self._miss(look, Miss("timeout", "the store did not answer in time"))
        return look.answer

    def commit(self, request_id: str) -> Claim | Miss:
        """Return the answer, which from here on is final."""
        answer = self.found(request_id) or Miss("absent", "there is no answer yet")
        with self._lock:
            look = self._looks.get(request_id)
            if look is not None:
                look.committed = True
                return look.answer or answer
        return answer

    def end(self, request_id: str, *, used: bool) -> None:
        """Forget a request: its claim has served its purpose, or is given back."""
        with self._lock:
            look = self._looks.pop(request_id, None)
            if look is not None:
                look.over = True
                self._leave(look.hold, used=used)

    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn what our workers' memory is like; until then entries of another shape fail when they are read."""
        self._shapes = tuple(str(worker["shape"]) for worker in workers)

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            requests = list(self._looks)
        for request_id in requests:
            self.end(request_id, used=False)

    # -- any thread -----------------------------------------------------------------------

    def renew(self) -> None:
        """Keep what we hold; asks the store."""
        with self._lock:
            holds = list(self._holds.values())
        for hold in holds:
            if not self._store.renew(hold.name, hold.claim.grant, self._config.lease_s):
                self._lost(hold)

    def _lost(self, hold: _Hold) -> None:
        """Somebody else may have an entry by now. Who reads it already reads on: checksums tell how that went."""
        with self._lock:
            for look in self._looks.values():
                if look.hold is hold and not look.committed:
                    look.answer = Miss("gone", "the lease on the entry has ended")

    def _miss(self, look: _Look, miss: Miss) -> None:
        with self._lock:
            self._answer(look, miss)

    def _answer(self, look: _Look, answer: Claim | Miss, hold: _Hold | None = None) -> None:
        """Under the lock: set the answer, unless it comes too late."""
        if hold is not None:
            hold.users += 1
        if look.over or look.answer is not None:
            self._leave(hold, used=False)
            return
        look.answer, look.hold = answer, hold
        self._counts[f"miss_{answer.cause}" if isinstance(answer, Miss) else "claimed"] += 1

    def _leave(self, hold: _Hold | None, *, used: bool) -> None:
        """Under the lock: the last that wanted an entry drops it if any of them has used it, or gives it back."""
        if hold is None:
            return
        hold.used |= used
        hold.users -= 1
        if hold.users == 0:
            del self._holds[hold.name]
            job = self._store.drop if hold.used else self._store.give_back
            self._crew.submit(partial(_quietly, job, hold.name, hold.claim.grant), lane=hold.name)

    # -- the store's threads ----------------------------------------------------------------

    def _search(self, look: _Look) -> None:
        name = name_of(look.want.key)
        with self._lock:
            self._waiting -= 1
            if look.over or look.answer is not None:
                return
            if hold := self._holds.get(name):
                if self._store.reads_once:
                    self._answer(look, Miss("taken", "another request of this engine reads the entry"))
                else:
                    self._answer(look, hold.claim, hold)
                return
        grant, begun = secrets.token_hex(8), self._client.clock.now()
        look.asks = True
        try:
            miss = self._gather(look, grant)
        except Exception as error:  # noqa: BLE001 - a third party's store may raise anything; the request must hear of it
            logger.warning("the store cannot be asked: %s", named(error))
            miss = Miss("unreachable", str(error))
            if self._client.clock.now() - begun > _SLOW * self._config.lookup_timeout_s:
                self._silence.begin()
        finally:
            look.asks = False
        late = self._client.clock.now() >= look.enough
        if miss is not None and miss.cause == "absent" and _is_coming(look.want) and not late:
            # A store does not tell when something arrives: it is asked again, after pauses that grow.
            look.pause_s = min(2 * look.pause_s, _MAX_PAUSE_S)
            self._client.later(look.pause_s, lambda: self._queue(look))
            return
        if miss is None or (look.have and miss.cause != "unreachable"):
            found = claim(grant, look.have, offered=not self._takes)
            with self._lock:
                if self._takes:
                    # Nobody else has: looks for one entry follow each other.
                    hold = self._holds[name] = _Hold(name, found)
                self._answer(look, found, hold)
            if not self._takes and not look.over:
                self._crew.submit(partial(self._touch, look))
        else:
            self._miss(look, miss)

    def _gather(self, look: _Look, grant: str) -> Miss | None:
        """Find the segments that are missing yet; return why one of them still is."""
        keys = (*look.want.prefixes, look.want.key)
        while len(look.have) < len(keys):
            if look.over or (look.have and self._client.clock.now() >= look.enough):
                return Miss("absent", "there was no time to look for more")
            start = look.have[-1][1].key.length if look.have else 0
            answer = self._ask(keys[len(look.have)], start, grant)
            if isinstance(answer, Miss):
                return answer
            if look.have and len(answer[1].blocks) != len(look.have[0][1].blocks):
                return Miss("mismatch", "the segments of the prompt have different numbers of groups")
            look.have.append(answer)
        return None

    def _ask(self, key: LookupKey, start: int, grant: str) -> tuple[Found, Manifest] | Miss:
        name = name_of(key, start)
        found = self._find(name, grant)
        self._silence.end()
        if found is None:
            return Miss("absent")
        held = grant if self._takes else None
        try:
            answer = self._judge(key, start, found)
        except IntegrityError as error:
            logger.warning("an entry of the store is dropped: %s", named(error))
            answer = Miss("damaged", str(error))
        if not isinstance(answer, Miss):
            return found, answer
        if answer.cause != "mismatch":
            self._store.drop(name, held)
        elif held is not None:
            self._store.give_back(name, held)
        return answer

    def _find(self, name: str, grant: str) -> Found | None:
        return self._store.take(name, grant, self._config.lease_s) if self._takes else self._store.find(name)

    def _judge(self, key: LookupKey, start: int, found: Found) -> Manifest | Miss:
        manifest = Manifest.unpack(found.manifest)
        if (manifest.key, manifest.start) != (key, start):
            raise IntegrityError("the entry is of another key")
        if manifest.made + self._options.max_age_s <= time.time():
            return Miss("expired")
        shapes = tuple(part.shape for part in manifest.parts)
        if self._shapes and shapes != self._shapes:
            return Miss("mismatch", "the workers of the engine that wrote the entry have memory of another shape")
        return manifest

    def _touch(self, look: _Look) -> None:
        """Have what was found kept longest: a segment is of no use without those before it, so the first comes last."""
        for _, manifest in reversed(look.have):
            try:
                self._store.touch(manifest.name)
            except Exception as error:  # noqa: BLE001 - a third party's store may raise anything
                logger.debug("a use could not be noted: %s", error)
                return


def _is_coming(want: Want) -> bool:
    """Whether the request's ticket says that its prompt is on the way to the store, where it may not be yet."""
    return want.ticket is not None and want.ticket.get("coming") is True


def _quietly(job: Any, name: str, grant: str) -> None:
    """Drop or give back; what fails, `Store.mend` or the entry's age will do."""
    try:
        job(name, grant)
    except Exception as error:  # noqa: BLE001 - a third party's store may raise anything
        logger.debug("an entry could not be let go of: %s", error)
