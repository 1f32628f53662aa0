"""A proxy between a fake prefill and a fake decode engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvconnect.proxy.app import build
from kvconnect.proxy.settings import Settings
from tests.proxy.servers import WAIT_S, FakeEngine, Served, answers, gives_ticket


@dataclass
class Stage:
    """The running servers and a client of the proxy."""

    client: httpx.Client
    port: int
    prefill: list[FakeEngine]
    decode: list[FakeEngine]
    settings: Settings

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of ``/metrics`` by its name less ``kvconnect_proxy_``, 0 if there is none yet."""
        text = self.client.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = [each for each in samples if each.name == f"kvconnect_proxy_{name}" and each.labels == labels]
        return found[0].value if found else 0.0


MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage() -> Iterator[MakeStage]:
    """Return ``make(prefill=1, decode=1, prefill_urls=None, **settings)``."""
    with contextlib.ExitStack() as stack:

        def serve(app: Any, **options: Any) -> Served:
            return stack.enter_context(Served(app, **options))

        def make(
            prefill: int = 1,
            decode: int = 1,
            prefill_urls: tuple[str, ...] = (),
            decode_urls: tuple[str, ...] = (),
            parser: str = "auto",
            **settings: Any,
        ) -> Stage:
            legs = [[FakeEngine(gives_ticket) for _ in range(prefill)], [FakeEngine(answers) for _ in range(decode)]]
            servers = [[serve(engine) for engine in leg] for leg in legs]
            urls = [tuple(server.url for server in leg) for leg in servers]
            chosen = Settings(prefill=prefill_urls + urls[0], decode=decode_urls + urls[1], **settings)
            proxy = serve(build(chosen), lifespan="on", parser=parser)
            # All at once: stopping takes each of them some tenths of a second.
            stack.callback(lambda: [server.stop() for server in (proxy, *servers[0], *servers[1])])
            client = stack.enter_context(httpx.Client(base_url=proxy.url, timeout=WAIT_S, trust_env=False))
            return Stage(client, proxy.port, *legs, chosen)

        yield make


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """Return one prefill engine, one decode engine and the proxy."""
    return make_stage()
