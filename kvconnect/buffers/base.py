"""The `LookupBuffer` contract, and the two ends a buffer shows to an engine.

A lookup buffer holds KV under keys, as a table holds rows: ``insert`` adds an
entry, ``drop_select`` takes one out. ``kvconnect.testing`` holds every clause
as a law:

1. *Take-once.* An entry is handed out once, even to racing takers.
2. *Miss.* A miss is a value (``None``), not an error.
3. *Ownership.* After `insert` the caller's tensors are its own again, unless the buffer borrows.
4. *Replace.* Inserting an existing key replaces the entry; a taker sees one or the other, whole.
5. *Capacity.* In bytes; when full the policy waits, raises `BufferFullError` or evicts the oldest.
6. *Expiry.* Entries expire; a live grant keeps its entry.
7. *Fidelity.* Shape, dtype and values survive.
8. *End.* `close` wakes waiters and frees everything; afterwards `ClosedError`.
9. *Failure.* A failed read leaves the entry or reports it gone, never half of it.

Methods are called from any thread, several at once.

An engine does not hold a `LookupBuffer` directly, since its scheduler and its
workers are different processes: it opens a `SchedulerEnd` in the one and a
`WorkerEnd` in each of the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvconnect.buffers.promise import Promise
from kvconnect.clock import SYSTEM, Clock
from kvconnect.config import Backend, Config
from kvconnect.errors import KVConnectError, LoadError
from kvconnect.pipes.base import YES, Transfer, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from kvconnect.paging import BlockIds, PagedMemory


@dataclass(frozen=True, slots=True)
class LookupKey:
    """What KV is.

    Args:
        namespace: fingerprint of everything that must agree for blocks to be
            exchangeable: model and revision, dtype, layout, block size, parallel shape, CPU ISA.
        digest: of the tokens, LoRA, multimodal hashes and cache salt; 16 bytes.
        length: number of tokens that the KV covers.

    """

    namespace: str
    digest: bytes
    length: int


class Grant(ABC):
    """The right to read one entry, decided once and atomically over all its parts.

    Exactly one of `release` and `abandon` ends it; a second call does nothing.
    """

    key: LookupKey

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return the entry's parts as tensors (copies, the caller's own).

        Raises `LoadError` if the entry is gone; never returns half of it.
        """

    def read_into(self, part: int, memory: PagedMemory, blocks: BlockIds) -> Transfer:
        """Copy part ``part``, a canonical byte stream, into ``blocks`` of ``memory``.

        The default reads the part as a tensor and scatters it.
        """
        from kvconnect import blocks as paged

        transfer = Transfer(memory.layout.nbytes(blocks))
        try:
            paged.scatter_stream(self.tensors()[part], memory, blocks)
        except KVConnectError as error:
            transfer.finish(error)
        except IndexError:
            transfer.finish(LoadError(f"the entry has no part {part}"))
        else:
            transfer.finish()
        return transfer

    @abstractmethod
    def release(self) -> None:
        """The entry has been read: drop it. Raises `StaleError` if it was no longer vouched for."""

    @abstractmethod
    def abandon(self) -> None:
        """The entry was not used: offer it again."""


@dataclass(frozen=True)
class BufferTraits:
    """What a buffer class can do beyond `insert`, `drop_select` and `close`; tests take their skips from here.

    Laws hold each both ways: what is declared works, and what is not does not.
    """

    #: It holds a number of bytes at most, by a policy (clause 5).
    bounded: bool = False
    #: Entries that nobody takes go after a while (clause 6).
    expires: bool = False
    #: A taker may claim its entry again, and each grant has to be ended.
    joins: bool = False
    #: What one process has inserted, another takes, where both made the buffer with the same keyword arguments.
    #: So an engine can use its three methods.
    shared: bool = False


class LookupBuffer(ABC):
    """A table of KV entries. See the module for the contract."""

    name: ClassVar[str] = ""
    traits: ClassVar[BufferTraits] = BufferTraits()
    #: ``insert`` keeps the caller's memory; `drain_released` tells when it is free again.
    borrows: ClassVar[bool] = False

    @abstractmethod
    def insert(self, key: LookupKey, kv: Sequence[Tensor]) -> None:
        """Add an entry, or replace the one under ``key``.

        Args:
            key: what the KV is.
            kv: one tensor per part (rank), any shape and dtype.

        Raises:
            BufferFullError: it does not fit and the policy is to raise (or waiting took too long).
            ClosedError: the buffer was closed.

        """

    @abstractmethod
    def drop_select(self, key: LookupKey) -> list[Tensor] | None:
        """Take the entry under ``key`` out, or return ``None``: at most one caller gets it.

        Raises:
            ClosedError: the buffer was closed.
            LoadError: the entry was there and could not be read.

        """

    @abstractmethod
    def close(self) -> None:
        """Wake waiters and free everything. Idempotent, callable from any thread."""

    @classmethod
    def availability(cls) -> Verdict:
        """Say whether this buffer can run here, or why not and what to install."""
        return YES

    def match(self, keys: Sequence[LookupKey]) -> int:
        """Return how many leading ``keys`` are present; take nothing."""
        for count, key in enumerate(keys):
            grant = self.claim(key, taker="match")
            if grant is None:
                return count
            grant.abandon()
        return len(keys)

    def claim(self, key: LookupKey, taker: str) -> Grant | None:
        """Reserve the entry under ``key`` for ``taker``, or return ``None``.

        The default takes the entry out and puts it back when abandoned.
        """
        kv = self.drop_select(key)
        return None if kv is None else _TakenGrant(self, key, kv)

    def drain_released(self) -> list[LookupKey]:
        """Keys of borrowed entries whose memory is the inserter's again since the last call."""
        return []

    # -- inside an engine ---------------------------------------------------------

    @classmethod
    def scheduler_end(cls, settings: EndSettings) -> SchedulerEnd:
        """Open the end that lives in an engine's scheduler process.

        The default suits buffers that declare `BufferTraits.shared`: each of an engine's processes makes one,
        with the options under ``buffer`` in the configuration as its keyword arguments, and each prompt becomes
        one row for every chunk of its KV and one that names them.

        Raises:
            ConfigError: processes do not share it, or an option is wrong.

        """
        from kvconnect.buffers import store_over_table

        return store_over_table.scheduler_end(cls, settings)

    @classmethod
    def worker_end(cls, settings: EndSettings, rank: int, memory: PagedMemory) -> WorkerEnd:
        """Open the end that lives in the process of worker ``rank``, over its KV memory. See `scheduler_end`."""
        from kvconnect.buffers import store_over_table

        return store_over_table.worker_end(cls, settings, rank, memory)


class _TakenGrant(Grant):
    """A grant over ``drop_select``: the entry is already out of the buffer."""

    def __init__(self, buffer: LookupBuffer, key: LookupKey, kv: list[Tensor]) -> None:
        self.key = key
        self._buffer, self._kv = buffer, kv
        self._over = False

    def tensors(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._kv]

    def release(self) -> None:
        self._over = True
        self._kv = []

    def abandon(self) -> None:
        if not self._over:
            self._over = True
            self._buffer.insert(self.key, self._kv)


# -- the two ends of a buffer in an engine ----------------------------------------


@dataclass(frozen=True)
class EndSettings:
    """What both ends of a buffer need to know about the engine they live in.

    Args:
        engine_id: vLLM's engine id (with its data-parallel suffix).
        fingerprint: named fields whose values must equal a peer's; hashed into
            `LookupKey.namespace`. A mismatch is reported field by field.
        num_parts: workers (TP × PP) of this engine; each holds one part of every entry.
        produces, consumes: vLLM's role.
        options: the parsed configuration (`kvconnect.config.Config`).
        pipe: the chosen pipe (or ``auto``) with its options.
        clock: of its leases and deadlines (but for those of pipes).

    """

    engine_id: str
    fingerprint: Mapping[str, str | int]
    num_parts: int
    produces: bool
    consumes: bool
    options: Config
    pipe: Backend = Backend("auto")
    clock: Clock = SYSTEM


@dataclass(frozen=True, slots=True)
class Want:
    """What a consumer's request is looking for, by every route at once.

    Args:
        key: the content; whatever is found by any route must have this digest and length.
        label: the X-Request-Id part that both legs share, if any.
        ticket: the producer's ticket (`SchedulerEnd.offer`'s answer), if the request carries one.
        prefixes: keys of what the content begins with, the shortest first, where the end has
            `SchedulerEnd.segment_tokens`: the longest that is there is worth having, too.

    """

    key: LookupKey
    label: str | None = None
    ticket: Mapping[str, Any] | None = None
    prefixes: tuple[LookupKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """A grant as plain data, so that it can cross from the scheduler to the workers.

    Args:
        grant: unique name of the grant, chosen by the taker.
        key: content of the entry; `Want.key`, or one of `Want.prefixes`.
        blocks: the owner's block ids, per group (empty for a buffer that copies).
        data: what the buffer's own worker end needs; picklable plain data.
        promise: until when the owner leaves the blocks as they are; renewals prolong it.

    """

    grant: str
    key: LookupKey
    blocks: tuple[tuple[int, ...], ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    promise: Promise = field(default_factory=Promise, compare=False)


@dataclass(frozen=True, slots=True)
class Miss:
    """Nothing to load; ``cause`` is a short code for counters, ``detail`` is for people."""

    cause: str
    detail: str = ""


class SchedulerEnd(ABC):
    """A buffer's end in the scheduler process.

    Called from the engine's only scheduling thread: **no method waits** for the
    network, a lock held across I/O, or another process.
    """

    #: Prompts are cut every so many tokens or a little more, so that others that begin alike share an entry
    #: (`offer`'s ``before``, `Want.prefixes`). 0: an entry is a whole prompt.
    segment_tokens: int = 0
    #: Whether `offer` takes ``notes``, and `news` returns them.
    tells_news: bool = False

    # -- consumer: which KV is there --------------------------------------------

    @abstractmethod
    def look(self, request_id: str, want: Want) -> None:
        """Start looking for ``want`` on behalf of a request; keep what is found from expiring."""

    @abstractmethod
    def found(self, request_id: str) -> Claim | Miss | None:
        """Return the answer to `look`, or ``None`` while it is not known yet.

        An answer always comes: each look has a deadline. A claim may still turn
        into a miss, if its owner cannot keep it, until `commit`.
        """

    def commit(self, request_id: str) -> Claim | Miss:
        """Return the final answer to `look`: a claim is used from here on and stays what it is.

        Call it when blocks have been allocated. The default suits buffers whose
        claims never turn into misses.
        """
        return self.found(request_id) or Miss("absent", "there is no answer yet")

    @abstractmethod
    def settle(self, request_id: str) -> None:
        """The workers are done with the request's claim, well or not: forget it."""

    @abstractmethod
    def abandon(self, request_id: str) -> None:
        """The request needs no KV after all: give its claim back. Unknown ids are ignored."""

    # -- producer: lending its own blocks -----------------------------------------

    @abstractmethod
    def offer(
        self,
        key: LookupKey,
        blocks: tuple[tuple[int, ...], ...],
        *,
        label: str | None,
        asked: bool,
        before: Sequence[tuple[LookupKey, tuple[tuple[int, ...], ...]]] = (),
        notes: Mapping[LookupKey, Any] | None = None,
    ) -> dict[str, Any]:
        """Insert an entry made of this engine's own blocks; return the ticket that names it.

        The blocks belong to the buffer until `drain_released` returns the entry.

        Args:
            key: the content.
            blocks: block ids per group.
            label: X-Request-Id part that both legs share, if any.
            asked: somebody asked for a hand-over; otherwise the entry gives way to
                ordinary traffic (`reclaim`).
            before: what comes before ``blocks`` in the prompt, in its order, if the end has `segment_tokens`: the
                key of the prompt up to there, and the blocks since the segment before. The blocks of each
                are drained by themselves.
            notes: what `news` is to return of entries under these keys, if the end `tells_news`.

        """

    def news(self) -> Sequence[tuple[Any, bool]]:
        """Return, since the last call, the ``notes`` of entries that others find by now (``True``), or no more.

        In the order of what happened: of one key, there and gone take turns. An entry of another engine that was found
        instead of written counts, too; what is not known for certain to be there does not.
        """
        return ()

    @abstractmethod
    def drain_released(self) -> list[tuple[tuple[int, ...], ...]]:
        """Return the blocks, per group, of every entry that ended since the last call."""

    @abstractmethod
    def reclaim(self, num_blocks: int, offered_s: float = float("inf")) -> int:
        """End unclaimed entries, oldest first, until they held ``num_blocks``; return how many they held.

        First those nobody asked for, then those that have waited ``offered_s`` seconds for
        whoever asked. Their blocks are in the next `drain_released`, or, where somebody is copying
        them, in the first one after he has stopped: an entry is counted here once.
        """

    @abstractmethod
    def unasked_blocks(self) -> int:
        """Blocks held by unclaimed entries nobody asked for."""

    @abstractmethod
    def lent_blocks(self) -> int:
        """Blocks held by all entries; one that is in two of them counts twice."""

    @abstractmethod
    def awaits_takers(self) -> bool:
        """Whether an entry is out that a taker asked for, or `news` are due: the engine should keep stepping."""

    # -- both ---------------------------------------------------------------------

    @abstractmethod
    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn this engine's workers: `WorkerEnd.describe`'s answers, by rank."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Counters since the start: entries offered, taken, expired, …, misses by cause.

        Those that are called like an event of ``vllm:kvconnect_entries_total`` (`docs/observability.md`) are
        that metric. Called in every step of the engine.
        """

    @abstractmethod
    def clear(self) -> bool:
        """Drop unclaimed entries (cache reset). ``False`` if claimed ones remain."""

    @abstractmethod
    def close(self) -> None:
        """End all claims and offers; stop threads. Idempotent."""


class WorkerEnd(ABC):
    """A buffer's end in a worker process: it moves the blocks."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what peers need to read this worker's blocks; msgpack-able."""

    @abstractmethod
    def read(self, claim: Claim, remote: BlockIds, local: BlockIds, on_done: Callable[[Transfer], None]) -> Transfer:
        """Start to load ``remote`` of the owner's blocks into ``local`` of this worker's.

        The transfer succeeds only when the bytes are in place **and** the owner
        has confirmed that it vouched for them to the end (else `StaleError`).
        ``on_done`` is called from any thread, and before this returns if the load
        is over by then. Never blocks.
        """

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Counters since the start: transfers, bytes, failures by cause, microseconds on the wire."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what runs, close pipes, stop threads. Idempotent."""
