"""Clients that go away, and what engines' logs say of loads."""

from __future__ import annotations

import json
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from kvconnect.demo import client as api
from kvconnect.demo.client import Prompt
from kvconnect.demo.engines import Server
from tests.vllm.fleet import Fleet, unique

#: What no engine's log may contain.
_CRASHES = ("Traceback (most recent call last)", "EngineDeadError", "AssertionError")
#: How a load ended, well or not, and of which request: once for each worker.
_END = re.compile(r'kvconnect\.load \{"request": "([^"]+)"|could not load the KV of ([^:\s]+):')


def leave(
    server: Server,
    prompt: Prompt,
    after_s: float,
    *,
    request_id: str | None = None,
    kv_transfer_params: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> bool:
    """Send a request and close the connection ``after_s`` later; return whether the answer was there by then."""
    body = json.dumps(prompt.body(kv_transfer_params=kv_transfer_params, max_tokens=max_tokens)).encode()
    head = f"POST {prompt.path} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    head += f"X-Request-Id: {request_id}\r\n" if request_id else ""
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return bool(select.select([sock], [], [], after_s)[0])


def until(true: Callable[[], Any], within_s: float, what: str) -> None:
    """Ask until something is true; raises `TimeoutError` if it is not in time."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        threading.Event().wait(0.05)


def held(fleet: Fleet, engine: Server) -> int:
    """Return how many KV blocks were in use in an engine's latest step, when `poke` has made it take one.

    Unlike a reset of the prefix cache (`Fleet.busy`), which ends every loan that nobody reads, it changes nothing.
    """
    found = api.metrics(fleet.http, engine.url)
    info = next(name for name in found if name.startswith("vllm:cache_config_info"))
    (blocks,) = re.findall(r'num_gpu_blocks="(\d+)"', info)
    return round(found["vllm:kv_cache_usage_perc"] * (int(blocks) - 1))


def poke(fleet: Fleet, p: int = 0, d: int = 0) -> None:
    """Have a producer and a consumer take a step: a hand-over of one block, which P may still hold afterwards."""
    fleet.by_ticket(Prompt([5], max_tokens=1, salt=unique("poke")), p, d)


def complaints(server: Server, since: int = 0) -> list[str]:
    """Return what a log says, from a byte on, of crashes, and of loads that were reported more than once."""
    lines = server.log.read_bytes()[since:].decode(errors="replace").splitlines()
    found = [line for line in lines if any(sign in line for sign in _CRASHES)]
    ends = Counter(match[1] or match[2] for line in lines if (match := _END.search(line)))
    return found + [f"{request}: reported {times} times" for request, times in ends.items() if times > 1]
