"""The ASGI application: one request in, a prefill leg and a decode leg out."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

import anyio
import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from kvconnect.proxy import legs
from kvconnect.proxy.settings import Settings
from kvconnect.proxy.upstream import GatewayError, Upstream

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope, Send

_log = logging.getLogger("kvconnect.proxy")

#: A prefill server's refusals that are about the server, not about the request.
_NOT_THE_REQUESTS_FAULT = frozenset({408, 425, 429})
FALLBACK_HEADER = b"x-kvconnect-fallback"


def build(settings: Settings) -> Starlette:
    """Return the application for these servers."""
    limits = httpx.Limits(
        max_connections=None,  # the servers queue requests, the proxy does not
        max_keepalive_connections=64,
        keepalive_expiry=2.0,  # below uvicorn's 5 s, so that the server is never the one to close an idle connection
    )
    timeout = httpx.Timeout(settings.decode_timeout_s, connect=settings.connect_timeout_s)
    # trust_env: HTTP_PROXY is meant for the way out, not for the engines behind us.
    # A cookie belongs to the client that it was meant for; a shared jar would send it with everybody's requests.
    nobodys = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, cookies=nobodys)
    prefill = Upstream("prefill", settings.prefill, client, settings.prefill_timeout_s)
    decode = Upstream("decode", settings.decode, client, settings.decode_timeout_s)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def health(_: Request) -> JSONResponse:
        report = {leg.leg: await leg.health(settings.health_timeout_s) for leg in (prefill, decode)}
        able = all("ok" in verdicts.values() for verdicts in report.values())
        return JSONResponse(report, status_code=200 if able else 503)

    handover = Handover(prefill, decode, settings)
    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/v1/completions", handover, methods=["POST"]),
            Route("/v1/chat/completions", handover, methods=["POST"]),
            Route("/v1/models", Passed(decode, settings), methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
    )


class Passed:
    """An ASGI endpoint that passes a request without a body on to one leg."""

    def __init__(self, leg: Upstream, settings: Settings) -> None:
        self._leg, self._client_timeout_s = leg, settings.client_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = legs.request_headers(scope["headers"], legs.request_id(scope["headers"]))
        bounded = _bounded(send, self._client_timeout_s)
        await _until_gone(receive, lambda: _relay(self._leg, scope, headers, b"", bounded))


class Handover:
    """An ASGI endpoint that has the prompt computed on one leg and the answer on the other."""

    def __init__(self, prefill: Upstream, decode: Upstream, settings: Settings) -> None:
        self._prefill, self._decode = prefill, decode
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        send = _bounded(send, self._settings.client_timeout_s)
        with contextlib.suppress(_Gone):
            try:
                content = await _read_body(receive, self._settings)
                body = legs.parse(content)
                if body is None:
                    raise GatewayError(400, "the request body must be a JSON object")
            except GatewayError as failure:
                await _refuse(send, failure)
                return
            await _until_gone(receive, lambda: self._serve(scope, body, send))

    async def _serve(self, scope: Scope, body: dict[str, Any], send: Send) -> None:
        name = legs.request_id(scope["headers"])
        headers = legs.request_headers(scope["headers"], name)
        ticket: dict[str, Any] | None = None
        extra: legs.Headers = []
        try:
            answer, content = await self._ask_for_ticket(scope, headers, body)
        except GatewayError as failure:
            _log.warning("request %s: %s; the decode server computes it alone", name.decode("latin-1"), failure)
            extra = [(FALLBACK_HEADER, failure.reason.encode("latin-1", "replace"))]
        else:
            if not answer.is_success:
                await _send(send, answer.status_code, _decoded_headers(answer), content)
                return
            ticket = legs.ticket(content)
            if ticket is None:
                _log.info("request %s: the prefill server gave no ticket", name.decode("latin-1"))
        leg = json.dumps(legs.decode_body(body, ticket)).encode()
        await _relay(self._decode, scope, headers, leg, send, extra)

    async def _ask_for_ticket(
        self, scope: Scope, headers: legs.Headers, body: dict[str, Any]
    ) -> tuple[httpx.Response, bytes]:
        """Return the prefill server's answer: a success, or a refusal that is the request's own fault."""
        # Its body is read here, so only in an encoding that is surely known here.
        headers = [*legs.without(headers, b"accept-encoding"), (b"accept-encoding", b"identity")]
        content = json.dumps(legs.prefill_body(body)).encode()
        answer, text = await self._prefill.ask("POST", _path(scope), headers, content)
        if answer.is_success or (answer.is_client_error and answer.status_code not in _NOT_THE_REQUESTS_FAULT):
            return answer, text
        raise GatewayError(502, f"prefill answered {answer.status_code}")


async def _relay(
    leg: Upstream, scope: Scope, headers: legs.Headers, content: bytes, send: Send, extra: legs.Headers | None = None
) -> None:
    """Pass the leg's answer on: its status, its headers and its bytes as they come."""
    extra = extra or []
    try:
        async with leg.answer(scope["method"], _path(scope), headers, content) as answer:
            kept = legs.end_to_end(answer.headers.raw)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": [*kept, *extra]})
            try:
                async for piece in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except httpx.HTTPError as error:
                # Returning without the last message makes the server cut the
                # connection: the client sees a broken answer, as it was.
                _log.warning("%s broke off in mid-answer: %s", leg.leg, type(error).__name__)
                return
            await send({"type": "http.response.body", "body": b""})
    except GatewayError as failure:
        await _refuse(send, failure, extra)


class _Gone(Exception):  # noqa: N818 - a state of the client, not an error
    """The client went away, or does nothing any more."""


async def _until_gone(receive: Receive, serve: Callable[[], Any]) -> None:
    """Run ``serve``, and cancel it (closing the leg in flight) as soon as the client is gone."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        # Not out of the group, which would wrap it. Its legs have been closed by now.
        with contextlib.suppress(_Gone):
            await serve()
        group.cancel_scope.cancel()


def _bounded(send: Send, timeout_s: float) -> Send:
    """Return ``send``, but with `_Gone` for a client that takes nothing for ``timeout_s``.

    A client that has stopped reading looks alive for ever, and an engine's request with it.
    """

    async def bounded(message: Message) -> None:
        try:
            with anyio.fail_after(timeout_s):
                await send(message)
        except TimeoutError as error:
            _log.warning("a client took nothing of its answer for %g s; its request is given up", timeout_s)
            raise _Gone from error

    return bounded


async def _read_body(receive: Receive, settings: Settings) -> bytes:
    content = bytearray()
    while True:
        try:
            with anyio.fail_after(settings.client_timeout_s):
                message = await receive()
        except TimeoutError as error:
            raise GatewayError(408, f"nothing of the request body came for {settings.client_timeout_s:g} s") from error
        if message["type"] == "http.disconnect":
            raise _Gone
        content += message.get("body", b"")
        if len(content) > settings.max_body_bytes:
            raise GatewayError(413, f"the request body is larger than {settings.max_body_bytes} bytes")
        if not message.get("more_body", False):
            return bytes(content)


def _path(scope: Scope) -> str:
    query = scope.get("query_string", b"").decode("latin-1")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def _decoded_headers(answer: httpx.Response) -> legs.Headers:
    """Return headers for a body that was read whole and decoded."""
    return legs.without(legs.end_to_end(answer.headers.raw), b"content-encoding", b"content-length")


async def _refuse(send: Send, failure: GatewayError, extra: legs.Headers | None = None) -> None:
    """Answer with an error of the proxy's own, in the shape that OpenAI's clients read."""
    kind = "BadRequestError" if failure.status < 500 else "UpstreamError"
    error = {"message": failure.reason, "type": kind, "param": None, "code": failure.status}
    headers = [(b"content-type", b"application/json"), *(extra or [])]
    await _send(send, failure.status, headers, json.dumps({"error": error}).encode())


async def _send(send: Send, status: int, headers: legs.Headers, content: bytes) -> None:
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content})
