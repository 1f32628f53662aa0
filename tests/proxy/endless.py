"""A decode server in a process of its own, whose answers do not end; it prints its URL."""

from __future__ import annotations

import sys

from tests.proxy.servers import Call, FakeEngine, Served


async def streams(call: Call) -> None:
    await call.start(200, (b"content-type", b"text/event-stream"))
    await call.piece(b"data: 1\n\n")
    await call.until_gone()


if __name__ == "__main__":
    with Served(FakeEngine(streams)) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()
