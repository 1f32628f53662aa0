"""Looking after servers: who fails its checks is left out, who passes one is back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvconnect.proxy.connections import Connections
from kvconnect.proxy.failures import ServerError
from kvconnect.proxy.servers import Pool, Server
from kvconnect.proxy.settings import Settings

OK = "ok"


async def ask(connections: Connections, servers: Sequence[Server], timeout_s: float) -> dict[Server, str]:
    """Ask all servers at once; return "ok" or what is wrong with each, within ``timeout_s``."""
    verdicts = await asyncio.gather(*(_ask_one(connections, server, timeout_s) for server in servers))
    return dict(zip(servers, verdicts, strict=True))


async def _ask_one(connections: Connections, server: Server, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            answer = await connections.send("GET", f"{server.url}/health", [], b"", timeout_s)
            try:
                await answer.body()
            finally:
                answer.close()
    except (ServerError, TimeoutError) as error:
        return str(error) or type(error).__name__
    except Exception as error:  # noqa: BLE001 - whatever it is: it is the verdict, and must not end all checks
        return repr(error)
    return OK if answer.is_success else f"answered {answer.status}"


async def watch(connections: Connections, pools: Sequence[Pool], settings: Settings) -> None:
    """Check all servers now and then, until cancelled."""
    while True:
        servers = [server for pool in pools for server in pool]
        for server, verdict in (await ask(connections, servers, settings.health_timeout_s)).items():
            if verdict == OK:
                server.take_back()
                continue
            server.failures += 1
            if server.failures >= settings.health_failures:
                server.leave_out(verdict)
        await asyncio.sleep(settings.health_interval_s)
