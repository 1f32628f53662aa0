"""Real servers on loopback: ASGI applications under uvicorn, each in a thread."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn

WAIT_S = 10.0


class Served:
    """An ASGI application served from a thread until the context ends."""

    def __init__(
        self, app: Any, *, lifespan: str = "off", listener: socket.socket | None = None, parser: Any = "auto"
    ) -> None:
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app,
            http=parser,
            log_config=None,
            ws="none",
            lifespan=lifespan,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Begin to stop, without waiting."""
        self._server.should_exit = True

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(WAIT_S)
        self._listener.close()
        assert not self._thread.is_alive()


@dataclass
class Seen:
    """One request that a fake engine got."""

    path: str
    headers: list[tuple[str, str]]
    body: dict[str, Any]

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)


Behaviour = Callable[["Call"], Awaitable[None]]


@dataclass
class Call:
    """A request being answered by a fake engine."""

    seen: Seen
    receive: Any
    send: Any

    async def start(self, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def piece(self, content: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": content, "more_body": more})

    async def json(self, status: int, content: Any, *headers: tuple[bytes, bytes]) -> None:
        text = json.dumps(content).encode()
        await self.start(
            status, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(text)), *headers
        )
        await self.piece(text, more=False)

    async def until_gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


@dataclass
class FakeEngine:
    """A server that records what it gets and answers as it is told."""

    behave: Behaviour
    #: What it answers to ``/health``, which is not among ``seen``.
    health: Behaviour | None = None
    checks: int = 0
    seen: list[Seen] = field(default_factory=list)
    #: Set when a request has arrived.
    busy: threading.Event = field(default_factory=threading.Event)
    #: Set when a client went away before it had its answer.
    aborted: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/health":
            self.checks += 1
            await (self.health or says(200, {}))(Call(Seen("/health", [], {}), receive, send))
            return
        headers = [(key.decode(), value.decode()) for key, value in scope["headers"]]
        query = scope["query_string"].decode()
        seen = Seen(scope["path"] + (f"?{query}" if query else ""), headers, json.loads(content or b"{}"))
        self.seen.append(seen)
        self.busy.set()
        await self.behave(Call(seen, receive, send))

    def hang(self) -> Behaviour:
        """Return the behaviour of never answering; `aborted` tells when the client gave up."""

        async def behave(call: Call) -> None:
            await asyncio.wait_for(call.until_gone(), WAIT_S)
            self.aborted.set()

        return behave


def until(true: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while not true():
        assert time.monotonic() < deadline, "it has not come true"
        pause.wait(0.01)


TICKET = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "engine-p",
    "remote_block_ids": [[1, 2, 3]],
    "remote_host": "10.9.9.9",
    "remote_port": 5600,
    "kvconnect": {"v": 1, "ticket": "abc", "nested": [1.5, None, "ä"]},
}


async def gives_ticket(call: Call) -> None:
    """Answer as a prefill server does."""
    await call.json(200, {"id": "p", "choices": [{"text": "x"}], "kv_transfer_params": TICKET})


async def answers(call: Call) -> None:
    """Answer as a decode server does."""
    await call.json(200, {"id": "d", "choices": [{"text": "the answer"}]}, (b"x-from", b"decode"))


def says(status: int, content: Any, *headers: tuple[bytes, bytes]) -> Behaviour:
    """Return the behaviour of one fixed JSON answer."""

    async def behave(call: Call) -> None:
        await call.json(status, content, *headers)

    return behave
