"""`ClaimingBuffer`: what a buffer need not write itself whose entries are claimed, read and released."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvconnect.buffers.base import Grant, LookupBuffer, LookupKey
from kvconnect.errors import KVConnectError

if TYPE_CHECKING:
    from torch import Tensor


class ClaimingBuffer(LookupBuffer):
    """A buffer with a `claim` of its own, of which the rest follows."""

    def drop_select(self, key: LookupKey) -> list[Tensor] | None:
        """Claim the entry, read and release it. See `LookupBuffer.drop_select`."""
        grant = self.claim(key, secrets.token_hex(8))
        if grant is None:
            return None
        try:
            tensors = grant.tensors()
        except KVConnectError:
            grant.abandon()
            raise
        grant.release()
        return tensors

    def match(self, keys: Sequence[LookupKey]) -> int:
        """Return how many leading ``keys`` are present; take nothing."""
        self._check_open()
        return next((count for count, key in enumerate(keys) if not self._present(key)), len(keys))

    @abstractmethod
    def claim(self, key: LookupKey, taker: str) -> Grant | None:
        """Reserve an entry. See `LookupBuffer.claim`."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise `ClosedError` once the buffer was closed."""

    @abstractmethod
    def _present(self, key: LookupKey) -> bool:
        """Whether there is such an entry to claim."""
