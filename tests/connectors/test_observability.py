"""What `/metrics` and a request's trace tell, over two of vLLM's own schedulers and its own way to both."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

import msgspec
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from bench.report import ROOT
from kvconnect import _plugin, errors, registry
from kvconnect.connectors import compat, metrics, timeline, tracing
from kvconnect.connectors.metrics import Stats
from kvconnect.connectors.named import KvConnectFilesystem, KvConnectTcp
from kvconnect.connectors.plan import Plan
from kvconnect.connectors.protocol import ASK_FOR_TICKET
from kvconnect.pipes.base import Transfer
from kvconnect.testing.engine import SHAPES, Engine, describe_model
from kvconnect.testing.faults import Cut, Delay, Fault, faulty
from tests import dashboard
from tests.buffers.engines import eventually

#: Of the phase that is made slow; a busy machine makes others slow, too, but not so slow.
DELAY_S = 0.6
LEASE_S = 3.0
_prompts = itertools.count()


class Observed:
    """A producer and a consumer, with what is to be seen of them from outside."""

    def __init__(self, model: str) -> None:
        _plugin.register()
        self.fault: Fault | None = None
        extra = {"group": "test-observability", "lease_s": LEASE_S}
        engines = []
        for seed, role in enumerate(("kv_producer", "kv_consumer")):
            transfer = {"kv_connector": "KvConnectTcp", "kv_role": role, "kv_connector_extra_config": extra}
            transfer["kv_load_failure_policy"] = "recompute"
            engines.append(Engine(model, transfer, SHAPES["blocks first"], seed))
        self.p, self.d = engines
        self.register()

    def register(self) -> None:
        """Begin with metrics that nobody has told anything."""
        unregister_vllm_metrics()
        labels = {index: ["demo", str(index)] for index in range(2)}
        self.prom = KVConnectorProm(self.d.config, ["model_name", "engine"], labels)

    def prompt(self) -> list[int]:
        """Return a prompt that no engine has seen."""
        return [1000 + next(_prompts), *range(10, 110)]

    def ticket(self, prompt: list[int]) -> dict[str, Any]:
        """Prefill and return what names the KV."""
        answer, _ = self.p.ask(f"p{prompt[0]}", prompt, dict(ASK_FOR_TICKET), max_tokens=1)
        params: dict[str, Any] = answer.kv_transfer_params
        return params

    def scrape(self) -> dict[str, float]:
        """Return what `/metrics` says: values by name and labels; what engines tell crosses processes on its way."""
        for index, engine in enumerate((self.p, self.d)):
            for told in engine.stats:
                self.prom.observe(msgspec.msgpack.decode(msgspec.msgpack.encode(told)), index)
            engine.stats.clear()
        lines = [line.rpartition(" ") for line in generate_latest(REGISTRY).decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines if name.startswith(metrics.PREFIX)}

    def during(self, act: Callable[[], object]) -> dict[str, float]:
        """Return what `/metrics` says more after ``act``."""
        before = self.scrape()
        act()
        after = self.scrape()
        return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with pytest.MonkeyPatch.context() as patch:
        real, fault = registry.pipe, Delay(DELAY_S, times=0)
        patch.setattr(registry, "pipe", lambda name: faulty(real(name), fault))
        both = Observed(describe_model(tmp_path_factory.mktemp("model")))
        both.fault = fault
        # Once, so that a first meeting is no part of what is measured.
        prompt = both.prompt()
        both.d.ask("first", prompt, both.ticket(prompt))
        both.scrape()
        yield both
        both.p.close()
        both.d.close()
        unregister_vllm_metrics()


@pytest.fixture(scope="session")
def exporter() -> InMemorySpanExporter:
    """Where the spans of this process go from now on; only traced requests have any."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


_traces = itertools.count(0xABC)


def traced(exporter: InMemorySpanExporter) -> tuple[dict[str, str], Callable[[], dict[str, ReadableSpan]]]:
    """Return the headers of a client that traces, and what gives the spans of its trace by name."""
    trace_id, parent = next(_traces), 0xDEF

    def spans() -> dict[str, ReadableSpan]:
        own = [span for span in exporter.get_finished_spans() if span.context.trace_id == trace_id]
        (load,) = [span for span in own if span.name == "kvconnect.load"]
        assert load.parent is not None
        assert load.parent.span_id == parent
        phases = [span for span in own if span is not load]
        assert {span.parent.span_id for span in phases if span.parent} == {load.context.span_id}
        return {span.name.removeprefix("kvconnect.load").lstrip("."): span for span in own}

    return {"traceparent": f"00-{trace_id:032x}-{parent:016x}-01"}, spans


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


# -- one slow request ------------------------------------------------------------------------


def later(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` with the delay before it."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        threading.Event().wait(DELAY_S)
        return call(*args, **kwargs)

    return slow


def slow_lookup(both: Observed, patch: pytest.MonkeyPatch) -> None:
    handlers = both.p.scheduler.connector._scheduler._end._lender._server._handlers
    patch.setitem(handlers, "match", later(handlers["match"]))


def slow_admit(both: Observed, patch: pytest.MonkeyPatch) -> None:
    """All blocks of the consumer are in use."""
    pool, step = both.d.scheduler.kv_cache_manager.block_pool, both.d.step
    held = pool.get_new_blocks(pool.get_num_free_blocks())
    until = time.monotonic() + DELAY_S

    def stepping() -> Any:
        if held and time.monotonic() > until:
            pool.free_blocks(held)
            held.clear()
        return step()

    patch.setattr(both.d, "step", stepping)


def slow_dispatch(both: Observed, patch: pytest.MonkeyPatch) -> None:
    start = both.d.worker._worker.start

    def starting(plan: Plan) -> None:
        (later(start) if plan.loads else start)(plan)

    patch.setattr(both.d.worker._worker, "start", starting)


def slow_open(both: Observed, patch: pytest.MonkeyPatch) -> None:
    end = both.d.worker._worker._end
    patch.setattr(end, "read", later(end.read))


def slow_transfer(both: Observed, patch: pytest.MonkeyPatch) -> None:
    assert both.fault is not None
    patch.setattr(both.fault, "times", 1)


def slow_release(both: Observed, patch: pytest.MonkeyPatch) -> None:
    """The owner is long in vouching for what was read."""
    handlers = both.p.scheduler.connector._scheduler._end._lender._server._handlers
    for op in ("claim", "release"):
        patch.setitem(handlers, op, later(handlers[op]))


def slow_report(both: Observed, patch: pytest.MonkeyPatch) -> None:
    """The load is over, and vLLM does not ask."""
    half = both.d.worker._worker
    take = half.take_results

    def taking(plan: Plan) -> Any:
        with half._changed:
            half._changed.wait_for(lambda: half._over or not half._running, 10)
        return (later(take) if half._over else take)(plan)

    patch.setattr(half, "take_results", taking)


SLOW = {name.removeprefix("slow_"): make for name, make in list(globals().items()) if name.startswith("slow_")}


def test_every_phase_is_made_slow_once() -> None:
    assert list(SLOW) == [*timeline.ADMISSION, *timeline.MOVE]


@pytest.mark.parametrize("phase", SLOW)
def test_metrics_and_the_trace_tell_which_phase_of_a_request_was_slow(
    observed: Observed, exporter: InMemorySpanExporter, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = observed.prompt()
    params = None if phase == "lookup" else observed.ticket(prompt)
    if phase == "lookup":
        observed.p.ask(f"p{prompt[0]}", prompt, max_tokens=1)
    headers, spans = traced(exporter)
    observed.scrape()
    SLOW[phase](observed, monkeypatch)
    more = observed.during(lambda: observed.d.ask(f"d{prompt[0]}", prompt, params, trace=headers))

    took = {name: value for name, value in more.items() if name.startswith(metrics.PREFIX + "phase_seconds_sum")}
    slowest = max(took, key=lambda name: took[name])
    assert f'phase="{phase}"' in slowest, took
    assert took[slowest] > 0.9 * DELAY_S

    found = spans()
    load = found.pop("")
    assert set(found) == set(SLOW)
    assert max(found, key=lambda name: seconds(found[name])) == phase
    assert seconds(load) > 0.9 * DELAY_S
    assert load.attributes is not None
    assert load.attributes["gen_ai.request.id"] == f"d{prompt[0]}"
    assert load.attributes["kvconnect.outcome"] in {"loaded", "over"}  # before 0.30 nobody knows
    assert found["transfer"].attributes is not None
    assert found["transfer"].attributes["kvconnect.pipe"] == "tcp"


# -- what is counted -----------------------------------------------------------------------------


def named(name: str, engine: int, **labels: str) -> str:
    inner = {"connector": "KvConnectTcp", "engine": str(engine), "model_name": "demo", **labels}
    pairs = ",".join(f'{key}="{value}"' for key, value in sorted(inner.items()))
    return f"{metrics.PREFIX}{name}{{{pairs}}}"


def test_a_load_is_counted_with_its_bytes_and_its_pipe(observed: Observed) -> None:
    prompt = observed.prompt()
    params = observed.ticket(prompt)
    more = observed.during(lambda: observed.d.ask("request-7f3a", prompt, params))
    assert more[named("transfers_total", 1, pipe="tcp")] == 1
    assert more[named("transferred_bytes_total", 1, pipe="tcp")] > 0
    assert more[named("lookups_total", 1, outcome="hit")] == 1
    text = generate_latest(REGISTRY).decode()
    for secret in ("request-7f3a", params["kvconnect"]["engine"], params["kvconnect"]["at"]):
        assert secret not in text


def test_a_request_without_a_trace_has_no_spans(observed: Observed, exporter: InMemorySpanExporter) -> None:
    before = len(exporter.get_finished_spans())
    prompt = observed.prompt()
    observed.d.ask("untraced", prompt, observed.ticket(prompt))
    assert len(exporter.get_finished_spans()) == before


def test_a_trace_that_is_not_sampled_has_no_spans(observed: Observed, exporter: InMemorySpanExporter) -> None:
    before = len(exporter.get_finished_spans())
    prompt = observed.prompt()
    headers = {"traceparent": f"00-{7:032x}-{7:016x}-00"}
    observed.d.ask("unsampled", prompt, observed.ticket(prompt), trace=headers)
    assert len(exporter.get_finished_spans()) == before


def test_a_miss_is_counted_by_its_cause_and_ends_its_span(observed: Observed, exporter: InMemorySpanExporter) -> None:
    headers, spans = traced(exporter)
    more = observed.during(lambda: observed.d.ask("missed", observed.prompt(), trace=headers))
    assert more[named("lookups_total", 1, outcome="absent")] == 1
    found = spans()
    assert set(found) == {"", "lookup"}
    assert found[""].attributes is not None
    assert found[""].attributes["kvconnect.outcome"] == "absent"


def test_a_failure_is_counted_by_its_cause_and_marked_where_it_happened(
    observed: Observed, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = observed.prompt()
    params, (headers, spans) = observed.ticket(prompt), traced(exporter)
    cut = Cut(times=9)
    monkeypatch.setattr(observed.fault, "transfer", cut.transfer)
    monkeypatch.setattr(observed.fault, "times", 9)
    more = observed.during(lambda: observed.d.ask("failed", prompt, params, trace=headers))
    assert more[named("load_failures_total", 1, pipe="tcp", cause="broken")] == 1
    assert named("transfers_total", 1, pipe="tcp") not in more
    found = spans()
    failed = [name for name, span in found.items() if span.status.status_code is StatusCode.ERROR]
    assert failed == ["transfer"]
    assert "release" not in found
    assert found[""].attributes is not None
    assert found[""].attributes["kvconnect.outcome"] in {"failed", "over"}


def test_a_load_that_its_owner_does_not_vouch_for_failed_in_its_release(
    observed: Observed, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = observed.prompt()
    params, (headers, spans) = observed.ticket(prompt), traced(exporter)

    def read(*given: Any) -> Transfer:
        transfer = Transfer(8)
        transfer.via = "tcp"
        transfer.phases |= timeline.now(timeline.LAUNCHED, timeline.MOVED)
        transfer.add_done_callback(given[-1])
        transfer.finish(errors.StaleError("the lease had ended"))
        return transfer

    monkeypatch.setattr(observed.d.worker._worker._end, "read", read)
    more = observed.during(lambda: observed.d.ask("stale", prompt, params, trace=headers))
    assert more[named("load_failures_total", 1, pipe="tcp", cause="stale")] == 1
    found = spans()
    assert [name for name, span in found.items() if span.status.status_code is StatusCode.ERROR] == ["release"]
    assert "report" not in found


def test_an_idle_producer_takes_one_more_step_so_that_metrics_hear_how_the_last_entry_ended(observed: Observed) -> None:
    connector = observed.p.scheduler.connector

    def idle() -> None:
        while connector.has_pending_push_work():
            observed.p.step()

    def hand_over() -> None:
        """No step of the producer's comes after the last release."""
        prompt = observed.prompt()
        observed.d.ask(f"d{prompt[0]}", prompt, observed.ticket(prompt))
        eventually(lambda: connector._scheduler._end.lent_blocks() == 0)

    idle()
    hand_over()
    more = observed.during(idle)
    assert more[named("entries_total", 0, event="taken")] == 1
    assert observed.scrape()[named("leases", 0)] == 0
    hand_over()
    # Where metrics are off, nobody asks: one step, not one after the other.
    assert [connector.has_pending_push_work() for _ in range(3)] == [True, False, False]


def test_an_entry_that_nobody_takes_is_a_lease_until_it_has_expired(observed: Observed) -> None:
    leases, lent = named("leases", 0), named("lent_blocks", 0)

    def until_none() -> None:
        deadline = time.monotonic() + 10 * LEASE_S
        while observed.scrape()[leases] > 0:
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
            observed.p.scheduler.connector.has_pending_push_work()
            observed.p.step()

    observed.p.scheduler.connector.reset_cache()  # of other tests' entries
    observed.p.step()
    until_none()
    observed.ticket(observed.prompt())
    held = observed.scrape()
    assert held[leases] == 1
    assert held[lent] == observed.p.scheduler.connector._scheduler._end.lent_blocks() > 0
    assert observed.during(until_none)[named("entries_total", 0, event="expired")] == 1
    assert observed.scrape()[lent] == 0


# -- on the way to vLLM -----------------------------------------------------------------------------


def filled(seconds: float) -> Stats:
    stats = Stats()
    stats.add(metrics.TRANSFERS, 1, "tcp")
    stats.add(metrics.BYTES, 1000, "tcp")
    stats.add(metrics.LEASES, seconds)
    stats.add_spans([timeline.Span("transfer", 1.0, 1.0 + seconds)], "tcp")
    return stats


def test_intervals_and_workers_add_up_and_gauges_are_the_latest() -> None:
    first, second = filled(0.5), filled(1.0)
    told = first.data
    both = KvConnectTcp.build_kv_connector_stats(told).aggregate(second)
    assert both.data["transfers"] == {"tcp": 2}
    assert both.data["phase_seconds"] == {"transfer|tcp": [0.5, 1.0]}
    assert both.data["leases"] == {"": 1.0}
    assert told == filled(0.5).data  # others that hear of it have it as it was
    assert both.reduce()["Transfers"] == 2
    assert both.reduce()["Max transfer ms"] == 1000


def test_vllms_own_line_sums_an_interval_up(observed: Observed) -> None:
    lines: list[str] = []
    logging = KVConnectorLogging(observed.d.config.kv_transfer_config)
    logging.observe(filled(0.5).data)
    logging.log(lambda text, *args: lines.append(text % args))
    assert "Transfers=1, MB=0.001, Avg transfer ms=500.0" in lines[0]


def test_what_is_taken_is_told_once() -> None:
    stats = filled(0.5)
    assert not stats.take().is_empty()
    assert stats.is_empty()


@pytest.mark.parametrize("asks", [True, False])
def test_a_worker_without_news_answers_where_vllm_would_not_ask_its_scheduler(
    observed: Observed, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    monkeypatch.setattr(compat, "asks_scheduler_for_stats", lambda: asks)
    answer = observed.p.worker.get_kv_connector_stats()
    assert answer is None if asks else answer.is_empty()


def test_connectors_of_one_multiconnector_share_the_families(observed: Observed) -> None:
    types: Any = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    labels: Any = (["model_name", "engine"], {0: ["demo", "0"]})
    unregister_vllm_metrics()
    one, two = (
        cls.build_prom_metrics(observed.d.config, types, *labels) for cls in (KvConnectTcp, KvConnectFilesystem)
    )
    one.observe(filled(1.0).data)
    two.observe(filled(1.0).data)
    text = generate_latest(REGISTRY).decode()
    for connector in ("KvConnectTcp", "KvConnectFilesystem"):
        assert (
            f'vllm:kvconnect_transfers_total{{connector="{connector}",engine="0",model_name="demo",pipe="tcp"}} 1.0'
            in text
        )
    observed.register()


def test_the_dashboard_asks_for_what_there_is(observed: Observed) -> None:
    everything = Stats()
    for metric in metrics.METRICS:
        everything.add(metric, 1.0, *metric.labels)
    observed.prom.observe(everything.data, 1)
    page = generate_latest(REGISTRY).decode()
    assert dashboard.problems(page) == []
    assert {name for query in dashboard.queries() for name, _ in dashboard.asked(query)} == {
        name
        for metric in metrics.METRICS
        for name in re.findall(rf"# TYPE ({metrics.PREFIX}{metric.name}(?:_total)?) ", page)
        for name in ([f"{name}_{part}" for part in ("bucket", "sum", "count")] if metric is metrics.SECONDS else [name])
    }
    observed.register()


def test_the_page_names_every_phase_event_and_span() -> None:
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    phases = [*timeline.ADMISSION, *timeline.MOVE]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == phases
    assert [name for name in (*phases, *metrics.EVENTS, metrics.NO_PIPE) if f"`{name}`" not in page] == []
    assert re.findall(rf"{tracing.LOAD}\.(\w+)", page) == phases


def test_a_query_that_cannot_be_answered_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    page = '# TYPE vllm:kvconnect_leases gauge\nvllm:kvconnect_leases{engine="0"} 1.0\n'
    asked = ["vllm:kvconnect_leases", "sum by (pipe) (vllm:kvconnect_leases)", "vllm:kvconnect_lease"]
    monkeypatch.setattr(dashboard, "queries", lambda: asked)
    assert dashboard.problems(page) == [
        "sum by (pipe) (vllm:kvconnect_leases): vllm:kvconnect_leases has no ['pipe']",
        "vllm:kvconnect_lease: there is no vllm:kvconnect_lease",
    ]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errors.StaleError("x"), "stale"),
        (type("MineError", (errors.DeadlineError,), {})("x"), "deadline"),
        (errors.LoadError("x"), "load"),
    ],
)
def test_causes_are_few(error: errors.KVConnectError, cause: str) -> None:
    assert metrics.cause_of(error) == cause
    outer = errors.LoadError("could not be read")
    outer.__cause__ = error
    assert metrics.cause_of(outer) == cause


def test_a_child_of_a_multiconnector_is_observed_like_any_other(observed: Observed, tmp_path: Path) -> None:
    model, engines = describe_model(tmp_path), []
    for seed, role in enumerate(("kv_producer", "kv_consumer")):
        extra = {"group": "test-observability-multi", "lease_s": LEASE_S}
        child = {"kv_connector": "KvConnectTcp", "kv_role": role, "kv_connector_extra_config": extra}
        transfer = {"kv_connector": "MultiConnector", "kv_role": role}
        transfer["kv_connector_extra_config"] = {"connectors": [child]}
        engines.append(Engine(model, transfer, SHAPES["blocks first"], seed))
    p, d = engines
    unregister_vllm_metrics()
    prom = KVConnectorProm(d.config, ["model_name", "engine"], {0: ["demo", "0"]})
    answer, _ = p.ask("p", range(100), dict(ASK_FOR_TICKET), max_tokens=1)
    d.ask("d", range(100), answer.kv_transfer_params)
    logging = KVConnectorLogging(d.config.kv_transfer_config)
    for engine in engines:
        for told in engine.stats:
            logging.observe(told)
            prom.observe(msgspec.msgpack.decode(msgspec.msgpack.encode(told)), 0)
        engine.close()
    page = generate_latest(REGISTRY).decode()
    assert f"{named('transfers_total', 0, pipe='tcp')} 1.0" in page
    assert f"{named('entries_total', 0, event='offered')} 1.0" in page
    lines: list[str] = []
    logging.log(lambda text, *args: lines.append(text % args))
    assert "'Transfers': 1" in lines[0]
    observed.register()
