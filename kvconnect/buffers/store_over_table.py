"""`TableStore`: any lookup buffer that processes share, as a `Store`. So its three methods serve an engine.

Each row of the table is one `LookupBuffer.insert`: a chunk of a part, or an entry's manifest beside the name
of the draft that its chunks lie under. Reading takes a row out, so an entry is read once and by one request.

A table cannot be listed, and what it holds may go as its owner likes: a chunk that is gone fails its load.
`TableStore.entries` are those that this very object has published, taken by others meanwhile or not, so that
an engine drops its own in time. What nobody knows of any more is the table's own affair: chunks
of engines and takers that died, and the last few of a draft that was given up while they were written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from kvconnect.buffers.base import EndSettings, LookupBuffer, LookupKey, SchedulerEnd, WorkerEnd
from kvconnect.buffers.store import Found, Store, Stored, StoreOptions
from kvconnect.buffers.store_manifest import Manifest
from kvconnect.buffers.store_parts import ABREAST
from kvconnect.buffers.store_scheduler import StoreScheduler
from kvconnect.buffers.store_worker import StoreWorker
from kvconnect.config import PATH, parse_options
from kvconnect.errors import BrokenError, ConfigError, IntegrityError, KVConnectError, LoadError, as_ours
from kvconnect.paging import PagedMemory

logger = logging.getLogger(__name__)

_CHUNKS: Final = "kvconnect chunks"
_ENTRIES: Final = "kvconnect entries"
_AT: Final = f"{PATH}.buffer"
_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class TableStore(Store):
    """The rows of one table. See the module."""

    reads_once: ClassVar[bool] = True

    def __init__(self, table: LookupBuffer, options: StoreOptions, num_parts: int) -> None:
        """Store in ``table``, which `close` closes; drafts have ``num_parts`` parts."""
        self._table, self._options, self._num_parts = table, options, num_parts
        self._lock = threading.Lock()
        #: By grant.
        self._taken: dict[str, Found] = {}
        #: By name.
        self._published: dict[str, Stored] = {}

    # -- writing --------------------------------------------------------------------

    def put(self, draft: str, part: int, offset: int, data: memoryview) -> None:
        """Insert a chunk. See `Store.put`."""
        self._insert(_chunk(draft, part, offset), [_tensor(data)])

    def publish(self, draft: str, name: str, manifest: bytes, *, nbytes: int, replace: bool) -> bool:
        """Insert a manifest; a chunk that the table has lost is found out when it is read. See `Store.publish`."""
        old, new = self._take_out(name), Found(manifest, draft)
        if old is not None and not replace:
            self._offer(name, old)
            self.discard(draft)
            return False
        try:
            self._offer(name, new)
        except Exception:  # whatever it was, it goes on
            # No row says where its chunks are, and a table may keep them for ever.
            with contextlib.suppress(KVConnectError):
                self._take_out(name)
                self.discard(draft)
            raise
        with self._lock:
            self._published[name] = Stored(name, Manifest.unpack(manifest).nbytes, time.time(), taken=False)
        if old is not None:
            self._drop_chunks(old)
        return True

    def discard(self, draft: str) -> None:
        """Take the chunks of a draft out, as far as they have been written. See `Store.discard`."""
        for part in range(self._num_parts):
            missing = 0
            for offset in range(0, self._options.writing_bytes, self._options.chunk_bytes):
                missing = missing + 1 if self._drop_select(_chunk(draft, part, offset), 1) is None else 0
                if missing == ABREAST:  # they are begun in their order: none of those behind was
                    break

    # -- reading --------------------------------------------------------------------

    def find(self, name: str) -> Found | None:
        """Take a manifest out and put it back: others miss it meanwhile. See `Store.find`."""
        found = self._take_out(name)
        if found is not None:
            self._offer(name, found)
        return found

    def take(self, name: str, grant: str, lease_s: float) -> Found | None:
        """Take a manifest out. See `Store.take`."""
        found = self._take_out(name)
        if found is not None:
            with self._lock:
                self._taken[grant] = found
        return found

    def get(self, place: str, part: int, offset: int, into: memoryview) -> None:
        """Take a chunk out. See `Store.get`."""
        kv = self._drop_select(_chunk(place, part, offset), 1)
        if kv is None:
            raise LoadError(f"byte {offset} of the entry's part {part} is gone from the buffer")
        if kv[0].nbytes != len(into):
            raise LoadError(f"the buffer has {kv[0].nbytes} bytes of a chunk of {len(into)}")
        _tensor(into).copy_(kv[0])

    def renew(self, name: str, grant: str, lease_s: float) -> bool:
        """Say whether it is still held here: nobody else can have it. See `Store.renew`."""
        return grant in self._taken

    def give_back(self, name: str, grant: str) -> None:
        """Insert a manifest again. See `Store.give_back`."""
        with self._lock:
            mine = self._taken.pop(grant, None)
        if mine is not None:
            newer = self._take_out(name)
            self._offer(name, newer or mine)
            if newer is not None:
                self._drop_chunks(mine)

    # -- keeping --------------------------------------------------------------------

    def drop(self, name: str, grant: str | None = None) -> bool:
        """Take out what is left of an entry; of one that was published here, others may have it. See `Store.drop`."""
        if grant is not None:
            with self._lock:
                found = self._taken.pop(grant, None)
            known = found is not None
        else:
            found = self._take_out(name)
            with self._lock:
                # Taken by somebody, it is no more in the table, or soon will not be.
                known = self._published.pop(name, None) is not None or found is not None
        if found is not None:
            self._drop_chunks(found)
        return known

    def entries(self) -> Sequence[Stored]:
        """List what was published here and not dropped. See `Store.entries`."""
        with self._lock:
            return list(self._published.values())

    def mend(self) -> None:
        """Do nothing: a table does not tell what was left behind."""

    def close(self) -> None:
        """Close the table. See `Store.close`."""
        try:
            self._table.close()
        except Exception as error:  # noqa: BLE001 - a third party's mistake must not keep an engine from ending
            logger.warning("the buffer failed to close: %s: %s", type(error).__name__, error)

    # -- rows -----------------------------------------------------------------------

    def _offer(self, name: str, found: Found) -> None:
        kv = [_tensor(bytearray(found.place.encode())), _tensor(bytearray(found.manifest))]
        self._insert(_entry(name), kv)

    def _take_out(self, name: str) -> Found | None:
        kv = self._drop_select(_entry(name), 2)
        if kv is None:
            return None
        place, manifest = (tensor.numpy().tobytes() for tensor in kv)
        return Found(manifest, place.decode(errors="replace"))

    def _drop_chunks(self, found: Found) -> None:
        with contextlib.suppress(IntegrityError):  # then nobody knows which there are
            manifest = Manifest.unpack(found.manifest)
            for rank, part in enumerate(manifest.parts):
                for offset in range(0, part.nbytes, manifest.chunk_bytes):
                    self._drop_select(_chunk(found.place, rank, offset), 1)

    def _insert(self, key: LookupKey, kv: Sequence[Tensor]) -> None:
        try:
            self._table.insert(key, kv)
        except Exception as error:  # whatever a third party's code raises
            raise as_ours(error, "insert of the buffer failed: ") from error

    def _drop_select(self, key: LookupKey, count: int) -> list[Tensor] | None:
        """Take a row out: ``count`` tensors of bytes in host memory, whatever the buffer returns."""
        try:
            kv: Any = self._table.drop_select(key)
            if kv is None:
                return None
            if len(kv) == count and all(isinstance(t, Tensor) and t.dtype == torch.uint8 and t.ndim == 1 for t in kv):
                return [tensor.detach().cpu().contiguous() for tensor in kv]
        except Exception as error:  # likewise
            raise as_ours(error, "drop_select of the buffer failed: ") from error
        raise BrokenError(f"drop_select of the buffer returned {kv!r:.80}, not the {count} tensors that were inserted")


def _chunk(draft: str, part: int, offset: int) -> LookupKey:
    """Return a chunk's key: a part is a digest, a chunk the length of what comes before it."""
    return LookupKey(_CHUNKS, hashlib.blake2b(f"{draft}/{part}".encode(), digest_size=16).digest(), offset)


def _entry(name: str) -> LookupKey:
    return LookupKey(_ENTRIES, hashlib.blake2b(name.encode(), digest_size=16).digest(), 0)


def _tensor(data: memoryview | bytearray) -> Tensor:
    """Return the memory itself as a tensor."""
    return torch.frombuffer(data, dtype=torch.uint8)


# -- inside an engine ---------------------------------------------------------------------


def scheduler_end(buffer: type[LookupBuffer], settings: EndSettings) -> SchedulerEnd:
    """Open the scheduler's end of a buffer of three methods. Raises `ConfigError` if an engine cannot use it."""
    return StoreScheduler(settings.options.buffer.name, settings, *_open(buffer, settings))


def worker_end(buffer: type[LookupBuffer], settings: EndSettings, rank: int, memory: PagedMemory) -> WorkerEnd:
    """Open the end of worker ``rank``, likewise."""
    return StoreWorker(settings.options.buffer.name, settings, rank, memory, _open(buffer, settings)[0])


def _open(buffer: type[LookupBuffer], settings: EndSettings) -> tuple[TableStore, StoreOptions]:
    name = settings.options.buffer.name
    if not buffer.traits.shared or buffer.borrows:
        raise ConfigError(
            f"{_AT} {name!r} cannot serve an engine, whose processes have to share it: if what one process inserts is "
            f"found by another, {buffer.__name__} must declare it (traits = BufferTraits(shared=True)); "
            "else use 'remote', 'filesystem' or 'redis'"
        )
    own, options = _options(buffer, settings.options.buffer.options)
    if options.mode != "take":
        raise ConfigError(
            f"{_AT}.mode is {options.mode!r}, but buffer {name!r} hands each entry out once: "
            "remove the option, or use 'filesystem' or 'redis'"
        )
    try:
        table = buffer(**own)
    except ConfigError:
        raise
    except Exception as error:  # whatever a third party's constructor raises
        given = ", ".join(own) or "no options"
        raise ConfigError(f"{_AT} {name!r} cannot be opened with {given}: {type(error).__name__}: {error}") from error
    return TableStore(table, options, settings.num_parts), options


def _options(buffer: type[LookupBuffer], given: Mapping[str, Any]) -> tuple[dict[str, Any], StoreOptions]:
    """Tell the arguments of a buffer's constructor, which come first, from `StoreOptions`."""
    wanted = inspect.signature(buffer).parameters.values()
    named = {each.name: each for each in wanted if each.kind in _NAMED}
    others = {field.name for field in dataclasses.fields(StoreOptions)}
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted):
        named |= {key: inspect.Parameter(key, _NAMED[1], default=None) for key in given if key not in others}
    missing = next((n for n, each in named.items() if each.default is each.empty and n not in given), None)
    if missing is not None:
        raise ConfigError(f"{_AT}.{missing} is missing: {buffer.__name__} needs it")
    rest = {key: value for key, value in given.items() if key not in named}
    options = parse_options(StoreOptions, rest, _AT, also=named)
    return {key: value for key, value in given.items() if key in named}, options
