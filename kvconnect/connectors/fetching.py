"""The consumer's half of the scheduler: which requests fetch their KV, and into which blocks.

A request goes through LOOKING → LOADING → OVER. Only a request that is LOOKING is
ever answered with tokens, so a failed load, a preemption or a second look computes
locally.
"""

from __future__ import annotations

import enum
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvconnect.buffers.base import Claim, Want
from kvconnect.connectors import metrics, timeline, tracing
from kvconnect.connectors.compat import NULL_BLOCK
from kvconnect.connectors.groups import Group, segment_tokens, usable_tokens
from kvconnect.connectors.headroom import Headroom
from kvconnect.connectors.identity import keys_of, shared_label
from kvconnect.connectors.metrics import Stats
from kvconnect.connectors.plan import Blocks, Load

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvconnect.buffers.base import SchedulerEnd

log = logging.getLogger(__name__)


class _Phase(enum.Enum):
    LOOKING = enum.auto()
    LOADING = enum.auto()
    OVER = enum.auto()


@dataclass
class _Fetch:
    """What is known about one request."""

    phase: _Phase
    claim: Claim | None = None
    local_tokens: int = 0
    ended: bool = False
    times: dict[str, float] = field(default_factory=lambda: timeline.now(timeline.SEEN))
    trace: tracing.LoadTrace | None = None

    @property
    def carrier(self) -> tracing.Carrier:
        """What carries its trace to the workers."""
        return {} if self.trace is None else self.trace.carrier


class Fetching:
    """Follows the requests whose KV may be elsewhere. Engine thread only.

    Args:
        end: the buffer.
        namespace: of all keys of this engine.
        groups: the KV-cache groups that take part.
        content_lookup: also look for requests that carry no ticket.
        capacity: the most blocks that loads under way may hold (`Headroom`).

    """

    def __init__(
        self,
        end: SchedulerEnd,
        namespace: str,
        groups: Sequence[Group],
        *,
        content_lookup: bool,
        capacity: int | None = None,
    ) -> None:
        self._end = end
        self._namespace = namespace
        self._groups = groups
        self._content_lookup = content_lookup
        self._segment = segment_tokens(groups, end.segment_tokens)
        self.headroom = Headroom(groups, capacity)
        self._fetches: dict[str, _Fetch] = {}
        self._loads: list[Load] = []
        self.counters: Counter[str] = Counter()
        self.stats = Stats()

    def arrived(self, request: Request) -> None:
        """Start looking as soon as a request is known: it may wait in the queue longer than a lease."""
        if request.request_id in self._fetches:
            return
        fetch = _Fetch(_Phase.LOOKING)
        want = self._want(request)
        if want is None:
            fetch.phase = _Phase.OVER
        else:
            fetch.trace = tracing.begin(request.trace_headers, request.request_id, fetch.times[timeline.SEEN])
            self._end.look(request.request_id, want)
        self._fetches[request.request_id] = fetch

    def external_tokens(self, request: Request, local_tokens: int) -> int | None:
        """Return how many tokens beyond ``local_tokens`` can be fetched; ``None`` to be asked again."""
        self.arrived(request)
        fetch = self._fetches[request.request_id]
        if fetch.phase is not _Phase.LOOKING:
            return 0
        found = self._end.found(request.request_id)
        if found is None:
            return None
        self._answered(fetch)
        if not isinstance(found, Claim):
            self.counters[f"miss_{found.cause}"] += 1
            log.debug("%s computes locally: %s (%s)", request.request_id, found.cause, found.detail)
            return self._give_up(request.request_id, fetch, found.cause)
        if not self._covers(found):
            self.counters["miss_window"] += 1
            return self._give_up(request.request_id, fetch, "window")
        if not self.headroom.admits(request.request_id, found.key.length):
            return None
        fetch.claim, fetch.local_tokens = found, local_tokens
        fetch.times |= timeline.now(timeline.CLAIMED)
        return max(0, usable_tokens(self._groups, found.key.length) - local_tokens)

    def allocated(self, request: Request, table: Sequence[Sequence[int]], tokens: int) -> None:
        """Blocks were given to a request; ``tokens`` of them are to be fetched (0: none after all)."""
        fetch = self._fetches.get(request.request_id)
        if fetch is None or fetch.phase is not _Phase.LOOKING:
            return
        claim = fetch.claim
        if tokens == 0 or claim is None:
            # Our own prefix cache (or another connector) has it all: the entry has served its purpose.
            self._end.settle(request.request_id)
            self._over(request.request_id, fetch, "not_needed")
            return
        answer = self._end.commit(request.request_id)
        remote, local = self._pair(claim, table, fetch.local_tokens, tokens)
        refused = ""
        if not isinstance(answer, Claim):
            # vLLM waits for this load by now, so it must end as one.
            self.counters[f"miss_{answer.cause}"] += 1
            refused = f"the claim has ended: {answer.cause} ({answer.detail})"
        elif any(NULL_BLOCK in ids for ids in remote):
            refused = "the owner no longer has every block that this engine allocated"
        self._loads.append(Load(request.request_id, claim, remote, local, tokens, refused, fetch.times, fetch.carrier))
        self.stats.add(metrics.LOOKUPS, 1, "hit" if isinstance(answer, Claim) else answer.cause)
        fetch.phase = _Phase.LOADING
        self.headroom.started(request.request_id, claim.key.length)
        self.counters["loads"] += 1
        self.counters["tokens"] += tokens

    def take_loads(self) -> tuple[Load, ...]:
        """Return the loads to start in this step."""
        loads, self._loads = self._loads, []
        planned = timeline.now(timeline.PLANNED)
        plan = tuple(replace(load, times={**load.times, **planned}) for load in loads)
        for load in plan:
            self._observe("admit", load.times, load.trace)
        return plan

    def loaded(self, request_ids: Iterable[str], failed: Collection[str] | None = None) -> None:
        """The workers are done with these loads, well or not. Unknown ids are another connector's.

        ``failed`` are those that did not arrive, if that is known here: the request's trace says so.
        """
        for request_id in request_ids:
            fetch = self._fetches.get(request_id)
            if fetch is None or fetch.phase is not _Phase.LOADING:
                continue
            self._end.settle(request_id)
            outcome = "failed" if request_id in (failed or ()) else "loaded"
            self._over(request_id, fetch, "over" if failed is None else outcome)
            if fetch.ended:
                del self._fetches[request_id]

    def finished(self, request_id: str) -> None:
        """A request ended. If it was loading, vLLM holds its blocks until the workers are done, and so do we."""
        fetch = self._fetches.get(request_id)
        if fetch is None:
            return
        if fetch.phase is _Phase.LOADING:
            fetch.ended = True
            return
        self._give_up(request_id, fetch, "aborted")
        del self._fetches[request_id]

    def _want(self, request: Request) -> Want | None:
        """Return what to look for, or ``None`` if this request always computes locally."""
        params = request.kv_transfer_params or {}
        if (
            params.get("do_remote_decode")
            or request.pooling_params is not None
            or getattr(request, "resumable", False)
            # prompt_logprobs and the like need every prompt token computed here
            or getattr(request, "skip_reading_prefix_cache", False)
        ):
            return None
        ticket = params.get("kvconnect") if params.get("do_remote_prefill") else None
        if ticket is None and not self._content_lookup:
            return None
        keys = keys_of(request, self._namespace, self._segment)
        if not keys:
            return None
        label = shared_label(request.request_id)
        return Want(keys[-1], label, ticket if isinstance(ticket, dict) else None, keys[:-1])

    def _covers(self, claim: Claim) -> bool:
        """Whether the owner still has every block that decoding here will read."""
        if len(claim.blocks) != len(self._groups):
            return False
        for group, ids in zip(self._groups, claim.blocks, strict=True):
            needed = group.needed(usable_tokens(self._groups, claim.key.length))
            if len(ids) < needed.stop or any(ids[i] == NULL_BLOCK for i in needed):
                return False
        return True

    def _pair(
        self, claim: Claim, table: Sequence[Sequence[int]], local_tokens: int, tokens: int
    ) -> tuple[Blocks, Blocks]:
        """Pair the owner's blocks with ours, position by position, for the tokens to fetch.

        Positions that hold our null block (outside a sliding window) are not read by us.
        """
        remote: list[tuple[int, ...]] = []
        local: list[tuple[int, ...]] = []
        for group, theirs in zip(self._groups, claim.blocks, strict=True):
            ours = table[group.index]
            first, last = local_tokens // group.block_size, -(-(local_tokens + tokens) // group.block_size)
            wanted = [i for i in range(first, last) if ours[i] != NULL_BLOCK]
            remote.append(tuple(theirs[i] for i in wanted))
            local.append(tuple(ours[i] for i in wanted))
        return tuple(remote), tuple(local)

    def _give_up(self, request_id: str, fetch: _Fetch, why: str) -> int:
        """Compute locally; give back what was claimed."""
        if fetch.phase is _Phase.LOOKING:
            self._answered(fetch)
            self._end.abandon(request_id)
        self._over(request_id, fetch, why)
        return 0

    def _over(self, request_id: str, fetch: _Fetch, outcome: str) -> None:
        """The request has what it will get from elsewhere."""
        self.headroom.ended(request_id)
        if fetch.phase is _Phase.LOOKING:
            self.stats.add(metrics.LOOKUPS, 1, outcome)
        if fetch.phase is not _Phase.OVER and fetch.trace is not None:
            fetch.trace.end(outcome)
        fetch.phase = _Phase.OVER

    def _answered(self, fetch: _Fetch) -> None:
        """The look-up is over; what else happens before the load is another phase."""
        if timeline.FOUND not in fetch.times:
            fetch.times |= timeline.now(timeline.FOUND)
            self._observe("lookup", fetch.times, fetch.carrier)

    def _observe(self, phase: str, times: timeline.Times, trace: tracing.Carrier) -> None:
        spans = list(timeline.spans({phase: timeline.ADMISSION[phase]}, times))
        self.stats.add_spans(spans)
        tracing.record(trace, spans)
