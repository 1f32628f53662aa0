"""A store buffer's end in a worker process: it writes blocks when its scheduler asks, and reads claimed ones."""

from __future__ import annotations

import collections
import functools
import hmac
import logging
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from kvconnect import blocks as paged
from kvconnect.buffers import fields
from kvconnect.buffers.access import Access
from kvconnect.buffers.base import Claim, EndSettings, WorkerEnd
from kvconnect.buffers.crew import Crew
from kvconnect.buffers.store import MAX_CHUNK_BYTES, Store
from kvconnect.buffers.store_manifest import Part, shape_of
from kvconnect.buffers.store_parts import ChunkRun, Guard, PartReader, PartWriter, Rooms
from kvconnect.buffers.store_segments import wanted
from kvconnect.buffers.ticket import unpack_ids
from kvconnect.control import ControlServer
from kvconnect.errors import ClosedError, DeadlineError, HandshakeError, KVConnectError, LoadError, as_ours, named
from kvconnect.loop import Loop, Timer
from kvconnect.paging import BlockIds, PagedMemory
from kvconnect.pipes.base import Message, Transfer

logger = logging.getLogger(__name__)

#: Threads that move chunks, of all transfers together; each holds one chunk.
_THREADS = 4
_CLOSE_S = 5.0
_DRAFT = re.compile(r"[0-9a-f]{1,64}")


class StoreWorker(WorkerEnd):
    """Moves one worker's parts of entries."""

    def __init__(self, name: str, settings: EndSettings, rank: int, memory: PagedMemory, store: Store) -> None:
        """Serve ``memory`` as part ``rank``; waits for nobody.

        Raises:
            ConfigError: the control address cannot be bound, or a key cannot be read.

        """
        self._name, self._rank, self._memory, self._store = name, rank, memory, store
        self._limit_s = settings.options.transfer_timeout_s
        self._rooms = Rooms(memory.device)
        self._crew = Crew("kvconnect-store-chunks", _THREADS)
        self._timers = Loop("kvconnect-store-timers", settings.clock)
        self._timers.start()
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        #: Under way, by draft and by load.
        self._runs: dict[object, ChunkRun[Any]] = {}
        self._closed = False
        # Only our own scheduler knows this: it comes to it through vLLM, not over the network.
        self._secret = secrets.token_hex(16)
        self._server: ControlServer | None = None
        self._endpoint = ""
        if settings.produces:
            access = Access(settings.options, settings.clock)
            self._server, self._endpoint = access.server("kvconnect-store-server", fixed_port=False)
            self._server.handle("store.write", self._write)
            self._server.handle("store.stop", self._stop)

    def describe(self) -> dict[str, Any]:
        """Return what our scheduler needs to have blocks written, and to know which entries fit."""
        layout = self._memory.layout
        return {
            "rank": self._rank,
            "endpoint": self._endpoint,
            "secret": self._secret,
            "shape": shape_of(layout),
            "block_bytes": list(layout.block_bytes),
        }

    def read(self, claim: Claim, remote: BlockIds, local: BlockIds, on_done: Callable[[Transfer], None]) -> Transfer:
        """Start a load. See `WorkerEnd.read`; ``remote`` are numbers of the claim's blocks."""
        groups = self._memory.layout.num_groups
        remote, local = remote[:groups], local[:groups]
        transfer = Transfer(self._memory.layout.nbytes(local), lambda: self._cancelled(transfer))
        transfer.via = self._name
        transfer.add_done_callback(on_done)
        try:
            steps = self._plan(claim, remote, local)
        except KVConnectError as error:
            transfer.finish(self._counted("load", 0, error))
            return transfer

        run = ChunkRun(self._crew, steps, lambda step, guard: step(guard))
        run.over.add_done_callback(
            lambda over: transfer.finish(self._counted("load", transfer.nbytes, over.exception()))
        )
        self._start(transfer, run)
        return transfer

    def _plan(self, claim: Claim, remote: BlockIds, local: BlockIds) -> list[Callable[[Guard], None]]:
        """Return the steps of a load: one for each chunk of each segment that is needed."""
        steps: list[Callable[[Guard], None]] = []
        for each in wanted(claim, remote, local):
            place, chunk_bytes, counts, parts, name = each.segment
            if self._rank >= len(parts):
                raise LoadError(f"the entry has {len(parts)} parts, this is worker {self._rank}")
            part, spoilt = Part(*parts[self._rank]), functools.partial(self._drop, name)
            reader = PartReader(self._memory, self._store, self._rooms, part, chunk_bytes, spoilt)
            landings = reader.plan(counts, each.numbers, each.local)
            steps += [functools.partial(reader.read, place, self._rank, landing) for landing in landings]
        return steps

    def _drop(self, name: str) -> None:
        """Drop an entry that others would find, too, and fail with; until it is gone nobody stores it anew."""
        if name:
            try:
                self._store.drop(name)
            except Exception as error:  # noqa: BLE001 - a third party's store may raise anything; its age ends the entry
                logger.warning("a damaged entry could not be dropped: %s", named(error))

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """End what runs, stop threads."""
        with self._lock:
            self._closed = True
            runs = list(self._runs.values())
        for run in runs:
            run.stop(ClosedError("the buffer was closed"))
        if self._server is not None:
            self._server.close()
        self._timers.close()
        self._crew.close(_CLOSE_S)
        self._store.close()

    # -- what runs ----------------------------------------------------------------------

    def _start(self, name: object, run: ChunkRun[Any]) -> None:
        """Start a run that ends in time."""
        late = DeadlineError(f"the store took longer than {self._limit_s:g} s")
        timer = self._timers.later(self._limit_s, lambda: run.stop(late))
        with self._lock:
            closed = self._closed
            self._runs[name] = run
        run.over.add_done_callback(lambda _: self._forget(name, timer))
        if closed:
            run.stop(ClosedError("the buffer was closed"))
        else:
            run.start()

    def _forget(self, name: object, timer: Timer) -> None:
        timer.cancel()
        with self._lock:
            del self._runs[name]

    def _cancelled(self, transfer: Transfer) -> None:
        self._end(transfer, "the load was cancelled")

    def _end(self, name: object, why: str) -> ChunkRun[Any] | None:
        with self._lock:
            run = self._runs.get(name)
        if run is not None:
            run.stop(LoadError(why))
        return run

    def _counted(self, what: str, nbytes: int, error: BaseException | None) -> KVConnectError | None:
        with self._lock:
            if error is None:
                self._counts[f"{what}s"] += 1
                self._counts[f"{what}_bytes"] += nbytes
            else:
                self._counts[f"{what}_failed_{type(error).__name__.removesuffix('Error').lower()}"] += 1
        return None if error is None else as_ours(error)

    # -- the server's thread --------------------------------------------------------------

    def _asked(self, body: Mapping[str, Any]) -> str:
        """Return the draft that a request is about; refuse whoever is not our scheduler."""
        if not hmac.compare_digest(fields.text(body, "secret").encode(), self._secret.encode()):
            raise HandshakeError("only this worker's own scheduler may have its blocks written")
        draft = fields.text(body, "draft")
        if not _DRAFT.fullmatch(draft):
            raise HandshakeError(f"field 'draft' must be hexadecimal, got {draft!r:.80}")
        return draft

    def _write(self, body: dict[str, Any]) -> Future[Message]:
        draft = self._asked(body)
        blocks = [unpack_ids(ids) for ids in fields.texts(body, "blocks")]
        paged.check_counts(self._memory.layout, blocks)
        chunk_bytes = fields.number(body, "chunk_bytes", MAX_CHUNK_BYTES + 1, 1)
        writer = PartWriter(self._memory, blocks, self._store, self._rooms, chunk_bytes)
        run = ChunkRun(self._crew, writer.steps, functools.partial(writer.write, draft, self._rank))
        answer: Future[Message] = Future()

        def over(_: Future[None]) -> None:
            error = self._counted("write", writer.nbytes, run.over.exception())
            if error is not None:
                answer.set_exception(error)
            else:
                part = writer.part()
                answer.set_result({"nbytes": part.nbytes, "shape": part.shape, "sums": part.sums})

        run.over.add_done_callback(over)
        self._start(draft, run)
        return answer

    def _stop(self, body: dict[str, Any]) -> Future[Message]:
        """Answer when nobody reads the blocks for this draft any more."""
        answer: Future[Message] = Future()
        run = self._end(self._asked(body), "the engine needs the blocks")
        if run is None:
            answer.set_result({})
        else:
            run.over.add_done_callback(lambda _: answer.set_result({}))
        return answer
