"""The connector's half in each worker process: it moves what the plan says and reports back.

Hooks run on the worker's main thread between forward and sampling, so they only
start transfers and collect results; the moving happens in the buffer's threads.
Where there is neither, in a step of an engine that has nothing to do but wait for
loads, they wait for one: vLLM would sleep for a millisecond and look again, twice.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvconnect.connectors import compat, geometry, metrics, timeline, tracing
from kvconnect.connectors.fence import Fence
from kvconnect.connectors.metrics import Stats
from kvconnect.connectors.plan import Load, Plan, WorkerNews
from kvconnect.connectors.timeline import Times
from kvconnect.errors import KVConnectError, named

if TYPE_CHECKING:
    import torch

    from kvconnect.buffers.base import WorkerEnd
    from kvconnect.connectors.setup import Engine
    from kvconnect.pipes.base import Transfer

log = logging.getLogger(__name__)

#: The longest wait of a step that computes nothing; new requests and aborts wait behind it.
_PATIENCE_S = 2e-3


@dataclass(frozen=True)
class _Result:
    """How a load ended: ``error`` is ``None`` if it arrived, and then there is a ``transfer``."""

    load: Load
    error: KVConnectError | None
    times: Times
    transfer: Transfer | None = None


class WorkerHalf:
    """Runs the loads of one worker and reports each exactly once."""

    def __init__(self, engine: Engine, rank: int) -> None:
        self._engine = engine
        self._rank = rank
        self._end: WorkerEnd | None = None
        self._fence: Fence | None = None
        self._changed = threading.Condition()
        self._running = 0
        self._over: list[_Result] = []
        self._bad_blocks: set[int] = set()
        self._by_request = compat.reports_failed_requests()
        self._stats = Stats()
        self._level = logging.INFO if engine.config.log_transfers else logging.DEBUG

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """``register_kv_caches``: describe the memory and open this worker's end of the buffer."""
        if self._engine.refusal:
            return
        memory = geometry.paged_memory(caches, self._engine.groups, self._engine.num_blocks)
        self._end = self._engine.buffer.worker_end(self._engine.settings, self._rank, memory)
        if memory.device.startswith("cuda") and not compat.defers_freed_blocks():
            self._fence = Fence(memory.device)

    def start(self, plan: Plan) -> None:
        """``start_load_kv``: start this step's loads. Works before and after the forward alike."""
        with self._changed:
            self._running += len(plan.loads)
        for load in plan.loads:
            if self._fence is None:
                self._start(load)
            else:
                self._fence.then(functools.partial(self._start, load))

    def take_results(self, plan: Plan) -> tuple[set[str], set[str]]:
        """Return the requests whose load is over since the last call, and those of them that failed."""
        with self._changed:
            if plan.patient:
                self._changed.wait_for(lambda: self._over or not self._running, _PATIENCE_S)
            over, self._over = self._over, []
        failed = [result.load for result in over if result.error is not None]
        if not self._by_request:
            self._bad_blocks |= {b for load in failed for ids in load.local for b in ids}
        for result in over:
            self._report(result)
        return {result.load.request_id for result in over}, {load.request_id for load in failed}

    def take_bad_blocks(self) -> set[int]:
        """``get_block_ids_with_load_errors``: only where vLLM cannot take failures by request."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def news(self, plan: Plan) -> WorkerNews | None:
        """``build_connector_worker_meta``: introduce this worker if the scheduler asked."""
        if not plan.introduce or self._end is None:
            return None
        return WorkerNews({self._rank: self._end.describe()})

    def stats(self) -> Stats | None:
        """``get_kv_connector_stats``: what was observed since the last call."""
        quiet = self._stats.is_empty() and compat.asks_scheduler_for_stats()
        return None if quiet else self._stats.take()

    def close(self) -> None:
        """``shutdown``."""
        if self._fence is not None:
            self._fence.close()
        if self._end is not None:
            self._end.close()

    def _start(self, load: Load) -> None:
        if load.refused or self._end is None:
            why = KVConnectError(load.refused or "this worker has no registered KV caches")
            self._finish(_Result(load, why, load.times))
            return
        begun = {**load.times, **timeline.now(timeline.BEGUN)}

        def over(transfer: Transfer) -> None:
            times = timeline.moved({**begun, **transfer.phases}, failed=transfer.error is not None)
            self._finish(_Result(load, transfer.error, times, transfer))

        try:
            self._end.read(load.claim, load.remote, load.local, over)
        except KVConnectError as error:
            self._finish(_Result(load, error, begun))

    def _finish(self, result: _Result) -> None:
        load, error = result.load, result.error
        if error is not None:
            log.warning("could not load the KV of %s: %s", load.request_id, named(error))
        with self._changed:
            self._running -= 1
            self._over.append(result)
            self._changed.notify()

    def _report(self, result: _Result) -> None:
        """Tell whoever observes how a load went: metrics, its trace, the log."""
        load, transfer, error = result.load, result.transfer, result.error
        pipe = (transfer.via if transfer is not None else "") or metrics.NO_PIPE
        # What failed has no phase after that in which it did.
        times = {**result.times, **(timeline.now(timeline.REPORTED) if error is None else {})}
        spans = list(timeline.spans(timeline.MOVE, times))
        self._stats.add_spans(spans, pipe)
        nbytes = transfer.nbytes if transfer is not None else 0
        if error is None:
            self._stats.add(metrics.TRANSFERS, 1, pipe)
            self._stats.add(metrics.BYTES, nbytes, pipe)
        else:
            self._stats.add(metrics.FAILURES, 1, pipe, "refused" if load.refused else metrics.cause_of(error))
        facts: dict[str, str | int] = {"kvconnect.rank": self._rank, "kvconnect.pipe": pipe, "kvconnect.bytes": nbytes}
        tracing.record(load.trace, spans, facts, error="" if error is None else named(error))
        if transfer is not None and error is None and log.isEnabledFor(self._level):
            self._log(load, transfer, times)

    def _log(self, load: Load, transfer: Transfer, times: Times) -> None:
        """Write what a load brought and where its time went: one JSON object in one line.

        ``ms`` from begun to confirmed, ``seen`` in seconds of the host's monotonic clock,
        ``at_ms`` the end of each phase after that (`kvconnect.connectors.timeline`).
        """
        facts = {
            "request": load.request_id,
            "tokens": load.tokens,
            "bytes": transfer.nbytes,
            "ms": round((times[timeline.CONFIRMED] - times[timeline.BEGUN]) * 1e3, 3),
            "rank": self._rank,
            "pipe": transfer.via,
            "peer": str(load.claim.data.get("at", "")),
            "seen": times.get(timeline.SEEN),
            "at_ms": timeline.since_seen(times),
        }
        log.log(self._level, "kvconnect.load %s", json.dumps(facts))
