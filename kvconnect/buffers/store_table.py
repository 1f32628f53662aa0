"""`StoreBuffer`: a lookup buffer over any `Store`, as a table of tensors and inside an engine.

A buffer of one's own is a `Store` and a subclass that opens it (`StoreBuffer.open_store`).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, ClassVar

from kvconnect.buffers.arena import Arena, Ids, blocks_needed, encode, load
from kvconnect.buffers.arena import store as fill
from kvconnect.buffers.base import BufferTraits, EndSettings, Grant, LookupKey, SchedulerEnd, WorkerEnd
from kvconnect.buffers.claiming import ClaimingBuffer
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.memory import Policy
from kvconnect.buffers.store import Store, StoreOptions
from kvconnect.buffers.store_manifest import Manifest, name_of
from kvconnect.buffers.store_parts import ChunkRun, PartReader, PartWriter, Rooms
from kvconnect.buffers.store_room import make_room
from kvconnect.buffers.store_scheduler import StoreScheduler
from kvconnect.buffers.store_worker import StoreWorker
from kvconnect.config import PATH, parse_options
from kvconnect.errors import BufferFullError, ClosedError, KVConnectError, LoadError, StaleError
from kvconnect.paging import PagedMemory

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES = 4096
#: How long what was claimed is kept for a process that says nothing more of it.
_LEASE_S = 600.0
#: Other processes make room without telling us: we look again, after pauses that grow to this.
_LOOK_AGAIN_S = 0.5


class StoreBuffer(ClaimingBuffer):
    """Entries of a store. With ``"mode": "share"``, `claim` takes nothing out, and `Grant.release` drops nothing."""

    traits: ClassVar[BufferTraits] = BufferTraits(bounded=True, expires=True, joins=True, shared=True)
    #: The dataclass that the options under ``buffer`` in the configuration are read into.
    options_type: ClassVar[type[StoreOptions]] = StoreOptions

    @classmethod
    @abstractmethod
    def open_store(cls, options: StoreOptions) -> Store:
        """Open the medium that ``options``, of `options_type`, name; raise `ConfigError` if they cannot be right."""

    def __init__(self, options: StoreOptions, policy: Policy = "wait", wait_s: float = 30.0) -> None:
        """Open a table.

        Args:
            options: which store, and how much may be there for how long.
            policy: when full, wait for takers and expiry, raise, or evict the oldest.
            wait_s: the longest wait for room, then `BufferFullError`.

        Raises:
            ConfigError: the store cannot be used.

        """
        self._options, self._policy, self._wait_s = options, policy, wait_s
        self._store = self.open_store(options)
        self._crew = Crew("kvconnect-store-table", 2)
        self._rooms = Rooms("cpu")
        self._changed = threading.Condition()
        #: Claimed here, by name: the claim of one taker is shared by all that it makes.
        self._claimed: dict[str, _Claimed] = {}
        self._writing = 0
        self._closed = False

    # -- the contract ---------------------------------------------------------------

    def insert(self, key: LookupKey, kv: Sequence[Tensor]) -> None:
        """Copy ``kv`` to the store. See `LookupBuffer.insert`."""
        stream = encode(kv)
        arena, ids = _arena(blocks_needed(stream, _BLOCK_BYTES))
        fill(arena, ids, stream)
        writer = PartWriter(arena.memory, [ids], self._store, self._rooms, self._options.chunk_bytes)
        draft, name = secrets.token_hex(16), name_of(key)
        with self._room(name, writer.nbytes):
            try:
                self._run(ChunkRun(self._crew, writer.steps, lambda span, guard: writer.write(draft, 0, span, guard)))
            except KVConnectError:
                with contextlib.suppress(KVConnectError):  # what is wrong is known already
                    self._store.discard(draft)
                raise
            numbers = (tuple(range(1, len(ids) + 1)),)
            manifest = Manifest(key, numbers, self._options.chunk_bytes, (writer.part(),), time.time())
            self._store.publish(draft, name, manifest.pack(), nbytes=manifest.nbytes, replace=True)

    def _present(self, key: LookupKey) -> bool:
        found = self._store.find(name_of(key))
        return found is not None and self._lives(Manifest.unpack(found.manifest))

    def claim(self, key: LookupKey, taker: str) -> Grant | None:
        """Reserve an entry. One ``taker`` shares it within this process only. See `LookupBuffer.claim`."""
        name, grant = name_of(key), secrets.token_hex(8)
        with self._changed:
            self._check_open()
            known = self._claimed.get(name)
            if known is not None and known.taker == taker:
                known.users += 1
                return _StoreGrant(self, known)
        shared = self._options.mode == "share"
        found = self._store.find(name) if shared else self._store.take(name, grant, _LEASE_S)
        if found is None:
            return None
        manifest = Manifest.unpack(found.manifest)
        claimed = _Claimed(name, None if shared else grant, taker, manifest, found.place)
        if manifest.key != key or not self._lives(manifest):
            self._store.drop(name, claimed.grant)
            return None
        if not shared:
            with self._changed:
                self._claimed[name] = claimed
        return _StoreGrant(self, claimed)

    def close(self) -> None:
        """Wake waiters, give back what is claimed. What is stored stays."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            claimed, self._claimed = list(self._claimed.values()), {}
            self._changed.notify_all()
        self._crew.close()
        for each in claimed:
            with contextlib.suppress(KVConnectError):
                self._store.give_back(each.name, each.grant or "")
        self._store.close()

    # -- inside an engine ---------------------------------------------------------------

    @classmethod
    def _open(cls, settings: EndSettings) -> tuple[Store, StoreOptions]:
        options = parse_options(cls.options_type, settings.options.buffer.options, f"{PATH}.buffer")
        return cls.open_store(options), options

    @classmethod
    def scheduler_end(cls, settings: EndSettings) -> SchedulerEnd:
        """Open the end that lives in an engine's scheduler process."""
        return StoreScheduler(cls.name, settings, *cls._open(settings))

    @classmethod
    def worker_end(cls, settings: EndSettings, rank: int, memory: PagedMemory) -> WorkerEnd:
        """Open the end that lives in the process of worker ``rank``, over its KV memory."""
        return StoreWorker(cls.name, settings, rank, memory, cls._open(settings)[0])

    # -- room -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the buffer was closed")

    def _lives(self, manifest: Manifest) -> bool:
        return time.time() < manifest.made + self._options.max_age_s

    @contextlib.contextmanager
    def _room(self, name: str, nbytes: int) -> Iterator[None]:
        """Have room for an entry to be written: wait, raise or evict until there is."""
        capacity = self._options.capacity_bytes
        if nbytes > capacity:
            raise BufferFullError(f"an entry of {nbytes} bytes is over the capacity of {capacity}")
        deadline, pause_s = time.monotonic() + self._wait_s, 0.005
        with self._changed:
            while True:
                self._check_open()
                evict = self._policy == "evict"
                wanted = self._writing + nbytes
                if make_room(self._store, self._options, wanted, time.time(), evict=evict, name=name).over <= 0:
                    break
                left = deadline - time.monotonic()
                if self._policy != "wait" or left <= 0:
                    raise BufferFullError(f"there is no room for {nbytes} bytes beside what is stored")
                self._changed.wait(min(left, pause_s))
                pause_s = min(2 * pause_s, _LOOK_AGAIN_S)
            self._writing += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._writing -= nbytes

    def _run(self, run: ChunkRun[Any]) -> None:
        run.start()
        wait([run.over])
        self._check_open()
        run.over.result()

    # -- for grants -------------------------------------------------------------------------

    def _read(self, claimed: _Claimed) -> list[Tensor]:
        self._check_open()
        manifest = claimed.manifest
        count = len(manifest.blocks[0]) if manifest.blocks else 0
        arena, ids = _arena(count)
        reader = PartReader(arena.memory, self._store, self._rooms, manifest.parts[0], manifest.chunk_bytes)
        steps = reader.plan([count], manifest.blocks, [ids])
        self._run(ChunkRun(self._crew, steps, lambda step, guard: reader.read(claimed.place, 0, step, guard)))
        return load(arena, ids)

    def _leave(self, claimed: _Claimed, *, used: bool) -> None:
        """The last of a taker's claims on an entry drops it, or gives it back."""
        with self._changed:
            self._check_open()
            claimed.used |= used
            claimed.users -= 1
            if claimed.users or claimed.grant is None:
                return
            del self._claimed[claimed.name]
        if not claimed.used:
            self._store.give_back(claimed.name, claimed.grant)
        elif not self._store.drop(claimed.name, claimed.grant):
            raise StaleError("the entry was no longer vouched for")
        with self._changed:
            self._changed.notify_all()


class _Claimed:
    """An entry that one taker of this process has claimed, once or several times."""

    def __init__(self, name: str, grant: str | None, taker: str, manifest: Manifest, place: str) -> None:
        self.name, self.grant, self.taker, self.manifest, self.place = name, grant, taker, manifest, place
        self.users, self.used = 1, False


class _StoreGrant(Grant):
    """A claim on an entry of a store."""

    def __init__(self, buffer: StoreBuffer, claimed: _Claimed) -> None:
        self.key = claimed.manifest.key
        self._buffer, self._claimed = buffer, claimed
        self._over = False

    def tensors(self) -> list[Tensor]:
        if self._over:
            raise LoadError("the grant has ended")
        return self._buffer._read(self._claimed)  # noqa: SLF001 - one module, one class in two halves

    def release(self) -> None:
        self._end(used=True)

    def abandon(self) -> None:
        self._end(used=False)

    def _end(self, *, used: bool) -> None:
        if not self._over:
            self._over = True
            self._buffer._leave(self._claimed, used=used)  # noqa: SLF001 - likewise


def _arena(count: int) -> tuple[Arena, Ids]:
    """Return memory for ``count`` blocks; the first block is left out, as it is in engines."""
    return Arena(count + 1, _BLOCK_BYTES), tuple(range(1, count + 1))
