"""A limit in time and size on what comes before a request's body.

uvicorn has none in time, and, with its quicker parser, none in size either: connections that say
nothing would be kept for ever, and a header without end would fill the memory.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    # Which of the two uvicorn takes depends on what is installed; both have what is used here.
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:
    Protocol = object

#: What its other parser allows.
_MOST_BYTES = 1 << 16


def within(limit_s: float, protocol: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, but ending connections on which a request's head takes longer than ``limit_s``."""
    return type("BoundedHeads", (_BoundedHeads, protocol), {"limit_s": limit_s})


class _BoundedHeads(Protocol):
    """A head is awaited from the connection, or the head's own first byte, until it is there."""

    limit_s: float
    #: The request that was read last.
    cycle: Any
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if before is None or not before.more_body:
            self._await_head()
            self._head_bytes += len(data)
        super().data_received(data)
        if self.cycle is not before:
            self._has_head()
        elif self._head_bytes > _MOST_BYTES:
            self.transport.close()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limit_s, self._expire)

    def _has_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expire(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # a next request has begun to come, which has time until this one's answer has ended
            self._await_head()
