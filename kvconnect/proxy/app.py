"""The ASGI application: which address is answered by what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from aiohttp import ThreadedResolver
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvconnect.proxy import health, names
from kvconnect.proxy.connections import Connections
from kvconnect.proxy.handover import Handover, Passed
from kvconnect.proxy.metrics import Metrics
from kvconnect.proxy.policies import POLICIES, PolicyName
from kvconnect.proxy.servers import Pool
from kvconnect.proxy.settings import Settings
from kvconnect.proxy.upstream import Upstream

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver
    from starlette.requests import Request


def build(settings: Settings, resolver: AbstractResolver | None = None) -> Starlette:
    """Return the application for these servers; ``resolver`` looks names up, by default as the system does."""
    connections = Connections(settings.connect_timeout_s)
    prefills, decodes = pools = Pool("prefill", settings.prefill), Pool("decode", settings.decode)
    metrics = Metrics(pools)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        addresses = resolver or ThreadedResolver()
        async with connections, anyio.create_task_group() as group:
            with anyio.move_on_after(settings.connect_timeout_s):  # the first requests find servers
                await names.look_up(pools, addresses)
            group.start_soon(names.follow, pools, addresses, settings.health_interval_s)
            group.start_soon(health.watch, connections, pools, settings)
            yield
            group.cancel_scope.cancel()

    async def report_health(_: Request) -> JSONResponse:
        servers = [server for pool in pools for server in pool]
        verdicts = await health.ask(connections, servers, settings.health_timeout_s)
        report = {
            pool.leg: {server.url: verdicts[server] for server in servers if server.leg == pool.leg} for pool in pools
        }
        able = all(health.OK in each.values() for each in report.values())
        return JSONResponse(report, status_code=200 if able else 503)

    def report_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def upstream(leg: str, servers: Pool, policy: PolicyName, timeout_s: float) -> Upstream:
        choose = POLICIES[policy]
        return Upstream(leg, servers, choose, connections, metrics, timeout_s=timeout_s, retries=settings.retries)

    prefill = upstream("prefill", prefills, settings.prefill_policy, settings.prefill_timeout_s)
    decode = upstream("decode", decodes, settings.decode_policy, settings.decode_timeout_s)
    models = upstream("models", decodes, settings.decode_policy, settings.decode_timeout_s)
    handover = Handover(prefill, decode, settings, metrics)
    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/v1/completions", handover, methods=["POST"]),
            Route("/v1/chat/completions", handover, methods=["POST"]),
            Route("/v1/models", Passed(models, settings, metrics), methods=["GET"]),
            Route("/health", report_health, methods=["GET"]),
            Route("/metrics", report_metrics, methods=["GET"]),
        ],
    )
