"""Both ends of every medium that carries tensors, under one interface.

The same class runs in either process; which end asks and which serves follows
`kvconnect.pipes.base.PipeSpec`.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

from kvconnect import registry
from kvconnect.bench.link import Message
from kvconnect.bench.memory import bytes_of
from kvconnect.pipes.base import Pipe, PipeSpec
from kvconnect.pipes.tcp_meeting import TcpOptions

Exchange = Callable[[Message], Message]
Side = Literal["asks", "serves"]
TIMEOUT_S = 60.0


class End(ABC):
    """One end of a medium that carries tensors."""

    @abstractmethod
    def send(self, tensor: Tensor) -> None:
        """Send ``tensor``; its memory is the caller's again on return."""

    @abstractmethod
    def recv(self, nbytes: int) -> Tensor:
        """Receive ``nbytes`` into memory allocated for it."""

    @abstractmethod
    def recv_into(self, out: Tensor) -> None:
        """Receive into ``out``, whose pages are there already."""

    @abstractmethod
    def close(self) -> None:
        """End."""


class PipeEnd(End):
    """One end of a registered pipe, through its public methods."""

    def __init__(
        self, name: str, options: Mapping[str, Any], side: Side, exchange: Exchange, device: str = "cpu"
    ) -> None:
        spec = PipeSpec(side=side, exchange=exchange, device=device, timeout_s=TIMEOUT_S, options=dict(options))
        self.pipe: Pipe = registry.pipe(name).open(spec)

    def send(self, tensor: Tensor) -> None:
        """Send one message."""
        self.pipe.send_tensor(tensor)

    def recv(self, nbytes: int) -> Tensor:
        """Receive one message."""
        got = self.pipe.recv_tensor()
        if got is None:
            raise RuntimeError("received None where a tensor was sent")
        return got

    def recv_into(self, out: Tensor) -> None:
        """Receive one message into ``out``."""
        self.pipe.recv_tensor_into(out)

    def close(self) -> None:
        """End at once; nothing is under way between cases."""
        self.pipe.abort()


class SocketEnd(End):
    """A bare TCP connection over loopback: ``sendall`` and ``recv_into``, no framing.

    Its buffers are those of the ``tcp`` pipe.
    """

    def __init__(self, side: Side, exchange: Exchange) -> None:
        if side == "serves":
            with socket.create_server(("127.0.0.1", 0)) as server:
                exchange({"port": server.getsockname()[1]})
                self.socket, _ = server.accept()
        else:
            self.socket = socket.socket()
            self.socket.connect(("127.0.0.1", exchange({})["port"]))
        TcpOptions().tune(self.socket, same_host=True)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, tensor: Tensor) -> None:
        """Send the bytes."""
        self.socket.sendall(bytes_of(tensor))

    def recv(self, nbytes: int) -> Tensor:
        """Receive into a new tensor."""
        out = torch.empty(nbytes, dtype=torch.uint8)
        self.recv_into(out)
        return out

    def recv_into(self, out: Tensor) -> None:
        """Receive into ``out``."""
        view = bytes_of(out)
        while view:
            got = self.socket.recv_into(view)
            if got == 0:
                raise EOFError("the socket was closed")
            view = view[got:]

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


class GlooEnd(End):
    """``torch.distributed`` send and recv over gloo."""

    def __init__(self, side: Side, exchange: Exchange) -> None:
        # Gloo asks the host's name for its interface unless told; loopback is what the others use.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        timeout = timedelta(seconds=TIMEOUT_S)
        if side == "serves":
            store = TCPStore("127.0.0.1", 0, 2, True, timeout, wait_for_workers=False)
            exchange({"port": store.port})
        else:
            store = TCPStore("127.0.0.1", exchange({})["port"], 2, False, timeout)
        rank = 0 if side == "serves" else 1
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
        self.peer = 1 - rank

    def send(self, tensor: Tensor) -> None:
        """Send the bytes."""
        torch.distributed.send(tensor, self.peer)

    def recv(self, nbytes: int) -> Tensor:
        """Receive into a new tensor."""
        out = torch.empty(nbytes, dtype=torch.uint8)
        self.recv_into(out)
        return out

    def recv_into(self, out: Tensor) -> None:
        """Receive into ``out``."""
        torch.distributed.recv(out, self.peer)

    def close(self) -> None:
        """Leave the process group."""
        torch.distributed.destroy_process_group()


def open_end(name: str, options: Mapping[str, Any], side: Side, exchange: Exchange) -> End:
    """Open one end of a reference (``socket``, ``gloo``) or of the registered pipe ``name``."""
    if name == "reference:socket":
        return SocketEnd(side, exchange)
    if name == "reference:gloo":
        return GlooEnd(side, exchange)
    return PipeEnd(name, options, side, exchange)
