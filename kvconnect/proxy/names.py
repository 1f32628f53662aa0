"""Names that stand for several servers: looked up again and again, each address a server."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from kvconnect.proxy.servers import Pool

_log = logging.getLogger("kvconnect.proxy")

_HTTP_PORT = 80
#: The answer is that there are none, as for a headless Service without a pod that is ready; all else is no answer.
_NONE = (socket.EAI_NONAME, socket.EAI_NODATA)


async def follow(pools: Sequence[Pool], resolver: AbstractResolver, interval_s: float) -> None:
    """Look all names up now and then, until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        await look_up(pools, resolver)


async def look_up(pools: Sequence[Pool], resolver: AbstractResolver) -> None:
    """Look all names up; the resolver bounds how long it takes."""
    await asyncio.gather(*(_look_one_up(pool, name, resolver) for pool in pools for name in pool.names))


async def _look_one_up(pool: Pool, name: str, resolver: AbstractResolver) -> None:
    """Bring a pool up to date with a name; without an answer it stands for what it stood for."""
    parts = urlsplit(name)
    host, port = parts.hostname or "", parts.port or _HTTP_PORT
    try:
        found = {row["host"] for row in await resolver.resolve(host, port, socket.AF_UNSPEC)}
    except OSError as error:
        if error.errno in _NONE:
            pool.replace(name, [])
        else:
            _log.warning("%s servers: %s cannot be looked up: %s", pool.leg, host, error)
    else:
        pool.replace(name, [f"http://{f'[{each}]' if ':' in each else each}:{port}" for each in sorted(found)])
