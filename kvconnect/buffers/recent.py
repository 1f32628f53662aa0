"""What was noticed lately: a set that forgets the oldest, so that no peer can make it grow."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Recent(Generic[T]):
    """The ``limit`` items that were added last. Not thread-safe, but harmless if raced."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._items: dict[T, None] = {}

    def __len__(self) -> int:
        """Count the items."""
        return len(self._items)

    def add(self, item: T) -> bool:
        """Remember ``item``; return whether it is news."""
        news = item not in self._items
        self._items.pop(item, None)
        self._items[item] = None
        for oldest in list(self._items)[: max(0, len(self._items) - self._limit)]:
            self._items.pop(oldest, None)
        return news

    def forget(self, which: Callable[[T], bool]) -> None:
        """Forget the items that ``which`` says."""
        for item in [item for item in self._items if which(item)]:
            self._items.pop(item, None)
