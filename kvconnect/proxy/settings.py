"""What the proxy is told at its start."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from kvconnect.errors import ConfigError
from kvconnect.proxy.policies import POLICIES, PolicyName
from kvconnect.proxy.servers import LOOKED_UP

#: The smallest value of each whole number.
_LEAST = {"prefix_characters": 1, "retries": 0, "health_failures": 1, "max_in_flight": 1, "max_body_bytes": 1}


@dataclass(frozen=True)
class Settings:
    """Servers, policies and limits of one proxy.

    Args:
        prefill: base URLs of the prefill servers; ``dns+http://name:port`` is one at each address of the name, which
            is looked up every ``health_interval_s``.
        decode: likewise the decode servers.
        prefill_policy: which of them gets a request: each in turn, the one with the fewest of this proxy's requests
            in flight, or the one that had prompts which began alike.
        decode_policy: likewise.
        prefix_characters: how much of a prompt's beginning ``prefix_aware`` looks at.
        retries: how often a request that a server has not begun to answer (it cannot be reached, or says 503) is
            given to another one.
        connect_timeout_s: for opening a connection to a server.
        prefill_timeout_s: for the whole of a prefill request; afterwards the decode server computes alone.
        decode_timeout_s: for a decode server's response headers, and between two pieces of its body.
        client_timeout_s: for a client to send a piece of its request or to take a piece of its answer;
            one that does neither for so long is given up, and its request at the servers with it.
        stop_timeout_s: for requests that have begun, once the proxy is told to stop; what is left is cut.
        health_timeout_s: for each server asked by ``/health``.
        health_interval_s: between two checks of every server's ``/health``.
        health_failures: checks in a row after which a server is left out; one that cannot be reached is at once.
            It is back with the first check that is good.
        max_in_flight: requests at a time; more are answered 503, with Retry-After.
        max_body_bytes: largest request body that is accepted.

    """

    prefill: tuple[str, ...] = ("http://127.0.0.1:8100",)
    decode: tuple[str, ...] = ("http://127.0.0.1:8200",)
    prefill_policy: PolicyName = "round_robin"
    decode_policy: PolicyName = "round_robin"
    prefix_characters: int = 512
    retries: int = 2
    connect_timeout_s: float = 5.0
    prefill_timeout_s: float = 300.0
    decode_timeout_s: float = 600.0
    client_timeout_s: float = 60.0
    stop_timeout_s: float = 5.0
    health_timeout_s: float = 5.0
    health_interval_s: float = 5.0
    health_failures: int = 3
    max_in_flight: int = 1000
    max_body_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Check and normalise; raises `ConfigError`."""
        for leg in ("prefill", "decode"):
            object.__setattr__(self, leg, _servers(leg, getattr(self, leg)))
            if (policy := getattr(self, f"{leg}_policy")) not in POLICIES:
                raise ConfigError(f"{leg}_policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        for name in (field.name for field in fields(self) if field.name.endswith("_s")):
            if not 0 < (limit_s := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} must be greater than 0 and finite, got {limit_s}")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")


def _servers(leg: str, urls: tuple[str, ...]) -> tuple[str, ...]:
    bases = tuple(base_url(leg, url) for url in urls)
    if not bases:
        raise ConfigError(f"the proxy needs at least one {leg} server (--{leg} URL)")
    if twice := next((url for url in bases if bases.count(url) > 1), None):
        raise ConfigError(f"--{leg} names {twice} twice; name each server once")
    return bases


def base_url(leg: str, url: str) -> str:
    """Return ``http[s]://host:port`` or ``dns+http://host:port``; a bare ``host:port`` is taken for http."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        # No dns+https: a certificate is for the name, and the servers are asked by their addresses.
        valid = parts.scheme in ("http", "https", f"{LOOKED_UP}http") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not one
        valid = False
    if "@" in full.partition("://")[2].partition("/")[0]:
        # The URL shows in logs and in /health; so not even here is it repeated.
        raise ConfigError(f"--{leg} must look like 'http://host:port': leave out the user and password before the '@'")
    if not valid or parts.path.strip("/") or parts.query:
        raise ConfigError(f"--{leg} must look like 'http://host:port', got {url!r}")
    return f"{parts.scheme}://{parts.netloc}"
