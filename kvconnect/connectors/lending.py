"""The producer's half of the scheduler: finished prompts become entries that others may take.

Entries are made of the engine's own blocks, pinned in vLLM's pool (`BlockPins`).
What somebody asked for is kept for a lease; what nobody asked for gives way to
ordinary traffic before any request waits or is preempted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvconnect.connectors import groups, metrics
from kvconnect.connectors.groups import Group, cut, segment_tokens, select
from kvconnect.connectors.identity import keys_of, shared_label

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvconnect.buffers.base import SchedulerEnd
    from kvconnect.connectors.compat import BlockPins
    from kvconnect.connectors.events import Announcements
    from kvconnect.connectors.metrics import Stats

log = logging.getLogger(__name__)

#: Ways to finish that leave the whole prompt's KV in the blocks.
_COMPLETE = frozenset({"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"})


@dataclass(frozen=True)
class Limits:
    """How much may be lent.

    Args:
        step_blocks: the most blocks that one scheduling step can ask for on behalf of running requests.
        unasked_share: largest share of the pool that entries nobody asked for may hold.
        blocks: the most that all entries may hold; only the pool bounds them, if ``None``.
        policy: what gives way beyond that, `Config.lend_policy`.
        spared_s: for so long a taker has time to claim what it asked for, even if a request waits for the blocks:
            longer than a busy engine leaves a request in its queue, shorter than clients wait for one.

    """

    step_blocks: int
    unasked_share: float
    blocks: int | None = None
    policy: str = "evict"
    spared_s: float = 7.5


class Lending:
    """Offers finished prompts and takes their blocks back. Engine thread only.

    Args:
        end: the buffer.
        namespace: of all keys of this engine.
        groups: the KV-cache groups that take part.
        limits: how much may be lent.
        announcements: describe what is offered, if KV events tell of it.

    """

    def __init__(
        self,
        end: SchedulerEnd,
        namespace: str,
        groups: Sequence[Group],
        limits: Limits,
        announcements: Announcements | None = None,
    ) -> None:
        self._end = end
        self._announcements = announcements
        self._namespace = namespace
        self._groups = groups
        self._limits = limits
        self._segment = segment_tokens(groups, end.segment_tokens)
        self._pins: BlockPins | None = None
        self.counters: Counter[str] = Counter()
        #: What metrics have heard, counts and blocks; and for what they were given a step to hear it in.
        self._told: tuple[dict[str, int], int] = {}, 0
        self._stepped_for = self._told

    def bind(self, pins: BlockPins) -> None:
        """Learn the pool that holds the blocks; nothing is offered before."""
        self._pins = pins

    def finished(self, request: Request, table: Sequence[Sequence[int]]) -> dict[str, Any] | None:
        """Offer a finished request's prompt; return the ``kv_transfer_params`` that name it, if any.

        ``table`` is the request's block table per group, still held by the request.
        """
        self.take_back()
        asked = bool((request.kv_transfer_params or {}).get("do_remote_decode"))
        why_not = self._obstacle(request, table)
        keys = () if why_not else keys_of(request, self._namespace, self._segment)
        if self._pins is None or not keys:
            if asked:
                self.counters["not_offered"] += 1
                log.debug("no hand-over for %s: %s", request.request_id, why_not or "its content has no token ids")
            return None
        blocks = select(self._groups, table, keys[-1].length)
        count = sum(map(len, blocks))
        if not self._within_capacity(count) or (not asked and not self._has_room(count)):
            self.counters["no_room"] += 1
            return None
        for ids in blocks:
            self._pins.pin(ids)
        *before, (key, rest) = zip(keys, cut(self._groups, blocks, [key.length for key in keys]), strict=True)
        notes = {} if self._announcements is None else {"notes": self._announcements.notes(request, keys)}
        label = shared_label(request.request_id)
        ticket = self._end.offer(key, rest, label=label, asked=asked, before=before, **notes)
        return _nixl_params(request, ticket)

    def admit(self, num_blocks: int) -> None:
        """Before a request is admitted: end entries until its ``num_blocks`` are free, if need be.

        Takers that have vanished must not keep it waiting: what was asked for gives way, too, if
        nobody has claimed it in good time.
        """
        self.make_room(num_blocks + self._limits.step_blocks)
        self.make_room(num_blocks, self._limits.spared_s)

    def make_room(self, num_blocks: int, offered_s: float = float("inf")) -> None:
        """End unclaimed entries until ``num_blocks`` are free: unasked ones, and those offered for ``offered_s``."""
        self.take_back()
        if self._pins is None:
            return
        # Entries may share blocks (a common prefix), so ending one frees fewer than it held.
        while (short := num_blocks - self._pins.free) > 0 and self._end.reclaim(short, offered_s):
            self.take_back()

    def after_step(self) -> None:
        """After a scheduling step: keep free what running requests may ask for in the next one."""
        self.make_room(self._limits.step_blocks)

    def let_go(self) -> bool:
        """End every entry that no taker is reading; ``False`` if some are being read."""
        clean = self._end.clear()
        self.take_back()
        return clean

    def take_back(self) -> None:
        """Return the blocks of ended entries to the pool."""
        for blocks in self._end.drain_released():
            if self._pins is not None:
                for ids in blocks:
                    self._pins.unpin(ids)

    def has_news(self) -> bool:
        """Whether metrics have not heard of a change; once for each, since where they are off they never will."""
        now = self._state()
        news = now not in (self._told, self._stepped_for)
        self._stepped_for = now
        return news

    def observe(self, stats: Stats) -> None:
        """Tell what became of entries since the last call, and what is held now, if that has changed."""
        counts, lent = self._state()
        if (counts, lent) == self._told:
            return  # as in most steps
        before, now = metrics.events(self._told[0]), metrics.events(counts)
        self._told = counts, lent
        for event, count in now.items():
            if more := count - before.get(event, 0):
                stats.add(metrics.ENTRIES, more, event)
        held = now.get(metrics.OFFERED, 0) - sum(now.get(event, 0) for event in metrics.ENDED)
        stats.add(metrics.LEASES, held)
        stats.add(metrics.LENT, lent)

    def _state(self) -> tuple[dict[str, int], int]:
        return {**self._end.stats(), **self.counters}, self._end.lent_blocks()

    def _obstacle(self, request: Request, table: Sequence[Sequence[int]]) -> str | None:
        """Return why this request's prompt cannot be offered, or ``None``."""
        if request.status.name not in _COMPLETE:
            return f"it ended as {request.status.name}"
        tokens = request.num_prompt_tokens
        if request.num_computed_tokens < tokens:
            return "its prompt was not computed to the end"
        for group in self._groups:
            ids = table[group.index]
            needed = group.needed(groups.usable_tokens(self._groups, tokens))
            if len(ids) < needed.stop or any(ids[i] == 0 for i in needed):
                return "some of its blocks are gone already"
        return None

    def _within_capacity(self, num_blocks: int) -> bool:
        """Whether so many more blocks may be lent, once what gives way to them has."""
        capacity = self._limits.blocks
        if capacity is None or num_blocks > capacity:
            return capacity is None
        over = self._end.lent_blocks() + num_blocks - capacity
        if over > 0 and self._limits.policy == "evict":
            over -= self._end.reclaim(over, 0.0)
            self.take_back()
        return over <= 0

    def _has_room(self, num_blocks: int) -> bool:
        """Make room for an entry nobody asked for within its share, without taking any from traffic."""
        if self._pins is None:
            return False
        share = int(self._limits.unasked_share * self._pins.total)
        over = self._end.unasked_blocks() + num_blocks - share
        if num_blocks > share:
            return False
        if over > 0:
            self._end.reclaim(over)
            self.take_back()
        return self._pins.free >= self._limits.step_blocks


def _nixl_params(request: Request, ticket: dict[str, Any]) -> dict[str, Any]:
    """Wrap our ticket in the fields of the do_remote_decode / do_remote_prefill protocol.

    Routers pass the whole object on; some rewrite ``remote_host``, so the address that
    counts is inside the ticket.
    """
    # A buffer whose entries nobody fetches from this engine has no address to tell.
    host, _, port = str(ticket.get("at", ":0")).rpartition("@")[2].rpartition(":")
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": ticket["engine"],
        "remote_request_id": request.request_id,
        "remote_block_ids": [],
        "remote_host": host,
        "remote_port": int(port),
        "kvconnect": ticket,
    }
