"""What all pipes of one worker have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvconnect.buffers.address import listen_address
from kvconnect.buffers.base import EndSettings
from kvconnect.buffers.channels import Channels, Side
from kvconnect.buffers.choice import AutoOptions
from kvconnect.buffers.hello import Hello
from kvconnect.control import ControlClient
from kvconnect.errors import KVConnectError, as_ours
from kvconnect.paging import PagedMemory
from kvconnect.pipes.base import Message, Pipe, PipeSpec


@dataclass(frozen=True)
class Station:
    """One worker: what both ends of its pipes are opened with.

    Args:
        settings: of its engine.
        me: its engine's hello.
        worker: its own description (`WorkerEnd.describe`).
        memory: its paged memory.
        client: for asking peers; its thread owns `Links`.
        channels: of all its pipes.

    """

    settings: EndSettings
    me: Hello
    worker: Mapping[str, Any]
    memory: PagedMemory
    client: ControlClient
    channels: Channels

    def open(self, cls: type[Pipe], name: str, side: Side, exchange: Callable[[Message], Message]) -> Pipe:
        """Open one end, with the options that the configuration has for it."""
        options = AutoOptions.of(self.settings.pipe).options.get(name, {})
        config = self.settings.options
        spec = PipeSpec(
            side,
            exchange,
            self.memory.device,
            config.transfer_timeout_s,
            options,
            self.client.check,
            bind_host=listen_address(config)[0],
            advertise_host=config.advertise_host,
        )
        pipe = cls.open(spec)
        if "timeout_s" not in vars(pipe) and cls.timeout_s is Pipe.timeout_s:
            # Its author may have thought of the three methods only.
            pipe.timeout_s = spec.timeout_s
        return pipe


def foreign(error: BaseException) -> KVConnectError:
    """Return a pipe's error, or whatever a third party's pipe raised, as one of ours."""
    return as_ours(error, "the pipe failed: ")
