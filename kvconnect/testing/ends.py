"""One pipe seen from this end, and the other end as something that does what it is told.

`DrivenEnd` obeys small commands, in this process (`LocalEnd`) or in another one
(`kvconnect.testing.processes.RemoteEnd`): a law over an `End` holds for both.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes.base import Channel, Pipe
from kvconnect.testing.devices import complete, on_stream
from kvconnect.testing.layouts import naive_stream, noisy_memory
from kvconnect.testing.peers import LIMIT_S, PipePair, spawn

#: Number of the stream (`kvconnect.testing.devices.own_stream`) that is current while an end obeys.
_STREAM = 0


class DrivenEnd:
    """The other end of a pipe. Its public methods are commands; values go in and out as plain data."""

    def __init__(self, pipe: Pipe, channel: Channel, device: str) -> None:
        self.pipe, self._channel, self._device = pipe, channel, device
        self._memory: PagedMemory | None = None

    def obey(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run one command; on CUDA, with a stream as the current one that is neither the default nor the pipe's."""
        with on_stream(self._device, _STREAM):
            return getattr(self, command)(**arguments) or {}

    def echo(self, count: int) -> None:
        """Receive ``count`` messages and send each back."""
        for _ in range(count):
            self.pipe.send_tensor(self.pipe.recv_tensor())

    def send(self, count: int, nbytes: int) -> None:
        """Send messages of bytes 0, 1, …, which are complete before, and stay until all went."""
        made = [torch.full((nbytes,), i % 256, dtype=torch.uint8, device=self._device) for i in range(count)]
        complete(self._device)
        for tensor in made:
            self.pipe.send_tensor(tensor)
        complete(self._device)

    def receive(self, count: int) -> dict[str, Any]:
        """Receive messages and return their checksums, taken once nothing is under way on the device."""
        got = [self.pipe.recv_tensor() for _ in range(count)]
        complete(self._device)
        return {"crc": [None if tensor is None else checksum(tensor) for tensor in got]}

    def attach(self, mine: dict[str, Any], theirs: dict[str, Any], seed: int) -> None:
        """Make noise the end's paged memory."""
        self._memory = noisy_memory(PagedLayout.from_wire(mine), seed, self._device)
        self.pipe.attach(self._memory, PagedLayout.from_wire(theirs), self._channel)

    def stream(self, blocks: BlockIds) -> dict[str, Any]:
        """Return the checksum of the blocks."""
        if self._memory is None:
            raise RuntimeError("not attached")
        return {"crc": checksum(naive_stream(self._memory, blocks))}

    def read(self, remote: BlockIds, local: BlockIds) -> None:
        """Read blocks and wait."""
        self.pipe.read_blocks(remote, local).wait(LIMIT_S)

    def close(self) -> None:
        """Close the end."""
        self.pipe.close()

    def abort(self) -> None:
        """Abort the end."""
        self.pipe.abort()


class End(ABC):
    """Our end of a pipe, and commands for the other one.

    Args:
        pipe: our end.
        channel: beside it, for `Pipe.attach`.
        device: where our tensors and paged memory are.
        devices: all devices that the pipe uses in this process.

    """

    def __init__(self, pipe: Pipe, channel: Channel, device: str, devices: frozenset[str]) -> None:
        self.pipe, self.channel, self.device, self.devices = pipe, channel, device, devices

    @abstractmethod
    def tell(self, command: str, **arguments: Any) -> Future[dict[str, Any]]:
        """Have the other end run a method of `DrivenEnd`; the future fails with its error."""

    def attach(self, mine: PagedMemory, theirs: PagedLayout, seed: int) -> PagedMemory:
        """Attach both ends; theirs gets `noisy_memory` (``theirs``, ``seed``), of which this returns a CPU copy."""
        arguments = {"mine": theirs.to_wire(), "theirs": mine.layout.to_wire(), "seed": seed}
        self.tell("attach", **arguments).result(LIMIT_S)
        self.pipe.attach(mine, theirs, self.channel)
        return noisy_memory(theirs, seed)


class LocalEnd(End):
    """`PipePair.here`, with `PipePair.there` to be told what to do."""

    def __init__(self, pair: PipePair) -> None:
        devices = frozenset({pair.device, pair.peer_device})
        super().__init__(pair.here, pair.channels[0], pair.device, devices)
        self._driven = DrivenEnd(pair.there, pair.channels[1], pair.peer_device)

    def tell(self, command: str, **arguments: Any) -> Future[dict[str, Any]]:
        """Run the command in a thread of its own."""
        return spawn(lambda: self._driven.obey(command, arguments))


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
