"""The endpoints that pass requests on: one request in, a prefill leg and a decode leg out."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kvconnect.proxy import clients, legs
from kvconnect.proxy.connections import Answer
from kvconnect.proxy.failures import GatewayError
from kvconnect.proxy.metrics import Metrics
from kvconnect.proxy.settings import Settings
from kvconnect.proxy.upstream import Upstream

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_log = logging.getLogger("kvconnect.proxy")

#: A prefill server's refusals that are about the server, not about the request.
_NOT_THE_REQUESTS_FAULT = frozenset({408, 425, 429})
#: RFC 3986 §3.4, with escapes that are there already.
_IN_QUERY = "!$&'()*+,-./:;=?@_~%[]"
FALLBACK_HEADER = b"x-kvconnect-fallback"


class Passed:
    """An ASGI endpoint that passes a request without a body on to one leg."""

    def __init__(self, leg: Upstream, settings: Settings, metrics: Metrics) -> None:
        self._leg, self._settings, self._metrics = leg, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = legs.request_headers(scope["headers"], legs.request_id(scope["headers"]))
        request = legs.Request(scope["method"], _path(scope), headers)
        send = clients.bounded(send, self._settings.client_timeout_s)
        if not legs.fit(headers):
            await _refuse(send, _unfit(), [], self._metrics)
            return
        await clients.until_gone(receive, lambda: _relay(self._leg, request, send, [], self._metrics))


class Handover:
    """An ASGI endpoint that has the prompt computed on one leg and the answer on the other."""

    def __init__(self, prefill: Upstream, decode: Upstream, settings: Settings, metrics: Metrics) -> None:
        self._prefill, self._decode = prefill, decode
        self._settings, self._metrics = settings, metrics
        self._in_flight = 0
        metrics.in_flight.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it: it is too much, or none."""
        send = clients.bounded(send, self._settings.client_timeout_s)
        self._in_flight += 1
        try:
            with contextlib.suppress(clients.Gone):
                await self._serve(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._settings
        send = self._metrics.first_byte(send)
        try:
            if self._in_flight > settings.max_in_flight:
                raise GatewayError(clients.OVERLOADED, f"the proxy has {settings.max_in_flight} requests in flight")
            if not legs.fit(scope["headers"]):
                raise _unfit()
            content = await clients.read_body(receive, settings.client_timeout_s, settings.max_body_bytes)
            body = legs.parse(content)
            if body is None:
                raise GatewayError(400, "the request body must be a JSON object, nested 200 deep at most")
        except GatewayError as failure:
            await _refuse(send, failure, [], self._metrics)
            return
        await clients.until_gone(receive, lambda: self._hand_over(scope, body, send))

    async def _hand_over(self, scope: Scope, body: dict[str, Any], send: Send) -> None:
        name = legs.request_id(scope["headers"])
        headers = legs.request_headers(scope["headers"], name)
        prefix = legs.prefix(body, self._settings.prefix_characters)
        ticket: dict[str, Any] | None = None
        extra: legs.Headers = []
        try:
            answer, content = await self._ask_for_ticket(scope, headers, body, prefix)
        except GatewayError as failure:
            _log.warning("request %s: %s; the decode server computes it alone", name.decode("latin-1"), failure)
            self._metrics.fallbacks.labels(failure.cause).inc()
            extra = [(FALLBACK_HEADER, failure.reason.encode("latin-1", "replace"))]
        else:
            if not answer.is_success:
                headers = legs.without(legs.end_to_end(answer.headers), b"content-length")
                await clients.answer(send, answer.status, headers, content)
                return
            ticket = legs.ticket(content)
            if ticket is None:
                _log.info("request %s: the prefill server gave no ticket", name.decode("latin-1"))

        def decode_content(ticket: dict[str, Any] | None) -> bytes:
            return json.dumps(legs.decode_body(body, ticket)).encode()

        # A ticket is for one use: a server that read it and would not serve the request may have had its KV released.
        request = legs.Request(
            scope["method"], _path(scope), headers, decode_content(ticket), prefix, lambda: decode_content(None)
        )
        await _relay(self._decode, request, send, extra, self._metrics)

    async def _ask_for_ticket(
        self, scope: Scope, headers: legs.Headers, body: dict[str, Any], prefix: str
    ) -> tuple[Answer, bytes]:
        """Return the prefill server's answer: a success, or a refusal that is the request's own fault."""
        # Its body is read here, so only in an encoding that is surely known here.
        headers = [*legs.without(headers, b"accept-encoding"), (b"accept-encoding", b"identity")]
        content = json.dumps(legs.prefill_body(body)).encode()
        answer, text = await self._prefill.ask(legs.Request("POST", _path(scope), headers, content, prefix))
        if answer.is_success or (400 <= answer.status < 500 and answer.status not in _NOT_THE_REQUESTS_FAULT):
            return answer, text
        raise GatewayError(502, f"prefill answered {answer.status}", "status")


async def _relay(leg: Upstream, request: legs.Request, send: Send, extra: legs.Headers, metrics: Metrics) -> None:
    """Pass the leg's answer on: its status, its headers and its bytes as they come."""
    begun = False
    try:
        async with leg.answer(request) as answer:
            headers = [*legs.end_to_end(answer.headers), *extra]
            begun = True
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            while piece := await answer.piece():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except GatewayError as failure:
        if begun:
            # Returning without the last message makes the server cut the
            # connection: the client sees a broken answer, as it was.
            _log.warning("an answer broke off: %s", failure)
        else:
            await _refuse(send, failure, extra, metrics)


def _unfit() -> GatewayError:
    return GatewayError(400, "a header holds control characters")


async def _refuse(send: Send, failure: GatewayError, extra: legs.Headers, metrics: Metrics) -> None:
    metrics.refusals.labels(failure.status).inc()
    await clients.refuse(send, failure, extra)


def _path(scope: Scope) -> str:
    query = quote(scope.get("query_string", b""), safe=_IN_QUERY)
    return f"{scope['path']}?{query}" if query else str(scope["path"])
