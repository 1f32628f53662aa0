"""`RemoteBuffer`: a buffer whose other end is another engine, over control and a pipe.

An engine opens its two ends (`RemoteBuffer.scheduler_end`, `RemoteBuffer.worker_end`)
and lends its own blocks. As a plain `LookupBuffer` it copies tensors into blocks
of its own and lends those, by the same means; any number of buffers may know each other.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvconnect.buffers import fields
from kvconnect.buffers.access import Access
from kvconnect.buffers.address import fixed_producers
from kvconnect.buffers.arena import Arena, Ids, blocks_needed, encode, load, store
from kvconnect.buffers.base import (
    BufferTraits,
    Claim,
    EndSettings,
    Grant,
    LookupKey,
    SchedulerEnd,
    Want,
    WorkerEnd,
)
from kvconnect.buffers.claiming import ClaimingBuffer
from kvconnect.buffers.directory import Producers
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.lender import Lender
from kvconnect.buffers.memory import Policy
from kvconnect.buffers.mover import Mover
from kvconnect.buffers.scheduling import RemoteScheduler
from kvconnect.buffers.taker import Taker
from kvconnect.config import Config
from kvconnect.control import wait_for
from kvconnect.errors import BufferFullError, ClosedError, KVConnectError, LoadError, StaleError
from kvconnect.paging import PagedMemory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TableOptions:
    """How a `RemoteBuffer` keeps tensors.

    Args:
        capacity_bytes: most that its own entries may hold, headers and the rest of
            each entry's last block included; as much again serves for reading.
        block_bytes: a block's size; must be equal at all ends.
        policy: when full, wait for takers and expiry, raise, or evict the oldest.
        wait_s: the longest wait for room, then `BufferFullError`.

    """

    capacity_bytes: int = 1 << 28
    block_bytes: int = 1 << 16
    policy: Policy = "wait"
    wait_s: float = 30.0


class RemoteBuffer(ClaimingBuffer):
    """Entries of this process and of peers, taken over a pipe."""

    name: ClassVar[str] = "remote"
    traits: ClassVar[BufferTraits] = BufferTraits(bounded=True, expires=True, joins=True)

    def __init__(self, options: Config | None = None, table: TableOptions | None = None) -> None:
        """Open an empty buffer that peers can take from.

        Args:
            options: ``peers`` to look at, ``pipe``, addresses, and deadlines;
                ``lease_s`` is how long an entry that nobody claims lives.
            table: room for its own entries.

        Raises:
            ConfigError: an address cannot be bound or the pipe cannot be had.

        """
        self._options, self._table = options or Config(), table or TableOptions()
        blocks = max(1, self._table.capacity_bytes // self._table.block_bytes)
        # Reading needs room that entries never wait for, and so does the entry that replaces
        # another; what is never written costs no memory.
        self._arena = Arena(3 * blocks, self._table.block_bytes)
        self._room = {"entries": blocks, "reads": blocks}
        self._capacity = blocks
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._closed = False
        settings = EndSettings(
            f"table-{secrets.token_hex(4)}",
            {"kind": "tensors", "block_bytes": self._table.block_bytes},
            num_parts=1,
            produces=True,
            consumes=True,
            options=self._options,
            pipe=self._options.pipe,
        )
        me = Hello.of(settings, secrets.token_hex(8))
        self._mover = Mover(settings, 0, self._arena.memory)
        access = Access(self._options)
        #: Control address, to be named in the ``peers`` of other buffers.
        server, self.endpoint = access.server("kvconnect-lender")
        self._lender = Lender(me, server, self.endpoint, self._notice)
        self._client = access.client("kvconnect-taker")
        self._producers = Producers([self.endpoint, *fixed_producers(self._options)], None)
        self._taker = Taker(self._options, me, self._client, self._producers, lambda _: self._notice())
        self._lender.introduce([self._mover.describe()])
        self._taker.introduce([self._mover.describe()])

    # -- the contract ---------------------------------------------------------------

    def insert(self, key: LookupKey, kv: Sequence[Tensor]) -> None:
        """Copy ``kv`` in. See `LookupBuffer.insert`."""
        stream = encode(kv)
        ids = self._take_room(blocks_needed(stream, self._table.block_bytes), key)
        store(self._arena, ids, stream)
        self._lender.offer(key, (ids,), label=None, asked=False, replace=True)
        self._notice()

    def _present(self, key: LookupKey) -> bool:
        body = {**fields.write_key(key), "taker": secrets.token_hex(8)}
        timeout_s = self._options.lookup_timeout_s
        calls = [self._client.call(at, "match", body, timeout_s) for at in self._producers.endpoints()]
        return any(_says(call, "ticket", timeout_s) for call in calls)

    def claim(self, key: LookupKey, taker: str) -> Grant | None:
        """Reserve an entry of this buffer or of a peer's. See `LookupBuffer.claim`."""
        self._check_open()
        request = f"{taker}-{next(self._numbers)}"
        self._taker.look(request, Want(key), taker)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._taker.found(request) is not None)
            answer = self._taker.commit(request)
        self._check_open()
        if isinstance(answer, Claim):
            return _RemoteGrant(self, request, answer)
        # Not settled: what the owner may still grant is to be offered again.
        self._taker.abandon(request)
        return None

    def close(self) -> None:
        """End everything and wake waiters."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._taker.close()
        self._client.close()
        self._mover.close()
        self._lender.close()

    # -- inside an engine ---------------------------------------------------------------

    @classmethod
    def scheduler_end(cls, settings: EndSettings) -> SchedulerEnd:
        """Open the end that lives in an engine's scheduler process."""
        return RemoteScheduler(settings)

    @classmethod
    def worker_end(cls, settings: EndSettings, rank: int, memory: PagedMemory) -> WorkerEnd:
        """Open the end that lives in the process of worker ``rank``, over its KV memory."""
        return Mover(settings, rank, memory)

    # -- room -----------------------------------------------------------------------------

    def _notice(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the buffer was closed")

    def _collect(self) -> None:
        for blocks in self._lender.drain_released():
            for ids in blocks:
                self._arena.give(ids)
                self._room["entries"] += len(ids)

    def _take_room(self, count: int, key: LookupKey | None = None) -> Ids:
        """Take blocks for an entry to go under ``key``, or for a read: wait, raise or evict until there are."""
        kind, policy = ("entries", self._table.policy) if key is not None else ("reads", "wait")
        if count > self._capacity:
            raise BufferFullError(f"{count} blocks are over the capacity of {self._capacity}")
        deadline = time.monotonic() + self._table.wait_s
        with self._changed:
            while True:
                self._check_open()
                self._collect()
                extra = self._lender.replaceable(key) if key is not None else 0
                if self._room[kind] + extra >= count and self._arena.free >= count:
                    self._room[kind] -= count
                    return self._arena.take(count)
                if policy == "evict" and self._lender.evict():
                    continue
                left = deadline - time.monotonic()
                if policy == "raise" or left <= 0:
                    raise BufferFullError(f"no room for {count} blocks, {self._room[kind]} are free")
                self._changed.wait(min(left, max(0.001, self._lender.expires_in())))

    # -- for grants -------------------------------------------------------------------------

    def _fetch(self, claim: Claim) -> list[Tensor]:
        ids = self._take_room(len(claim.blocks[0]) if claim.blocks else 0)
        transfer = self._mover.fetch(claim, claim.blocks, (ids,), lambda _: None)
        try:
            transfer.wait()
            return load(self._arena, ids)
        finally:
            with self._changed:
                self._arena.give(ids)
                self._room["reads"] += len(ids)
                self._changed.notify_all()

    def _release(self, request: str, claim: Claim) -> None:
        self._check_open()
        timeout_s = self._options.release_timeout_s
        try:
            answer = wait_for(self._mover.release(claim), timeout_s + 1).get("answer")
        except KVConnectError as error:
            raise LoadError(f"the owner did not confirm what was read: {error}") from error
        finally:
            self._taker.settle(request)
        if answer != "ok":
            raise StaleError("the owner's lease on the entry had ended")

    def _abandon(self, request: str) -> None:
        self._taker.abandon(request)


class _RemoteGrant(Grant):
    """A claim on an entry of a peer, or of our own reached as a peer's."""

    def __init__(self, buffer: RemoteBuffer, request: str, claim: Claim) -> None:
        self.key = claim.key
        self._buffer, self._request, self._claim = buffer, request, claim
        self._over = False

    def tensors(self) -> list[Tensor]:
        return self._buffer._fetch(self._claim)  # noqa: SLF001 - one module, one class in two halves

    def release(self) -> None:
        if not self._over:
            self._over = True
            self._buffer._release(self._request, self._claim)  # noqa: SLF001 - likewise

    def abandon(self) -> None:
        if not self._over:
            self._over = True
            self._buffer._abandon(self._request)  # noqa: SLF001 - likewise


def _says(call: Future[dict[str, Any]], name: str, timeout_s: float) -> bool:
    """Whether a peer answers, and with the field ``name``. A miss is a value: failures say no."""
    try:
        return name in wait_for(call, timeout_s + 1)
    except KVConnectError:
        return False
