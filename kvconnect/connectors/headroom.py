"""Which loads may start: decoding requests do not lose their blocks to KV that is on its way.

vLLM takes blocks that a decoding request lacks from the request that came last, but a load
under way cannot be made to give its own up. So a load waits until enough are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvconnect.connectors.groups import Group

#: Tokens that each decoding request must find room for while a load is under way.
_TOKENS = 128


class Headroom:
    """Says whether a load may start. Engine thread only.

    Args:
        groups: the KV-cache groups that take part.
        capacity: the most blocks that loads under way may hold, but for a single load; ``None``: any number.

    """

    def __init__(self, groups: Sequence[Group], capacity: int | None) -> None:
        self._groups, self._capacity = groups, capacity
        self._free: Callable[[], int] | None = None
        self._loading: dict[str, int] = {}
        #: Those that must wait, the first of them first: later ones do not overtake it.
        self._waiting: dict[str, None] = {}
        #: Requests that the last step computed.
        self.decoding = 0

    def bind(self, free: Callable[[], int]) -> None:
        """Learn how many blocks are free; every load may start before."""
        self._free = free

    def admits(self, request_id: str, tokens: int) -> bool:
        """Whether the load of so many tokens may start; who hears no is to ask again."""
        fits = self._fits(self._blocks(tokens)) and next(iter(self._waiting), request_id) == request_id
        if not fits:
            self._waiting[request_id] = None
        return fits

    def started(self, request_id: str, tokens: int) -> None:
        """The load has its blocks."""
        self._waiting.pop(request_id, None)
        self._loading[request_id] = self._blocks(tokens)

    def ended(self, request_id: str) -> None:
        """The load is over, or nothing is to be loaded."""
        self._waiting.pop(request_id, None)
        self._loading.pop(request_id, None)

    def _fits(self, blocks: int) -> bool:
        loading = sum(self._loading.values())
        if self._free is None or not (loading or self.decoding):
            return True  # what does not fit now never will
        if self._capacity is not None and loading and loading + blocks > self._capacity:
            return False
        return self._free() - blocks >= self.decoding * self._blocks(_TOKENS)

    def _blocks(self, tokens: int) -> int:
        return sum(-(-tokens // group.block_size) for group in self._groups)
