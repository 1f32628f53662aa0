"""What an engine's halves count, on vLLM's own way from its workers and its scheduler to ``/metrics``.

Both halves fill a `Stats` that vLLM collects with each step, adds up over workers, and hands to
`PromMetrics` in the process that serves HTTP. `METRICS` is all that there is; labels take few
values, never the name of a peer or a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvconnect.connectors.timeline import Span

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvconnect.errors import KVConnectError

#: vLLM removes what begins so when a new engine starts in the same process.
PREFIX: Final = "vllm:kvconnect_"


@dataclass(frozen=True)
class Metric:
    """One family of time series.

    Args:
        name: without `PREFIX`, and without the ``_total`` that counters get.
        kind: what its values are; those of a histogram are seconds.
        labels: its own, beside vLLM's and ``connector``.
        help: what it says, for ``# HELP`` and the documentation.

    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


LOOKUPS = Metric(
    "lookups", "counter", ("outcome",), "Requests that looked for their KV: `hit`, or why it is computed here."
)
TRANSFERS = Metric("transfers", "counter", ("pipe",), "Loads that arrived, counted by each worker.")
BYTES = Metric("transferred_bytes", "counter", ("pipe",), "Bytes that these loads brought.")
FAILURES = Metric("load_failures", "counter", ("pipe", "cause"), "Loads that did not arrive, counted by each worker.")
SECONDS = Metric("phase_seconds", "histogram", ("phase", "pipe"), "How long a load spent in each of its phases.")
ENTRIES = Metric("entries", "counter", ("event",), "What became of prompts whose KV was lent or stored.")
LEASES = Metric(
    "leases", "gauge", (), "Entries that are lent, or on their way to a store, as of the engine's last step."
)
LENT = Metric("lent_blocks", "gauge", (), "KV-cache blocks that these entries hold, as of the same.")
METRICS: Final = (LOOKUPS, TRANSFERS, BYTES, FAILURES, SECONDS, ENTRIES, LEASES, LENT)

#: Values of ``event``: `SchedulerEnd.stats` and `Lending.counters` call them so.
OFFERED: Final = "offered"
ENDED: Final = ("released", "failed", "expired", "reclaimed", "replaced", "cleared", "stored", "not_stored")
EVENTS: Final = (OFFERED, "taken", *ENDED, "stale", "refused", "no_room", "not_offered")
#: Where no pipe was chosen yet.
NO_PIPE: Final = "none"

_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_KINDS: Final = {metric.name: metric.kind for metric in METRICS}
#: Between the values of labels, in the keys of `Stats.data`: msgpack's keys are strings.
_COMMA: Final = "|"


class Stats(KVConnectorStats):
    """Observations since the last `take`: ``data[name of metric][its labels]`` is a number, or a histogram's list."""

    data: dict[str, dict[str, Any]]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing was observed."""
        return not self.data

    def take(self) -> Stats:
        """Return what was observed, and start anew."""
        taken, self.data = Stats(self.data), {}
        return taken

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Count ``value`` more, set a gauge to it, or observe it."""
        series = self.data.setdefault(metric.name, {})
        key = _COMMA.join(label.replace(_COMMA, "/") for label in labels)
        if metric.kind == "histogram":
            series.setdefault(key, []).append(value)
        else:
            series[key] = value + (series.get(key, 0) if metric.kind == "counter" else 0)

    def add_spans(self, spans: Iterable[Span], pipe: str = NO_PIPE) -> None:
        """Observe how long phases took."""
        for span in spans:
            self.add(SECONDS, span.end - span.begin, span.phase, pipe)

    def aggregate(self, other: KVConnectorStats) -> Stats:
        """Add what another process, or a later interval, has observed."""
        for name, theirs in other.data.items():
            ours = self.data.setdefault(name, {})
            for key, value in theirs.items():
                if _KINDS.get(name) == "gauge":
                    ours[key] = value
                else:
                    ours[key] = ours[key] + value if key in ours else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Sum an interval up for the line that vLLM logs."""
        transfers, transferred = self._total(TRANSFERS), self._total(BYTES)
        times = [s for key, each in self._series(SECONDS).items() if key.startswith("transfer|") for s in each]
        hits = self._series(LOOKUPS).get("hit", 0)
        return {
            "Transfers": transfers,
            "MB": round(transferred / 1e6, 3),
            "Avg transfer ms": round(sum(times) / len(times) * 1e3, 3) if times else 0,
            "Max transfer ms": round(max(times, default=0) * 1e3, 3),
            "Failed transfers": self._total(FAILURES),
            "Hits": hits,
            "Misses": self._total(LOOKUPS) - hits,
            "Expired entries": self._series(ENTRIES).get("expired", 0),
        }

    def _series(self, metric: Metric) -> Mapping[str, Any]:
        return self.data.get(metric.name, {})

    def _total(self, metric: Metric) -> int:
        return sum(self._series(metric).values())


class PromMetrics(KVConnectorPromMetrics):
    """`METRICS` in Prometheus' registry, or in Ray's."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        connector: str,
    ) -> None:
        """Register them, with vLLM's labels and ``connector``: children of a MultiConnector share the families."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._connector = connector
        self._families = {metric.name: self._family(metric, [*labelnames, "connector"]) for metric in METRICS}
        for metric in METRICS:
            if not metric.labels:
                for engine_idx in per_engine_labelvalues:
                    self._child(metric.name, "", engine_idx)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record what one engine's `Stats` hold; its names and labels are those of another process."""
        for name, series in transfer_stats_data.items():
            for key, value in series.items():
                child = self._child(name, key, engine_idx)
                if _KINDS[name] == "counter":
                    child.inc(value)
                elif _KINDS[name] == "gauge":
                    child.set(value)
                else:
                    for each in value:
                        child.observe(each)

    def _child(self, name: str, key: str, engine_idx: int) -> Any:
        own = key.split(_COMMA) if key else ()
        return self._families[name].labels(*self.per_engine_labelvalues[engine_idx], self._connector, *own)

    def _family(self, metric: Metric, labels: list[str]) -> Any:
        name, labels = PREFIX + metric.name, [*labels, *metric.labels]
        try:
            family = self._new(metric.kind, name, metric.help, labels)
        except ValueError:
            # It is there already, if another connector of this engine, in a MultiConnector, has made it.
            if name not in _made:
                raise
            family = _made[name]
        _made[name] = family
        return family

    def _new(self, kind: str, name: str, text: str, labels: list[str]) -> Any:
        common = {"name": name, "documentation": text, "labelnames": labels}
        if kind == "counter":
            return self._counter_cls(**common)
        if kind == "gauge":
            return self._gauge_cls(**common, multiprocess_mode="mostrecent")
        return self._histogram_cls(**common, buckets=_BUCKETS)


#: Families by name, as of their last registration in this process.
_made: dict[str, Any] = {}


def events(counts: Mapping[str, int]) -> dict[str, int]:
    """Return those of a buffer's counters that are `EVENTS`; reasons why something was not stored are one."""
    found = {name: counts[name] for name in EVENTS if name in counts}
    lost = sum(count for name, count in counts.items() if name.startswith("not_stored_"))
    return {**found, "not_stored": lost} if lost else found


def cause_of(error: KVConnectError) -> str:
    """Name the kind of an error in one word of few: what is behind it, if it only passes that on."""
    from kvconnect import errors

    behind = error.__cause__
    root = behind if type(error) is errors.LoadError and isinstance(behind, errors.KVConnectError) else error
    # A class from elsewhere counts as its nearest base of ours, so that there are only so many.
    ours = next(cls for cls in type(root).__mro__ if cls.__module__ == errors.__name__)
    return ours.__name__.removesuffix("Error").lower()
