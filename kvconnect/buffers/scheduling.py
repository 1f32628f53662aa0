"""The end in a scheduler process: what `Lender` and `Taker` do for an engine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from kvconnect.buffers.access import Access
from kvconnect.buffers.address import fixed_producers
from kvconnect.buffers.base import Claim, EndSettings, LookupKey, Miss, SchedulerEnd, Want
from kvconnect.buffers.directory import Directory, Producers
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.ledger import Blocks
from kvconnect.buffers.lender import Lender
from kvconnect.buffers.taker import Taker
from kvconnect.config import Config
from kvconnect.control import ControlClient
from kvconnect.errors import KVConnectError


class RemoteScheduler(SchedulerEnd):
    """The end in a scheduler process: a `Lender` if it produces, a `Taker` if it consumes."""

    def __init__(self, settings: EndSettings) -> None:
        """Start to answer and to ask; waits for nobody.

        Raises:
            ConfigError: the control address cannot be bound, or a key cannot be read.

        """
        options: Config = settings.options
        me = Hello.of(settings, secrets.token_hex(8))
        self._lender: Lender | None = None
        self._taker: Taker | None = None
        self._client: ControlClient | None = None
        self._directory = Directory(options.group)
        own, access = "", Access(options, settings.clock)
        if settings.produces:
            server, own = access.server("kvconnect-lender")
            self._lender = Lender(me, server, own, clock=settings.clock)
            self._directory.publish(me, own)
        if settings.consumes:
            self._client = access.client("kvconnect-taker")
            producers = Producers(fixed_producers(options), self._directory, own)
            self._taker = Taker(settings.options, me, self._client, producers)

    # -- consumer -------------------------------------------------------------------

    def look(self, request_id: str, want: Want) -> None:
        """Start looking. See `SchedulerEnd.look`."""
        if self._taker is not None:
            self._taker.look(request_id, want)

    def found(self, request_id: str) -> Claim | Miss | None:
        """Return the answer. See `SchedulerEnd.found`."""
        return self._taker.found(request_id) if self._taker is not None else Miss("not_consumer")

    def commit(self, request_id: str) -> Claim | Miss:
        """Return the final answer. See `SchedulerEnd.commit`."""
        return self._taker.commit(request_id) if self._taker is not None else Miss("not_consumer")

    def settle(self, request_id: str) -> None:
        """Forget a claim that the workers are done with."""
        if self._taker is not None:
            self._taker.settle(request_id)

    def abandon(self, request_id: str) -> None:
        """Give a claim back."""
        if self._taker is not None:
            self._taker.abandon(request_id)

    # -- producer -------------------------------------------------------------------

    def offer(
        self,
        key: LookupKey,
        blocks: Blocks,
        *,
        label: str | None,
        asked: bool,
        before: Sequence[tuple[LookupKey, Blocks]] = (),
        notes: Mapping[LookupKey, Any] | None = None,
    ) -> dict[str, Any]:
        """Lend blocks. See `SchedulerEnd.offer`; prompts are whole here: nothing comes ``before``, and no ``notes``."""
        if self._lender is None:
            raise KVConnectError("this engine is a consumer only: it has nothing to offer")
        return self._lender.offer(key, blocks, label=label, asked=asked)

    def drain_released(self) -> list[Blocks]:
        """Return the blocks of entries that ended."""
        return self._lender.drain_released() if self._lender is not None else []

    def reclaim(self, num_blocks: int, offered_s: float = float("inf")) -> int:
        """End unclaimed entries."""
        return self._lender.reclaim(num_blocks, offered_s) if self._lender is not None else 0

    def lent_blocks(self) -> int:
        """Blocks of all entries."""
        return self._lender.blocks if self._lender is not None else 0

    def unasked_blocks(self) -> int:
        """Blocks that `reclaim` could end."""
        return self._lender.unasked_blocks if self._lender is not None else 0

    def awaits_takers(self) -> bool:
        """Whether the engine should keep stepping."""
        return self._lender is not None and self._lender.busy

    # -- both -------------------------------------------------------------------------

    def introduce(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Learn this engine's workers."""
        if self._lender is not None:
            self._lender.introduce(workers)
        if self._taker is not None:
            self._taker.introduce(workers)

    def stats(self) -> dict[str, int]:
        """Counters of both halves."""
        lent = self._lender.stats() if self._lender is not None else {}
        return {**lent, **(self._taker.stats() if self._taker is not None else {})}

    def clear(self) -> bool:
        """Drop unclaimed entries."""
        return self._lender.clear() if self._lender is not None else True

    def close(self) -> None:
        """Give back, stop answering, remove our file."""
        self._directory.close()
        if self._taker is not None:
            self._taker.close()
        if self._client is not None:
            self._client.close()
        if self._lender is not None:
            self._lender.close()
