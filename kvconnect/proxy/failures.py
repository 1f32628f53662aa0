"""What the proxy answers itself, because no server did."""

from __future__ import annotations

from kvconnect.errors import KVConnectError


class GatewayError(KVConnectError):
    """A request that no server answered, the HTTP status that says so, and its cause in one word, for metrics."""

    def __init__(self, status: int, reason: str, cause: str = "refused") -> None:
        super().__init__(reason)
        self.status, self.reason, self.cause = status, reason, cause
