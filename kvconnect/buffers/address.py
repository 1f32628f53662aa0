"""Where an engine listens, what it tells peers, and whom it knows: the configuration's address rules."""

from __future__ import annotations

import ipaddress

from kvconnect.config import Config
from kvconnect.errors import ConfigError

#: vLLM's own default of ``kv_port``.
_KV_PORT = 14579


def listen_address(options: Config) -> tuple[str, int]:
    """Return host and port for the scheduler's control server, after the old fields' rule."""
    if options.kv_ip is not None and not is_loopback(options.kv_ip):
        return options.kv_ip, options.port or (options.kv_port or _KV_PORT) + (options.kv_rank or 0)
    return options.bind_host, options.port


def advertised(options: Config, host: str, port: int) -> str:
    """Return the address that peers are told; raise `ConfigError` if there is none to tell."""
    if options.advertise_host is None and host in ("0.0.0.0", "::", "*"):  # noqa: S104 - a comparison
        raise ConfigError(f"bind_host {host} is no address for peers; set advertise_host to one that they can reach")
    return f"{options.advertise_host or host}:{port}"


def fixed_producers(options: Config) -> list[str]:
    """Return the producers' addresses that the configuration names."""
    peers = list(options.peers)
    if options.kv_ip is not None and not is_loopback(options.kv_ip):
        base = options.kv_port or _KV_PORT
        ranks = range(options.kv_parallel_size or 1)
        peers += [f"{options.kv_ip}:{base + rank}" for rank in ranks if rank != options.kv_rank]
    return peers


def is_loopback(address: str) -> bool:
    """Whether a host is this one by definition."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
