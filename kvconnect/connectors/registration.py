"""Registration at a router: an engine says where its API server is, so that the router needs no list.

The message is that of vLLM's router (``vllm-router --vllm-discovery-address``): a map in
MessagePack over ZeroMQ, again and again; a router forgets who has fallen silent.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Final

import msgpack
import zmq

from kvconnect.errors import ConfigError
from kvconnect.loop import Loop

if TYPE_CHECKING:
    from kvconnect.buffers.base import EndSettings

logger = logging.getLogger(__name__)

_EVERY_S: Final = 1.0
_CONNECT_S: Final = 0.5


class Registration:
    """Tells a router of this engine from when its API server listens, on a thread of its own."""

    def __init__(self, settings: EndSettings) -> None:
        """Begin; waits for nobody.

        Raises:
            ConfigError: the router could use the engine neither as a producer nor as a consumer, since it is both;
                or its address is none.

        """
        config = settings.options
        if settings.produces == settings.consumes:
            raise ConfigError(
                "kv_connector_extra_config.router_discovery: a router wants prefill or decode engines: "
                "set kv_role to kv_producer or kv_consumer"
            )
        self._http, self._router = config.http_address or "", config.router_discovery
        self._told = False
        # The second address is part of the name that the router gives a request, and nothing more.
        self._message = msgpack.packb(
            {"type": "P" if settings.produces else "D", "http_address": self._http, "zmq_address": self._http}
        )
        self._loop = Loop("kvconnect-router", settings.clock)
        self._socket = self._loop.context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 1)  # what a router that is away has missed is of no use to it
        self._socket.setsockopt(zmq.IPV6, 1)  # names and addresses of both kinds
        self._loop.watch(self._socket, self._hear)
        try:
            self._socket.connect(f"tcp://{config.router_discovery}")
        except zmq.ZMQError as error:
            self._loop.close()
            raise ConfigError(
                f"kv_connector_extra_config.router_discovery is no address: {config.router_discovery!r} ({error})"
            ) from error
        self._loop.later(0.0, self._tell)
        self._loop.start()

    def close(self) -> None:
        """Say nothing more."""
        self._loop.close()

    def _tell(self) -> None:
        if self._serves():
            if not self._told:
                logger.info("%s listens; the router at %s is told so from now on", self._http, self._router)
                self._told = True
            try:
                self._loop.send(self._socket, [self._message])
            except zmq.Again:
                logger.debug("the router does not listen")
        self._loop.later(_EVERY_S, self._tell)

    def _hear(self) -> None:
        """Drop what a router answers."""
        self._socket.recv_multipart(zmq.NOBLOCK)

    def _serves(self) -> bool:
        """Whether the API server listens yet: requests that come before would fail."""
        host, _, port = self._http.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
            logger.debug("%s does not listen yet: %s", self._http, error)
            return False
        return True
