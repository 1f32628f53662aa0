"""What the proxy counts, as Prometheus reads it at ``/metrics``.

Labels take values of this program, of its settings and of the names in them only, never of requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily

from kvconnect.proxy.failures import GatewayError
from kvconnect.proxy.servers import Pool

if TYPE_CHECKING:
    from starlette.types import Message, Send

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600)
_OUTCOMES = {2: "ok", 4: "client_error", 5: "server_error"}


@dataclass
class Outcome:
    """How a leg ended: by the status that its server answered with, unless it failed."""

    status: int = 0


class Metrics:
    """The metrics of one proxy, in a registry of their own."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(self)
        self._legs = Counter(
            "kvconnect_proxy_leg_requests", "Requests to servers, once each.", ["leg", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "kvconnect_proxy_leg_seconds",
            "From choosing a server to the end of its answer.",
            ["leg"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._first_byte = Histogram(
            "kvconnect_proxy_first_byte_seconds",
            "From a request's arrival to the first byte of a successful answer's body, both legs included.",
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.retries = Counter(
            "kvconnect_proxy_retries", "Requests given to another server.", ["leg", "cause"], registry=registry
        )
        self.fallbacks = Counter(
            "kvconnect_proxy_fallbacks",
            "Requests that the decode server computed alone, by what the prefill leg failed of.",
            ["cause"],
            registry=registry,
        )
        self.refusals = Counter(
            "kvconnect_proxy_refusals", "Errors that the proxy itself answered.", ["status"], registry=registry
        )
        self.in_flight = Gauge("kvconnect_proxy_requests_in_flight", "Clients' requests.", registry=registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Give those of the servers that there are now: a server that has gone leaves no series."""
        labels = ["leg", "server"]
        held = GaugeMetricFamily("kvconnect_proxy_server_in_flight", "Requests at a server.", labels=labels)
        up = GaugeMetricFamily("kvconnect_proxy_server_up", "0 while a server is left out.", labels=labels)
        for server in (server for pool in self._pools for server in pool):
            held.add_metric([server.leg, server.url], server.in_flight)
            up.add_metric([server.leg, server.url], server.in_rotation)
        yield from (held, up)

    @contextmanager
    def timed(self, leg: str) -> Iterator[Outcome]:
        """Count and time a leg; one that is left by something else than a `GatewayError` was given up by its client."""
        start_s, seen, outcome = time.monotonic(), Outcome(), "cancelled"
        try:
            yield seen
            outcome = _OUTCOMES.get(seen.status // 100, "other")
        except GatewayError as failure:
            outcome = failure.cause
            raise
        finally:
            self._legs.labels(leg, outcome).inc()
            self._seconds.labels(leg).observe(time.monotonic() - start_s)

    def first_byte(self, send: Send) -> Send:
        """Return ``send``, which times the first byte from now on."""
        start_s, waits = time.monotonic(), False

        async def timed(message: Message) -> None:
            nonlocal waits
            await send(message)
            if message["type"] == "http.response.start":
                waits = 200 <= message["status"] < 300
            elif waits and message.get("body"):
                waits = False
                self._first_byte.observe(time.monotonic() - start_s)

        return timed
