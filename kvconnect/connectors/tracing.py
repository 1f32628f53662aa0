"""OpenTelemetry spans of loads, within the trace that the request's client has begun.

vLLM hands a request's ``traceparent`` on if it traces (``--otlp-traces-endpoint``), and then has given
each of its processes a tracer provider. Requests without one have no spans, and without
`opentelemetry-api` nobody has any.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kvconnect.connectors.timeline import Span

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # vLLM brings it; without it there is nobody to trace for
    trace = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from opentelemetry.context import Context

#: What carries a trace from process to process: W3C's headers.
Carrier = Mapping[str, str]

#: Name of the span of a whole load; its phases' names follow a dot.
LOAD = "kvconnect.load"


class LoadTrace:
    """The span of one request's load, as the scheduler sees it, and those of its phases below it."""

    def __init__(self, span: trace.Span) -> None:
        """Take a span that records."""
        self._span = span
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
        #: For `record` in another process.
        self.carrier: Carrier = carrier

    def end(self, outcome: str) -> None:
        """The load is over, or there is none: ``outcome`` says which."""
        self._span.set_attribute("kvconnect.outcome", outcome)
        self._span.end()


def begin(headers: Carrier | None, request_id: str, seen: float) -> LoadTrace | None:
    """Begin the span of a load at ``seen`` (`time.monotonic`), unless nobody traces the request."""
    if not headers or trace is None:
        return None
    span = trace.get_tracer(__name__).start_span(
        LOAD, _context(headers), start_time=_epoch_ns(seen), attributes={"gen_ai.request.id": request_id}
    )
    return LoadTrace(span) if span.is_recording() else None


def record(
    parent: Carrier, spans: Iterable[Span], attributes: Mapping[str, str | int] | None = None, error: str = ""
) -> None:
    """Write phases that are over below the span that ``parent`` carries; the last one with ``error``, if any."""
    if not parent or trace is None:
        return
    tracer, context = trace.get_tracer(__name__), _context(parent)
    phases = list(spans)
    for phase in phases:
        span = tracer.start_span(
            f"{LOAD}.{phase.phase}", context, start_time=_epoch_ns(phase.begin), attributes=attributes
        )
        if error and phase is phases[-1]:
            span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end(_epoch_ns(phase.end))


def _context(carrier: Carrier) -> Context:
    return TraceContextTextMapPropagator().extract(carrier)


def _epoch_ns(monotonic_s: float) -> int:
    """Return a time of `time.monotonic` in nanoseconds since the epoch."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
