"""The client's side of a request: its body, answers to it, and noticing that it is gone. ASGI only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from kvconnect.proxy.failures import GatewayError
from kvconnect.proxy.legs import Headers

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Send

_log = logging.getLogger("kvconnect.proxy")

OVERLOADED = 503
_RETRY_AFTER_S = 1


class Gone(Exception):  # noqa: N818 - a state of the client, not an error
    """The client went away, or does nothing any more."""


async def until_gone(receive: Receive, serve: Callable[[], Any]) -> None:
    """Run ``serve``, and cancel it (closing the leg in flight) as soon as the client is gone."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        # Not out of the group, which would wrap it. Its legs have been closed by now.
        with contextlib.suppress(Gone):
            await serve()
        group.cancel_scope.cancel()


def bounded(send: Send, timeout_s: float) -> Send:
    """Return ``send``, but with `Gone` for a client that takes nothing for ``timeout_s``.

    A client that has stopped reading looks alive for ever, and an engine's request with it.
    """

    async def bounded_send(message: Message) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await send(message)
        except TimeoutError as error:
            _log.warning("a client took nothing of its answer for %g s; its request is given up", timeout_s)
            raise Gone from error

    return bounded_send


async def read_body(receive: Receive, timeout_s: float, max_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        GatewayError: it is too large, or nothing of it came for ``timeout_s``.
        Gone: the client went away.

    """
    content = bytearray()
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError as error:
            raise GatewayError(408, f"nothing of the request body came for {timeout_s:g} s") from error
        if message["type"] == "http.disconnect":
            raise Gone
        content += message.get("body", b"")
        if len(content) > max_bytes:
            raise GatewayError(413, f"the request body is larger than {max_bytes} bytes")
        if not message.get("more_body", False):
            return bytes(content)


async def refuse(send: Send, failure: GatewayError, extra: Headers) -> None:
    """Answer with an error of the proxy's own, in the shape that OpenAI's clients read."""
    kind = "BadRequestError" if failure.status < 500 else "UpstreamError"
    headers = [(b"content-type", b"application/json"), *extra]
    if failure.status == OVERLOADED:
        kind = "OverloadedError"
        headers.append((b"retry-after", b"%d" % _RETRY_AFTER_S))
    error = {"message": failure.reason, "type": kind, "param": None, "code": failure.status}
    await answer(send, failure.status, headers, json.dumps({"error": error}).encode())


async def answer(send: Send, status: int, headers: Headers, content: bytes) -> None:
    """Send a whole answer."""
    length = (b"content-length", b"%d" % len(content))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content})
