"""One leg: a server is chosen and asked, every wait bounded, failures as data."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import httpx

from kvconnect.proxy.failures import GatewayError
from kvconnect.proxy.legs import Request
from kvconnect.proxy.metrics import Metrics
from kvconnect.proxy.policies import Policy
from kvconnect.proxy.servers import Server

#: Closing a connection waits for nobody but the kernel; this is for TLS.
_CLOSE_S = 1.0
_BUSY = 503


class Upstream:
    """Servers that can stand in for each other.

    A server that cannot be reached has seen nothing of a request, and one that
    answers 503 has not begun it: another one is asked. Otherwise nothing is ever sent twice.
    """

    def __init__(
        self,
        leg: str,
        servers: Sequence[Server],
        choose: Policy,
        client: httpx.AsyncClient,
        metrics: Metrics,
        *,
        timeout_s: float,
        retries: int,
    ) -> None:
        self.leg = leg
        self._servers, self._choose, self._client, self._metrics = tuple(servers), choose, client, metrics
        self._timeout_s, self._tries = timeout_s, min(1 + retries, len(servers))

    @asynccontextmanager
    async def answer(self, request: Request) -> AsyncIterator[httpx.Response]:
        """Send a request and give the response as soon as its headers are there, body unread.

        Leaving the context closes the connection unless the body was read to its
        end, which is how vLLM learns to abort the request.

        Raises:
            GatewayError: no server could be reached, the one that was did not answer in time, or
                the answer broke off while it was read.

        """
        with self._metrics.timed(self.leg) as outcome:
            async with self._answer(request) as response:
                outcome.status = response.status_code
                yield response

    async def ask(self, request: Request) -> tuple[httpx.Response, bytes]:
        """Send a request and read the whole (decoded) answer, all within the leg's time limit.

        Raises:
            GatewayError: as `answer`.

        """
        with self._metrics.timed(self.leg) as outcome:
            try:
                with anyio.fail_after(self._timeout_s):
                    async with self._answer(request) as response:
                        outcome.status = response.status_code
                        return response, await response.aread()
            except TimeoutError as error:
                raise self._timed_out() from error

    @asynccontextmanager
    async def _answer(self, request: Request) -> AsyncIterator[httpx.Response]:
        response, server = await self._first_willing(request)
        try:
            yield response
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        finally:
            await _end(server, response)

    async def _first_willing(self, request: Request) -> tuple[httpx.Response, Server]:
        content, tried = request.content, list[Server]()
        while True:
            server = self._next(tried, request.prefix)
            tried.append(server)
            may_retry = len(tried) < self._tries
            try:
                response = await self._begin(server, request, content)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                server.leave_out(f"it cannot be reached: {str(error) or type(error).__name__}")
                if not may_retry:
                    raise GatewayError(502, f"{self.leg} unreachable", "unreachable") from error
                cause = "unreachable"
            else:
                if response.status_code != _BUSY or not may_retry:
                    return response, server
                await _end(server, response)
                content = request.content_once_read()
                cause = "busy"
            self._metrics.retries.labels(self.leg, cause).inc()

    def _next(self, tried: Sequence[Server], prefix: str) -> Server:
        untried = [server for server in self._servers if server not in tried]
        # If all are left out, better one of them than none: checks may be wrong, or late.
        server = self._choose([server for server in untried if server.in_rotation] or untried, prefix)
        server.chosen_s = time.monotonic()
        return server

    async def _begin(self, server: Server, request: Request, content: bytes) -> httpx.Response:
        """Return the response with its headers; the server has the request in flight until `_end`."""
        try:
            outgoing = self._client.build_request(
                request.method, server.url + request.path, headers=request.headers, content=content
            )
        except httpx.InvalidURL as error:
            raise GatewayError(400, f"the request's path or query cannot be passed on: {error}") from error
        server.in_flight += 1
        response = None
        try:
            with anyio.fail_after(self._timeout_s):
                response = await self._client.send(outgoing, stream=True)
                return response
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise
        except (TimeoutError, httpx.TimeoutException) as error:
            raise self._timed_out() from error
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        finally:
            if response is None:
                server.in_flight -= 1

    def _timed_out(self) -> GatewayError:
        return GatewayError(504, f"{self.leg} timed out after {self._timeout_s:g} s", "timeout")

    def _failed(self, error: httpx.HTTPError) -> GatewayError:
        if isinstance(error, httpx.TimeoutException):
            return self._timed_out()
        return GatewayError(502, f"{self.leg} connection broke ({type(error).__name__})", "broken")


async def _end(server: Server, response: httpx.Response) -> None:
    server.in_flight -= 1
    with anyio.move_on_after(_CLOSE_S, shield=True):
        await response.aclose()
