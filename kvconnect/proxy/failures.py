"""What goes wrong between the proxy and its servers."""

from __future__ import annotations

from typing import Literal

from kvconnect.errors import KVConnectError


class ServerError(KVConnectError):
    """A server that did not answer to the end: never reached, too slow, or gone in the middle."""

    def __init__(self, cause: Literal["unreachable", "timeout", "broken"], reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


class GatewayError(KVConnectError):
    """A request that the proxy answers itself, the HTTP status for it, and its cause in one word, for metrics."""

    def __init__(self, status: int, reason: str, cause: str = "refused") -> None:
        super().__init__(reason)
        self.status, self.reason, self.cause = status, reason, cause
