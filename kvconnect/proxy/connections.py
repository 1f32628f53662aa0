"""HTTP to the servers. Errors of its library end here."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import aiohttp
from yarl import URL

from kvconnect.proxy.failures import ServerError
from kvconnect.proxy.legs import Headers, fit

#: Below uvicorn's 5 s, so that the server is never the one to close an idle connection.
_IDLE_S = 2.0
_LARGE_BYTES = 1 << 18
#: Of an answer that is read whole: one token, or a verdict.
_MOST_BYTES = 64 << 20
#: What the library would add; the client's own headers go through instead.
_NOT_OURS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class Answer:
    """A server's answer, whose body is read as it comes, in the encoding in which it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Headers = list(response.raw_headers)

    @property
    def is_success(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    async def piece(self) -> bytes:
        """Return what has come of the body, as soon as there is any; b"" at its end. Raises `ServerError`."""
        with _mapped():
            return await self._response.content.readany()

    async def body(self) -> bytes:
        """Return the rest of the body. Raises `ServerError`, also for one without end."""
        content = bytearray()
        while piece := await self.piece():
            content += piece
            if len(content) > _MOST_BYTES:
                raise ServerError("broken", f"more than {_MOST_BYTES} bytes")
        return bytes(content)

    def close(self) -> None:
        """Close the connection, unless the body was read to its end."""
        self._response.close()


class Connections:
    """Connections to all servers, kept for a while after use. A context, entered in the event loop."""

    def __init__(self, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),  # servers queue requests, not the proxy
            # A cookie belongs to the client that it was meant for; a jar would send it with everybody's requests.
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_NOT_OURS,
            trust_env=False,  # HTTP_PROXY is meant for the way out, not for the engines behind us
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, method: str, url: str, headers: Headers, content: bytes, timeout_s: float) -> Answer:
        """Send a request; return its answer when the headers have come.

        Args:
            method: of HTTP.
            url: with everything escaped that has to be.
            headers: as they came; what is not UTF-8 in them is taken for Latin-1.
            content: the body.
            timeout_s: for the headers, and between two pieces of the answer's body.

        Raises:
            ServerError: there is none.

        """
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s, sock_read=timeout_s)
        with _mapped():
            async with asyncio.timeout(timeout_s):
                response = await self._session.request(
                    method,
                    URL(url, encoded=True),
                    headers=[(_text(name), _text(value)) for name, value in headers],
                    # In pieces, if it is large, so that other requests go on meanwhile.
                    data=io.BytesIO(content) if len(content) > _LARGE_BYTES else content or None,
                    timeout=limits,
                    allow_redirects=False,
                )
        answer = Answer(response)
        if not 200 <= answer.status < 600 or not fit(answer.headers):
            # The library reads what none may send: our own server could not pass it on.
            answer.close()
            raise ServerError("broken", f"status {answer.status}, or a header, that HTTP does not allow")
        return answer


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ServerError("unreachable", str(error)) from error
    except TimeoutError as error:
        raise ServerError("timeout", str(error) or type(error).__name__) from error
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError("broken", type(error).__name__) from error


def _text(part: bytes) -> str:
    try:
        return part.decode()
    except UnicodeDecodeError:
        return part.decode("latin-1")
