"""What the proxy is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from kvconnect.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Servers and time limits of one proxy.

    Args:
        prefill: base URLs of the prefill servers, used in turn.
        decode: base URLs of the decode servers, used in turn.
        connect_timeout_s: for opening a connection to a server.
        prefill_timeout_s: for the whole of a prefill request; afterwards the decode server computes alone.
        decode_timeout_s: for a decode server's response headers, and between two pieces of its body.
        client_timeout_s: for a client to send a piece of its request or to take a piece of its answer;
            one that does neither for so long is given up, and its request at the servers with it.
        health_timeout_s: for each server asked by ``/health``.
        max_body_bytes: largest request body that is accepted.

    """

    prefill: tuple[str, ...] = ("http://127.0.0.1:8100",)
    decode: tuple[str, ...] = ("http://127.0.0.1:8200",)
    connect_timeout_s: float = 5.0
    prefill_timeout_s: float = 300.0
    decode_timeout_s: float = 600.0
    client_timeout_s: float = 60.0
    health_timeout_s: float = 5.0
    max_body_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Check and normalise; raises `ConfigError`."""
        for leg in ("prefill", "decode"):
            urls = tuple(base_url(leg, url) for url in getattr(self, leg))
            if not urls:
                raise ConfigError(f"the proxy needs at least one {leg} server (--{leg} URL)")
            object.__setattr__(self, leg, urls)
        for name in ("connect", "prefill", "decode", "client", "health"):
            limit_s = getattr(self, f"{name}_timeout_s")
            if limit_s <= 0:
                raise ConfigError(f"{name}_timeout_s must be greater than 0, got {limit_s}")


def base_url(leg: str, url: str) -> str:
    """Return ``http[s]://host:port``; a bare ``host:port`` is taken for http."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not one
        valid = False
    if "@" in full.partition("://")[2].partition("/")[0]:
        # The URL shows in logs and in /health; so not even here is it repeated.
        raise ConfigError(f"--{leg} must look like 'http://host:port': leave out the user and password before the '@'")
    if not valid or parts.path.strip("/") or parts.query:
        raise ConfigError(f"--{leg} must look like 'http://host:port', got {url!r}")
    return f"{parts.scheme}://{parts.netloc}"
