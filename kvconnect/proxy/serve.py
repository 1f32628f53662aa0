"""Run the proxy under uvicorn."""

from __future__ import annotations

import logging
import socket

import uvicorn

from kvconnect.errors import ConfigError
from kvconnect.proxy.app import build
from kvconnect.proxy.settings import Settings

_log = logging.getLogger("kvconnect.proxy")


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until interrupted.

    Args:
        settings: the servers behind.
        host: address to listen on.
        port: port to listen on; 0 takes a free one, which the log names.

    Raises:
        ConfigError: the address cannot be listened on.

    """
    config = uvicorn.Config(
        build(settings),
        log_config=None,
        log_level="warning",
        ws="none",  # no endpoint of vLLM that we pass speaks it
        # The servers' own headers go through instead.
        server_header=False,
        date_header=False,
        # At a stop, open streams are given this long and are then cut.
        timeout_graceful_shutdown=5,
    )
    with _listen(host, port) as listener:
        _log.info(
            "listening on %s:%d, prefill %s, decode %s",
            *listener.getsockname()[:2],
            ", ".join(settings.prefill),
            ", ".join(settings.decode),
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
