"""A Redis server that engines reach through a wire, so that a test can strike in the middle of a transfer.

The wire holds the bytes of one direction when so many of them have passed, and the server itself says how far it got.
"""

from __future__ import annotations

from typing import Self

from kvconnect.demo.engines import free_port
from tests.buffers.redis_server import RedisServer
from tests.faults.wires import DataWire

_HERE, _TOLD = "127.0.0.1", "127.0.0.2"


class WiredRedis:
    """A server at one address and its wire at another; ``url`` is what engines are told."""

    def __init__(self) -> None:
        port = free_port(_TOLD)
        self.url = f"redis://{_TOLD}:{port}/0"
        self.server = RedisServer("--bind", _HERE, "--port", str(port), url=f"redis://{_HERE}:{port}/0")
        self.wire = DataWire(_TOLD, _HERE, port)

    # -- how far it got -------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Chunks that are there."""
        return len(self.server.client.keys("kvconnect:c:*"))

    @property
    def gets(self) -> int:
        """Chunks that were asked for since the server started, or ``CONFIG RESETSTAT``."""
        commands = self.server.client.info("commandstats")
        return int(commands.get("cmdstat_get", {"calls": 0})["calls"])

    def entries(self, kind: str) -> int:
        """Entries that are ``"offered"`` or ``"taken"``."""
        return int(self.server.client.zcard(f"kvconnect:{kind}"))

    # -- what becomes of it -----------------------------------------------------------

    def dies(self) -> None:
        """What it has sent arrives; what it is sent meets nobody."""
        self.server.kill()
        self.wire.let_go()

    def dies_within_a_chunk(self) -> None:
        """What it has sent is lost, too."""
        self.server.kill()
        self.wire.cut()
        self.wire.let_go()

    def comes_back_empty(self) -> None:
        """Nobody hears of its end before it is there again."""
        self.wire.stall()
        self.server.kill()
        self.server.start()
        self.wire.heal()

    def hangs(self) -> None:
        """Until ``server.go_on``."""
        self.server.stop()
        self.wire.let_go()

    def close(self) -> None:
        """End both."""
        self.wire.close()
        self.server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
