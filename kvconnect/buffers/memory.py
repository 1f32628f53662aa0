"""`MemoryBuffer`: the reference lookup buffer, within one process.

The ledger decides under a lock; bytes are copied outside it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from kvconnect.buffers.base import BufferTraits, Grant, LookupBuffer, LookupKey
from kvconnect.buffers.ledger import Entry, Ledger
from kvconnect.errors import BufferFullError, ClosedError, ConfigError, LoadError, StaleError

if TYPE_CHECKING:
    from torch import Tensor

#: What to do about an entry that does not fit now.
Policy = Literal["wait", "raise", "evict"]


class MemoryBuffer(LookupBuffer):
    """Copies of tensors, in this process's memory. Thread-safe."""

    name: ClassVar[str] = "memory"
    traits: ClassVar[BufferTraits] = BufferTraits(bounded=True, expires=True, joins=True)

    def __init__(
        self,
        capacity_bytes: int = 1 << 30,
        policy: Policy = "wait",
        ttl_s: float = 600.0,
        wait_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty buffer.

        Args:
            capacity_bytes: most that all entries together may hold. An insert in
                progress has its copy on top of that.
            policy: when full, wait for takers and expiry, raise, or evict the oldest.
            ttl_s: how long an entry that nobody claims lives.
            wait_s: the longest wait, then `BufferFullError`.
            clock: seconds, never backwards.

        Raises:
            ConfigError: a value is out of range.

        """
        if policy not in ("wait", "raise", "evict"):
            raise ConfigError(f"policy must be 'wait', 'raise' or 'evict', got {policy!r}")
        if capacity_bytes <= 0 or ttl_s <= 0:
            raise ConfigError("capacity_bytes and ttl_s must be greater than 0")
        self._capacity, self._policy, self._wait_s, self._clock = capacity_bytes, policy, wait_s, clock
        self._changed = threading.Condition()
        self._ledger = Ledger(ttl_s)
        self._held: dict[str, list[Tensor]] = {}
        self._used = 0
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes that live entries hold."""
        with self._changed:
            self._collect()
            return self._used

    def insert(self, key: LookupKey, kv: Sequence[Tensor]) -> None:
        """Copy ``kv`` in. See `LookupBuffer.insert`."""
        copies = [tensor.detach().clone() for tensor in kv]
        size = _nbytes(copies)
        with self._changed:
            self._make_room(key, size)
            entry = self._ledger.insert(key, (), self._clock(), replace=True)
            self._collect()
            self._held[entry.id] = copies
            self._used += size

    def _make_room(self, key: LookupKey, size: int) -> None:
        """Wait, raise or evict until ``size`` bytes fit, those of the entry to replace not counted."""
        if size > self._capacity:
            raise BufferFullError(f"an entry of {size} bytes is over the capacity of {self._capacity}")
        deadline = time.monotonic() + self._wait_s
        while True:
            self._check_open()
            self._collect()
            if self._used - self._replaceable(key) + size <= self._capacity:
                return
            if self._policy == "evict" and self._ledger.evict():
                continue
            left = deadline - time.monotonic()
            if self._policy != "wait" or left <= 0:
                raise BufferFullError(f"{self._used} of {self._capacity} bytes are in use, {size} more do not fit")
            self._changed.wait(min(left, max(0.001, self._ledger.next_expiry - self._clock())))

    def _replaceable(self, key: LookupKey) -> int:
        return sum(_nbytes(self._held[entry.id]) for entry in self._ledger.offered_under(key))

    def drop_select(self, key: LookupKey) -> list[Tensor] | None:
        """Take the entry out; the tensors handed back are the caller's. See `LookupBuffer.drop_select`."""
        with self._changed:
            entry = self._find(key, taker := secrets.token_hex(8))
            if entry is None:
                return None
            tensors = self._held[entry.id]
            self._ledger.claim(entry, taker, taker, 1, self._clock())
            self._ledger.release(taker, 0, entry.generation)
            self._collect()
            return tensors

    def match(self, keys: Sequence[LookupKey]) -> int:
        """Return how many leading ``keys`` are present; take nothing."""
        with self._changed:
            present = (self._find(key, "") is not None for key in keys)
            return next((count for count, there in enumerate(present) if not there), len(keys))

    def claim(self, key: LookupKey, taker: str) -> Grant | None:
        """Reserve the entry; it does not expire while the grant lives. See `LookupBuffer.claim`."""
        with self._changed:
            entry = self._find(key, taker)
            if entry is None:
                return None
            grant = secrets.token_hex(8)
            self._ledger.claim(entry, grant, taker, 1, self._clock(), lease_s=float("inf"))
            return _MemoryGrant(self, entry, grant)

    def close(self) -> None:
        """Free everything and wake waiters."""
        with self._changed:
            self._closed = True
            self._held.clear()
            self._used = 0
            self._changed.notify_all()

    # -- under the lock -------------------------------------------------------------

    def _find(self, key: LookupKey, taker: str) -> Entry | None:
        self._check_open()
        self._collect()
        return self._ledger.find(key, None, taker)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the buffer was closed")

    def _collect(self) -> None:
        """Let go of what belongs to entries that have ended."""
        self._ledger.expire(self._clock())
        for entry in self._ledger.drain():
            self._used -= _nbytes(self._held.pop(entry.id, []))
            self._changed.notify_all()

    # -- for grants -------------------------------------------------------------------

    def _read(self, entry: Entry) -> list[Tensor]:
        with self._changed:
            self._check_open()
            held = self._held.get(entry.id)
        if held is None:
            raise LoadError("the entry is gone")
        return [tensor.clone() for tensor in held]

    def _release(self, entry: Entry, grant: str) -> None:
        with self._changed:
            self._check_open()
            answer = self._ledger.release(grant, 0, entry.generation)
            self._collect()
        if answer == "stale":
            raise StaleError("the entry was no longer vouched for")

    def _abandon(self, grant: str) -> None:
        with self._changed:
            self._ledger.abandon(grant, self._clock())
            self._collect()
            self._changed.notify_all()


class _MemoryGrant(Grant):
    """A claim on an entry in this process."""

    def __init__(self, buffer: MemoryBuffer, entry: Entry, grant: str) -> None:
        self.key = entry.key
        self._buffer, self._entry, self._grant = buffer, entry, grant
        self._over = False

    def tensors(self) -> list[Tensor]:
        return self._buffer._read(self._entry)  # noqa: SLF001 - one module, one class in two halves

    def release(self) -> None:
        if not self._over:
            self._over = True
            self._buffer._release(self._entry, self._grant)  # noqa: SLF001 - likewise

    def abandon(self) -> None:
        if not self._over:
            self._over = True
            self._buffer._abandon(self._grant)  # noqa: SLF001 - likewise


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
