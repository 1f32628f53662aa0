"""vLLM's KV events of what a store has: blocks that are there for every prompt that begins with them.

These are a prompt's segments. What is found by one very prompt only is not announced, since a block's hash says
nothing of what comes after it: the end of a prompt behind its last segment, and prompts that are not cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvconnect.connectors import compat
from kvconnect.connectors.groups import Group, segment_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvconnect.buffers.base import LookupKey, SchedulerEnd
    from kvconnect.connectors.setup import Engine

#: vLLM's own word since 0.27. Routers take a word that they do not know for GPU memory, or drop the event.
MEDIUM: Final = "STORAGE"


@dataclass(eq=False)
class _Segment:
    """What there is to tell of a segment: hashes of its blocks by group, and its events until they are published."""

    key: LookupKey
    #: The segment before it, without which nobody finds it.
    before: LookupKey | None
    hashes: list[tuple[int, list[bytes | int]]]
    stored: list[Any]


class Announcements:
    """Describes what is offered, and turns a buffer's news into KV events. Engine thread only.

    Args:
        end: the buffer.
        groups: the KV-cache groups that take part.
        segment: tokens of a segment.
        store: names the store, beside `MEDIUM`, for whoever tells several apart.

    """

    def __init__(self, end: SchedulerEnd, groups: Sequence[Group], segment: int, store: str) -> None:
        self._end, self._groups, self._segment, self._store = end, groups, segment, store
        self._hash_block_size = 0
        self._announced: set[LookupKey] = set()
        #: Segments that are there, by the one before them, which is not: several are written at a time.
        self._waiting: dict[LookupKey | None, list[_Segment]] = {}

    def bind(self, hash_block_size: int) -> None:
        """Learn how many tokens apart vLLM's block hashes lie; nothing is offered before."""
        self._hash_block_size = hash_block_size

    def notes(self, request: Request, keys: Sequence[LookupKey]) -> dict[LookupKey, Any]:
        """Describe those of a prompt's ``keys`` that are of a whole segment, for `SchedulerEnd.offer`."""
        whole = [key for key in keys if key.length % self._segment == 0]
        return {key: self._describe(request, key, before) for key, before in zip(whole, [None, *whole], strict=False)}

    def take(self) -> list[Any]:
        """Return what has happened since the last call; what a prompt begins with comes first."""
        events: list[Any] = []
        for segment, there in self._end.news():
            events += self._come(segment) if there else self._gone(segment)
        return events

    def _come(self, segment: _Segment) -> list[Any]:
        if segment.before is not None and segment.before not in self._announced:
            self._waiting.setdefault(segment.before, []).append(segment)
            return []
        events, due = [], deque([segment])
        while due:
            each = due.popleft()
            self._announced.add(each.key)
            events += each.stored
            each.stored = []
            due.extend(self._waiting.pop(each.key, ()))
        return events

    def _gone(self, segment: _Segment) -> list[Any]:
        if segment.key not in self._announced:
            waiting = self._waiting.pop(segment.before)
            if others := [each for each in waiting if each is not segment]:
                self._waiting[segment.before] = others
            return []
        self._announced.discard(segment.key)
        return [self._event("BlockRemoved", group, block_hashes=hashes) for group, hashes in segment.hashes]

    def _describe(self, request: Request, key: LookupKey, before: LookupKey | None) -> _Segment:
        segment, end, lora = _Segment(key, before, [], []), key.length, request.lora_request
        for group in self._groups:
            tokens = range(end - self._segment, end, group.block_size)
            first, stop = tokens.start // group.block_size, end // group.block_size
            hashes = compat.block_hashes(request, self._hash_block_size, group.block_size)
            own = [compat.published_hash(hashes[block]) for block in range(first, stop)]
            stored = self._event(
                "BlockStored",
                group.index,
                block_hashes=own,
                parent_block_hash=compat.published_hash(hashes[first - 1]) if first else None,
                token_ids=request.all_token_ids[tokens.start : end],
                block_size=group.block_size,
                lora_id=None if lora is None else lora.adapter_id,
                lora_name=None if lora is None else lora.lora_name,
                extra_keys=compat.published_extra_keys(request, tokens),
                kv_cache_spec_kind=group.kind,
            )
            segment.hashes.append((group.index, own))
            segment.stored.append(stored)
        return segment

    def _event(self, name: compat.KVEvent, group: int, **fields: Any) -> Any:
        return compat.kv_event(name, medium=MEDIUM, ownership=self._store, group_idx=group, **fields)


def announcements(engine: Engine, end: SchedulerEnd) -> Announcements | None:
    """Return what announces, if vLLM publishes KV events and the buffer has anything that they could tell of."""
    segment = segment_tokens(engine.groups, end.segment_tokens)
    if not (engine.kv_events and end.tells_news and segment):
        return None
    return Announcements(end, engine.groups, segment, f"kvconnect.{engine.config.buffer.name}")
