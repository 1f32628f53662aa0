"""One process of a pair, D or P: it holds pools on one GPU and answers the parent's commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.gpu.contender import Contender, Host, Ids
from bench.gpu.memory import BLOCKWISE, LAYERWISE, Pool
from kvconnect.bench.link import Link
from kvconnect.bench.process import serve
from kvconnect.testing.channels import ConnectionChannel

NEAR, FAR = "D", "P"
#: Longest wait of a process for the other one.
PEER_LIMIT_S = 20.0


def _copies() -> type[Contender]:
    from bench.gpu.copies import Copies

    return Copies


def _raw_nccl() -> type[Contender]:
    from bench.gpu.nccl import RawNccl

    return RawNccl


def _raw_nixl() -> type[Contender]:
    from bench.gpu.nixl import RawNixl

    return RawNixl


def _mooncake() -> type[Contender]:
    from bench.gpu.mooncake import Mooncake

    return Mooncake


def _pipe() -> type[Contender]:
    from bench.gpu.pipes import RegisteredPipe

    return RegisteredPipe


def _hand_over() -> type[Contender]:
    from bench.gpu.handover import HandOver

    return HandOver


def _sums() -> type[Contender]:
    from bench.gpu.sums import Sums

    return Sums


#: Looked up by name, imported in the one process that needs it: media do not share a process.
KINDS: Mapping[str, Callable[[], type[Contender]]] = {
    "copies": _copies,
    "raw nccl": _raw_nccl,
    "raw nixl": _raw_nixl,
    "mooncake": _mooncake,
    "pipe": _pipe,
    "hand-over": _hand_over,
    "sums": _sums,
}


class Side:
    """The commands of one process."""

    def __init__(self, device: str, blocks: int, peer: Connection, channel: Connection, *, near: bool) -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # several processes at once would only wait for each other's threads
        else:
            _use(device)
        pools = {name: Pool(name, device, blocks) for name in (LAYERWISE, BLOCKWISE)}
        for number, pool in enumerate(pools.values()):
            pool.fill(2 * number + near)
            pool.signatures()  # its scratch memory is the allocator's from now on
        links = ConnectionChannel(channel, "bench-channel")
        links.start()
        self.host = Host(near, device, pools, Link(peer, PEER_LIMIT_S), links)
        self.host.settle()
        self.contenders: dict[str, Contender] = {}

    def about(self) -> dict[str, Any]:
        """Return the GPU's name and the driver's version."""
        if self.host.device == "cpu":
            return {"gpu": "none"}
        import cupy  # type: ignore[import-not-found,unused-ignore]

        driver = int(cupy.cuda.runtime.driverGetVersion())
        return {"gpu": torch.cuda.get_device_name(self.host.gpu), "cuda": f"{driver // 1000}.{driver % 1000 // 10}"}

    def free(self) -> dict[str, Any]:
        """Return the free bytes of this process's GPU."""
        self.host.settle()
        return {"bytes": 0 if self.host.device == "cpu" else torch.cuda.mem_get_info(self.host.gpu)[0]}

    def prepare(self, name: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """Make a contender; return what the other process needs."""
        made = self.contenders[name] = KINDS[kind]()(self.host, options)
        return made.describe()

    def meet(self, name: str, theirs: dict[str, Any]) -> dict[str, Any]:
        """Connect a contender to the other process's."""
        self.contenders[name].meet(theirs)
        return {}

    def time(self, name: str, way: str, layout: str, near: list[Ids], far: list[Ids]) -> dict[str, Any]:
        """Take samples."""
        return {"s": self.contenders[name].time(way, layout, near, far)}

    def assist(self, name: str, way: str, layout: str, near: list[Ids], far: list[Ids]) -> dict[str, Any]:
        """Help the other process to take samples."""
        self.contenders[name].assist(way, layout, near, far)
        return {}

    def multiprocessors(self, name: str, way: str, layout: str, near: Ids, far: Ids) -> dict[str, Any]:
        """Count the multiprocessors that one move occupies."""
        return {"count": self.contenders[name].multiprocessors(way, layout, near, far)}

    def flip(self, layout: str, ids: list[int]) -> dict[str, Any]:
        """Invert blocks, so that nothing equals the other side."""
        self.host.pools[layout].flip(ids)
        self.host.settle()
        return {}

    def signatures(self, layout: str) -> dict[str, Any]:
        """Return a number for the bytes of each block."""
        self.host.settle()
        return {"sums": self.host.pools[layout].signatures().tobytes()}


def _use(device: str) -> None:
    """Make the CUDA contexts now, so that they are not taken for a contender's memory."""
    import cupy  # type: ignore[import-not-found,unused-ignore]

    torch.cuda.set_device(device)
    cupy.cuda.Device(torch.device(device).index).use()
    cupy.zeros(1)


def main(connection: Connection, who: str, device: str, blocks: int, peer: Connection, channel: Connection) -> None:
    """Run one process; the first answer says that its pools are ready."""
    link = Link(connection)
    made: list[Side] = []

    def start() -> dict[str, Any]:
        made.append(Side(device, blocks, peer, channel, near=who == NEAR))
        return made[0].about()

    def forward(op: str) -> Callable[..., dict[str, Any]]:
        def call(**body: Any) -> dict[str, Any]:
            answer: dict[str, Any] = getattr(made[0], op)(**body)
            return answer

        return call

    names: Sequence[str] = ("free", "prepare", "meet", "time", "assist", "multiprocessors", "flip", "signatures")
    serve(link, {"start": start} | {op: forward(op) for op in names})
