"""Looking after servers: who fails its checks is left out, who passes one is back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio

from kvconnect.proxy.servers import Server
from kvconnect.proxy.settings import Settings

if TYPE_CHECKING:
    import httpx

OK = "ok"


async def ask(client: httpx.AsyncClient, servers: Sequence[Server], timeout_s: float) -> dict[Server, str]:
    """Ask all servers at once; return "ok" or what is wrong with each, within ``timeout_s``."""
    verdicts: dict[Server, str] = {}

    async def ask_one(server: Server) -> None:
        try:
            with anyio.fail_after(timeout_s):
                response = await client.get(f"{server.url}/health")
        except Exception as error:  # noqa: BLE001 - whatever it is: it is the verdict, and must not end all checks
            verdicts[server] = str(error) or type(error).__name__
        else:
            verdicts[server] = OK if response.is_success else f"answered {response.status_code}"

    async with anyio.create_task_group() as group:
        for server in servers:
            group.start_soon(ask_one, server)
    return verdicts


async def watch(client: httpx.AsyncClient, servers: Sequence[Server], settings: Settings) -> None:
    """Check all servers now and then, until cancelled."""
    while True:
        for server, verdict in (await ask(client, servers, settings.health_timeout_s)).items():
            if verdict == OK:
                server.take_back()
                continue
            server.failures += 1
            if server.failures >= settings.health_failures:
                server.leave_out(verdict)
        await anyio.sleep(settings.health_interval_s)
