"""The servers of one leg: used in turn, every wait bounded, failures as data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import httpx

from kvconnect.errors import KVConnectError
from kvconnect.proxy.legs import Headers

_log = logging.getLogger("kvconnect.proxy")

#: Closing a connection waits for nobody but the kernel; this is for TLS.
_CLOSE_S = 1.0


class GatewayError(KVConnectError):
    """A request that no server answered, and the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Upstream:
    """Servers that can stand in for each other.

    A server that cannot be reached is passed over for the next: it has seen
    nothing of the request. After that nothing is ever sent twice.
    """

    def __init__(self, leg: str, urls: Sequence[str], client: httpx.AsyncClient, timeout_s: float) -> None:
        self.leg, self.urls = leg, tuple(urls)
        self._client = client
        self._timeout_s = timeout_s
        self._turn = itertools.count()

    @asynccontextmanager
    async def answer(self, method: str, path: str, headers: Headers, content: bytes) -> AsyncIterator[httpx.Response]:
        """Send a request and give the response as soon as its headers are there, body unread.

        Leaving the context closes the connection unless the body was read to its
        end, which is how vLLM learns to abort the request.

        Raises:
            GatewayError: no server could be reached, or the one that was did not answer in time.

        """
        response = await self._first_reachable(method, path, headers, content)
        try:
            yield response
        finally:
            with anyio.move_on_after(_CLOSE_S, shield=True):
                await response.aclose()

    async def ask(self, method: str, path: str, headers: Headers, content: bytes = b"") -> tuple[httpx.Response, bytes]:
        """Send a request and read the whole (decoded) answer, all within the leg's time limit.

        Raises:
            GatewayError: as `answer`, or the answer broke off.

        """
        try:
            with anyio.fail_after(self._timeout_s):
                async with self.answer(method, path, headers, content) as response:
                    return response, await response.aread()
        except TimeoutError as error:
            raise self._timed_out() from error
        except httpx.HTTPError as error:
            raise self._failed(error) from error

    async def health(self, timeout_s: float) -> dict[str, str]:
        """Return ``{url: "ok" or what is wrong}`` for every server."""
        verdicts: dict[str, str] = {}

        async def check(url: str) -> None:
            try:
                with anyio.fail_after(timeout_s):
                    response = await self._client.get(f"{url}/health")
            except (TimeoutError, httpx.HTTPError) as error:
                verdicts[url] = _describe(error)
            else:
                verdicts[url] = "ok" if response.is_success else f"answered {response.status_code}"

        async with anyio.create_task_group() as group:
            for url in self.urls:
                group.start_soon(check, url)
        return verdicts

    async def _first_reachable(self, method: str, path: str, headers: Headers, content: bytes) -> httpx.Response:
        start = next(self._turn)
        last: httpx.HTTPError | None = None
        for step in range(len(self.urls)):
            url = self.urls[(start + step) % len(self.urls)]
            request = self._request(method, url + path, headers, content)
            try:
                with anyio.fail_after(self._timeout_s):
                    return await self._client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                _log.warning("%s server %s cannot be reached: %s", self.leg, url, _describe(error))
                last = error
            except (TimeoutError, httpx.TimeoutException) as error:
                raise self._timed_out() from error
            except httpx.HTTPError as error:
                raise self._failed(error) from error
        raise GatewayError(502, f"{self.leg} unreachable") from last

    def _request(self, method: str, url: str, headers: Headers, content: bytes) -> httpx.Request:
        try:
            return self._client.build_request(method, url, headers=headers, content=content)
        except httpx.InvalidURL as error:
            raise GatewayError(400, f"the request's path or query cannot be passed on: {error}") from error

    def _timed_out(self) -> GatewayError:
        return GatewayError(504, f"{self.leg} timed out after {self._timeout_s:g} s")

    def _failed(self, error: httpx.HTTPError) -> GatewayError:
        if isinstance(error, httpx.TimeoutException):
            return self._timed_out()
        return GatewayError(502, f"{self.leg} connection broke ({type(error).__name__})")


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
