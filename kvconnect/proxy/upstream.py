"""One leg: a server is chosen and asked, every wait bounded, failures as data."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvconnect.proxy.connections import Answer, Connections
from kvconnect.proxy.failures import GatewayError, ServerError
from kvconnect.proxy.legs import Request
from kvconnect.proxy.metrics import Metrics
from kvconnect.proxy.policies import Policy
from kvconnect.proxy.servers import Pool, Server

_BUSY = 503


class Upstream:
    """Servers that can stand in for each other.

    A server that cannot be reached has seen nothing of a request, and one that
    answers 503 has not begun it: another one is asked. Otherwise nothing is ever sent twice.
    """

    def __init__(
        self,
        leg: str,
        servers: Pool,
        choose: Policy,
        connections: Connections,
        metrics: Metrics,
        *,
        timeout_s: float,
        retries: int,
    ) -> None:
        self.leg = leg
        self._servers, self._choose, self._connections, self._metrics = servers, choose, connections, metrics
        self._timeout_s, self._retries = timeout_s, retries

    @asynccontextmanager
    async def answer(self, request: Request) -> AsyncIterator[Answer]:
        """Send a request and give the answer as soon as its headers are there, body unread.

        Leaving the context closes the connection unless the body was read to its
        end, which is how vLLM learns to abort the request.

        Raises:
            GatewayError: no server could be reached, the one that was did not answer in time, or
                the answer broke off while it was read.

        """
        with self._metrics.timed(self.leg) as outcome:
            try:
                answer, server = await self._first_willing(request)
                outcome.status = answer.status
                try:
                    yield answer
                finally:
                    _end(server, answer)
            except ServerError as failure:
                raise self._gateway_error(failure) from failure

    async def ask(self, request: Request) -> tuple[Answer, bytes]:
        """Send a request and read the whole answer, all within the leg's time limit.

        Raises:
            GatewayError: as `answer`.

        """
        with self._metrics.timed(self.leg) as outcome:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer, server = await self._first_willing(request)
                    outcome.status = answer.status
                    try:
                        return answer, await answer.body()
                    finally:
                        _end(server, answer)
            except TimeoutError as error:
                raise self._gateway_error(ServerError("timeout", "")) from error
            except ServerError as failure:
                raise self._gateway_error(failure) from failure

    async def _first_willing(self, request: Request) -> tuple[Answer, Server]:
        content, tried = request.content, list[Server]()
        while True:
            server = self._next(tried, request.prefix)
            tried.append(server)
            try:
                answer = await self._begin(server, request, content)
            except ServerError as failure:
                if failure.cause != "unreachable":
                    raise
                server.leave_out(f"it cannot be reached: {failure}")
                if not self._may_retry(tried):
                    raise
                cause = "unreachable"
            else:
                if answer.status != _BUSY or not self._may_retry(tried):
                    return answer, server
                _end(server, answer)
                content = request.content_once_read()
                cause = "busy"
            self._metrics.retries.labels(self.leg, cause).inc()

    def _untried(self, tried: Sequence[Server]) -> list[Server]:
        return [server for server in self._servers if server not in tried]

    def _may_retry(self, tried: Sequence[Server]) -> bool:
        return len(tried) <= self._retries and bool(self._untried(tried))

    def _next(self, tried: Sequence[Server], prefix: str) -> Server:
        if not (untried := self._untried(tried)):
            raise ServerError("unreachable", "no name of theirs has an address")
        # If all are left out, better one of them than none: checks may be wrong, or late.
        server = self._choose([server for server in untried if server.in_rotation] or untried, prefix)
        server.chosen_s = time.monotonic()
        return server

    async def _begin(self, server: Server, request: Request, content: bytes) -> Answer:
        """Return the answer with its headers; the server has the request in flight until `_end`."""
        server.in_flight += 1
        try:
            url = server.url + request.path
            return await self._connections.send(request.method, url, request.headers, content, self._timeout_s)
        except BaseException:  # cancelled, too, where its client left: nobody will call `_end`
            server.in_flight -= 1
            raise

    def _gateway_error(self, failure: ServerError) -> GatewayError:
        match failure.cause:
            case "unreachable":
                return GatewayError(502, f"{self.leg} unreachable", failure.cause)
            case "timeout":
                return GatewayError(504, f"{self.leg} timed out after {self._timeout_s:g} s", failure.cause)
            case "broken":
                return GatewayError(502, f"{self.leg} connection broke ({failure})", failure.cause)


def _end(server: Server, answer: Answer) -> None:
    server.in_flight -= 1
    answer.close()
