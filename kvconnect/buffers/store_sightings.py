"""What of an engine's offers is in a store, as far as it knows, and what has become of it since."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Container
from typing import Any, Final, NamedTuple

#: Of so many tokens, entries are remembered. Older ones are told of as gone: nobody would know when they are.
_MAX_TOKENS: Final = 1 << 22
#: An idle engine steps on for so long at most: while something is being published, and to fetch news.
_PUBLISH_S, _FETCH_S = 5.0, 1.0


class _Sighting(NamedTuple):
    note: Any
    tokens: int
    #: When it was last seen, counted together with the beginnings of lists.
    order: int


class Sightings:
    """Entries that somebody wants to hear of: once when they are there, once when they are not there any more.

    Thread-safe. An entry is there when this engine has published it, or has found it instead of writing it. It is gone
    when a list of the store that was begun later does not have it, whoever took it, dropped it or let it expire.
    """

    def __init__(self, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._order = itertools.count()
        #: By name; those seen last are the last.
        self._there: OrderedDict[str, _Sighting] = OrderedDict()
        self._tokens = 0
        self._news: list[tuple[Any, bool]] = []
        self._expected, self._until = 0, float("-inf")

    def expect(self, change: int = 1) -> None:
        """Something is about to be published; with -1, it is known how that went."""
        with self._lock:
            self._expected += change
            self._until = max(self._until, time.monotonic() + _PUBLISH_S) if change > 0 else self._until

    def seen(self, name: str, note: Any, tokens: int) -> None:
        """It is there: ``note`` is told of it, unless an earlier one was and it has not gone since."""
        with self._lock:
            known = self._there.pop(name, None)
            if known is None:
                self._tell(note, there=True)
                self._tokens += tokens
            else:
                note = known.note
            self._there[name] = _Sighting(note, tokens, next(self._order))
            while self._tokens > self._max_tokens and len(self._there) > 1:
                self._forget(next(iter(self._there)))

    def mark(self) -> int:
        """Return what `listed` is to be called with; a list begins."""
        with self._lock:
            return next(self._order)

    def listed(self, mark: int, names: Container[str]) -> None:
        """The list that was begun at ``mark`` has these ``names``; what was seen since then need not be in it."""
        with self._lock:
            gone = [name for name, seen in self._there.items() if seen.order < mark and name not in names]
            for name in gone:
                self._forget(name)

    def clear(self) -> None:
        """Nothing counts any more."""
        with self._lock:
            for name in list(self._there):
                self._forget(name)

    def drain(self) -> list[tuple[Any, bool]]:
        """Return the notes told of since the last call, and whether that is there: in the order of what happened."""
        with self._lock:
            news, self._news = self._news, []
            return news

    @property
    def due(self) -> bool:
        """Whether there are fresh news, or soon will be."""
        with self._lock:
            return bool(self._news or self._expected) and time.monotonic() < self._until

    def _forget(self, name: str) -> None:
        gone = self._there.pop(name)
        self._tokens -= gone.tokens
        self._tell(gone.note, there=False)

    def _tell(self, note: Any, *, there: bool) -> None:
        self._news.append((note, there))
        self._until = max(self._until, time.monotonic() + _FETCH_S)
