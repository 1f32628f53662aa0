"""The `Store` contract: a medium that keeps entries for engines which share nothing else.

A database or a directory becomes a lookup buffer by these few methods; keys, KV and
engines are `StoreBuffer`'s business. An entry is a *manifest* and numbered *parts*, cut
into chunks of one size (the last may be shorter). It is written under the name of a
*draft*, which nobody finds, and becomes an entry when it is published:

1. *Whole or not at all.* `find` and `take` return only what was published, with all its chunks.
2. *Take-once.* Of all takers of an entry, in whatever processes, exactly one gets it.
3. *A taker's lease.* What was taken and neither dropped nor renewed in time is offered again by `mend`.
4. *Gone is gone.* Reading what was dropped raises; it never returns bytes of something else.
   (Readers compare checksums besides, so a medium need not find damage.)

Methods are called from any thread, several at once, and may block: a fixed few threads
wait for them, and whoever waits for those has a deadline. They raise `BrokenError` if the
medium fails, `BufferFullError` if it has no room and `LoadError` if a chunk is not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvconnect.config import PATH
from kvconnect.errors import ConfigError

#: Chunks larger than this are refused: each reading thread holds one.
MAX_CHUNK_BYTES = 64 << 20
#: Likewise manifests: a scheduler reads them, and what lies in a store is not believed.
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """What buffers over any store are told.

    Args:
        mode: ``"take"``: an entry is handed out once, then dropped. ``"share"``: any number of readers,
            and an entry stays until it is evicted.
        capacity_bytes: most that all entries together may hold. Engines that share a store need not
            agree; who writes sees to its own limit, beside what others are writing.
        max_age_s: how long an entry lives.
        chunk_bytes: bytes of a chunk: what is moved, and checked, at a time.
        writing_bytes: most that one engine's prompts under way to the store may hold; those beyond are not stored.
        segment_tokens: with ``"share"``, prompts are cut after so many tokens (or a few more, at the end of a
            block): prompts that begin alike share what they have in common. 0: an entry is a whole prompt.

    """

    mode: Literal["take", "share"] = "take"
    capacity_bytes: int = 16 << 30
    max_age_s: float = 3600.0
    chunk_bytes: int = 4 << 20
    writing_bytes: int = 1 << 30
    segment_tokens: int = 256

    def __post_init__(self) -> None:
        """Check ranges; raise `ConfigError`."""
        for name in ("capacity_bytes", "max_age_s", "chunk_bytes", "writing_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{PATH}.buffer.{name} must be greater than 0, got {getattr(self, name)}")
        if self.segment_tokens < 0:
            raise ConfigError(f"{PATH}.buffer.segment_tokens must not be negative, got {self.segment_tokens}")
        if self.chunk_bytes > MAX_CHUNK_BYTES:
            raise ConfigError(f"{PATH}.buffer.chunk_bytes must be at most {MAX_CHUNK_BYTES}, got {self.chunk_bytes}")


@dataclass(frozen=True)
class Found:
    """An entry's manifest, and where its parts are read from (`Store.get`)."""

    manifest: bytes
    place: str


@dataclass(frozen=True)
class Stored:
    """An entry as `Store.entries` lists it; ``made`` and ``used`` (by `Store.touch`) are times of ``time.time``."""

    name: str
    nbytes: int
    made: float
    taken: bool
    used: float = 0.0


class Store(ABC):
    """One medium. Names, drafts and grants are short hexadecimal strings. See the module for the contract."""

    #: `get` takes what it reads out: one request reads an entry, others of its engine do not share it.
    reads_once: ClassVar[bool] = False

    # -- writing --------------------------------------------------------------------

    @abstractmethod
    def put(self, draft: str, part: int, offset: int, data: memoryview) -> None:
        """Write one chunk, that begins at byte ``offset`` of a part. The memory is the caller's again afterwards."""

    @abstractmethod
    def publish(self, draft: str, name: str, manifest: bytes, *, nbytes: int, replace: bool) -> bool:
        """Make a draft the entry ``name``; raise `BrokenError` if its chunks, ``nbytes`` in all, are not all there.

        If one is offered under that name: with ``replace`` it is dropped, else the draft is and the answer is no.
        """

    @abstractmethod
    def discard(self, draft: str) -> None:
        """Drop a draft that was not published; unknown ones are ignored."""

    # -- reading --------------------------------------------------------------------

    @abstractmethod
    def find(self, name: str) -> Found | None:
        """Return what is offered under ``name``; others may take or drop it."""

    @abstractmethod
    def take(self, name: str, grant: str, lease_s: float) -> Found | None:
        """Take what is offered under ``name`` out, for so long; nobody else finds it."""

    @abstractmethod
    def get(self, place: str, part: int, offset: int, into: memoryview) -> None:
        """Read one whole chunk, of as many bytes as ``into`` has; raise `LoadError` if it is not there."""

    @abstractmethod
    def renew(self, name: str, grant: str, lease_s: float) -> bool:
        """Prolong what was taken; ``False`` if it is the taker's no more."""

    @abstractmethod
    def give_back(self, name: str, grant: str) -> None:
        """Offer again what was taken (unless another has come under its name: then drop it)."""

    # -- keeping --------------------------------------------------------------------

    @abstractmethod
    def drop(self, name: str, grant: str | None = None) -> bool:
        """Drop what was taken by ``grant``, or what is offered; ``False`` if that is not there."""

    def touch(self, name: str) -> None:  # noqa: B027 - it may be left out
        """Remember that what is offered under ``name`` was of use now, so that others are evicted before it.

        A medium that cannot leaves it: its oldest entries are evicted first.
        """

    @abstractmethod
    def entries(self) -> Sequence[Stored]:
        """List what is offered and taken."""

    @abstractmethod
    def mend(self) -> None:
        """Offer again what takers have left behind; drop drafts that were."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and files; what is stored stays. Idempotent."""
