"""Run the proxy under uvicorn."""

from __future__ import annotations

import logging
import math
import resource
import socket

import uvicorn

from kvconnect.errors import ConfigError
from kvconnect.proxy import heads
from kvconnect.proxy.app import build
from kvconnect.proxy.settings import Settings

_log = logging.getLogger("kvconnect.proxy")

_MAX_INT = 2**31 - 1


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
        http=heads.within(settings.client_timeout_s),
        log_config=None,
        log_level="warning",
        ws="none",  # no endpoint of vLLM that we pass speaks it
        # The servers' own headers go through instead.
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=math.ceil(settings.stop_timeout_s),
    )
    # Every request takes two connections; a shell's usual limit of 1024 files would be less than max_in_flight.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with _listen(host, port, settings.client_timeout_s) as listener:
        _log.info(
            "listening on %s:%d, prefill %s, decode %s",
            *listener.getsockname()[:2],
            ", ".join(settings.prefill),
            ", ".join(settings.decode),
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int, client_timeout_s: float) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    # Connections inherit it. The application gives such a client up, but closing its connection
    # waits until what is buffered has gone out: this ends the connection, too.
    limit_ms = min(round(client_timeout_s * 1000) or 1, _MAX_INT)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
    return listener
