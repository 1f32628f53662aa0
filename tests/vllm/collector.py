"""An OpenTelemetry collector for engines: it takes spans by OTLP over HTTP and keeps them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """What engines are started with so that they send their spans here, and those that came."""

    def __init__(self, port: int) -> None:
        self.arguments = ("--otlp-traces-endpoint", f"http://127.0.0.1:{port}/v1/traces")
        self.env: Mapping[str, str] = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        self._spans: list[Span] = []
        self._came = threading.Condition()

    def add(self, body: bytes) -> None:
        """Keep what one process has exported."""
        # Here, since every fleet imports this module, and those on GPUs export no spans.
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        request = ExportTraceServiceRequest.FromString(body)
        with self._came:
            for resource in request.resource_spans:
                self._spans += [span for scope in resource.scope_spans for span in scope.spans]
            self._came.notify_all()

    def trace(self, trace_id: bytes, names: set[str], within_s: float) -> dict[str, Span]:
        """Return the spans of one trace by name, once there are all of ``names``, or after ``within_s``."""

        def found() -> dict[str, Span]:
            return {span.name: span for span in self._spans if span.trace_id == trace_id}

        with self._came:
            self._came.wait_for(lambda: names <= set(found()), within_s)
            return found()


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector for a while."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.add(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Tests read what failed, not what was posted."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_port)
        thread = threading.Thread(target=server.serve_forever, name="otlp-collector", daemon=True)
        thread.start()
        yield collector
        server.shutdown()
        thread.join(10)
