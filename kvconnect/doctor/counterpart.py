"""A worker's end without an engine: what peers' doctors measure against, and what measures."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from kvconnect.buffers.access import Access
from kvconnect.buffers.base import EndSettings
from kvconnect.buffers.choice import AutoOptions
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.lender import Lender
from kvconnect.buffers.mover import Mover
from kvconnect.config import Backend, Config
from kvconnect.doctor import host
from kvconnect.doctor.intent import Intent
from kvconnect.errors import ConfigError
from kvconnect.paging import BlockIds, LayerLayout, PagedLayout, PagedMemory
from kvconnect.pipes.peer_memory import Beacon

#: Field of a worker's description by which a doctor is known.
MARK: Final = "doctor"
_STAMP_BYTES = 8


@dataclass(frozen=True)
class Case:
    """The paged case: what is moved.

    Args:
        layers: of the KV cache; each has memory of its own.
        piece_bytes: bytes of one block in one layer, that lie together.
        load_bytes: bytes of a large load.

    """

    layers: int = 32
    piece_bytes: int = 32 << 10
    load_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Check ranges; raise `ConfigError`."""
        if not 1 <= self.layers <= 1024:
            raise ConfigError(f"--layers must be 1 to 1024, got {self.layers}")
        if self.piece_bytes < _STAMP_BYTES or self.piece_bytes % _STAMP_BYTES:
            raise ConfigError(f"--piece-bytes must be a multiple of {_STAMP_BYTES}, got {self.piece_bytes}")
        if not self.block_bytes <= self.load_bytes <= 16 << 30:
            raise ConfigError(f"--load-bytes must be {self.block_bytes} (a block) to {16 << 30}, got {self.load_bytes}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.layers * self.piece_bytes

    @property
    def blocks(self) -> int:
        """Blocks of a large load."""
        return self.load_bytes // self.block_bytes

    @property
    def pool(self) -> int:
        """Blocks of the memory: twice as many, so that random ones leave gaps."""
        return 2 * self.blocks

    def layout(self) -> PagedLayout:
        """Return the memory's layout."""
        size, pool = self.piece_bytes, self.pool
        layers = tuple(LayerLayout(f"layer.{i}", 0, i, 0, size, pool, size) for i in range(self.layers))
        return PagedLayout(layers, (pool * size,) * self.layers)


class Blocks:
    """Paged memory whose every piece begins with its own number, if it is ``stamped``."""

    def __init__(self, case: Case, device: str, *, stamped: bool) -> None:
        self.case = case
        self._regions = [
            torch.zeros(case.pool, case.piece_bytes // _STAMP_BYTES, dtype=torch.int64, device=device)
            for _ in range(case.layers)
        ]
        self.memory = PagedMemory(case.layout(), [one.data_ptr() for one in self._regions], device, self._regions)
        if stamped:
            for layer, region in enumerate(self._regions):
                region[:] = (torch.arange(case.pool, device=device) + _number(layer, 0))[:, None]
        if device != "cpu":
            torch.cuda.synchronize(device)

    def arrived(self, remote: BlockIds, local: BlockIds) -> bool:
        """Whether ``local`` blocks hold what a stamped memory has in its blocks ``remote``."""
        here, there = torch.tensor(list(local[0])), torch.tensor(list(remote[0]))
        return all(
            bool((region[here.to(region.device)].cpu() == (there + _number(layer, 0))[:, None]).all())
            for layer, region in enumerate(self._regions)
        )

    def draw(self, count: int, seed: int) -> BlockIds:
        """Return ``count`` random blocks, in no order."""
        return [np.random.default_rng(seed).permutation(self.case.pool)[:count].tolist()]


def _number(layer: int, block: int) -> int:
    return ((layer + 1) << 32) + block


def other_device(device: str) -> str:
    """Return the next GPU, if there are several: prefill and decode engines do not share one."""
    kind, _, number = device.partition(":")
    return device if kind == "cpu" else f"cuda:{(int(number) + 1) % max(1, torch.cuda.device_count())}"


def settings(config: Config, pipe: Backend, marks: Mapping[str, str | int], *, produces: bool) -> EndSettings:
    """Return an end's settings under a name that no engine has."""
    name = f"{MARK}-{secrets.token_hex(4)}"
    return EndSettings(name, marks, 1, produces, not produces, config, pipe)


def every_pipe(pipe: Backend) -> Backend:
    """Return ``auto`` with the options that ``pipe`` has for each."""
    return Backend("auto", {"options": dict(AutoOptions.of(pipe).options)})


class Counterpart:
    """The end that is read from: a worker and its scheduler's address, as an engine shows them."""

    def __init__(self, intent: Intent, case: Case, device: str, marks: Mapping[str, str | int]) -> None:
        """Listen where ``intent`` says; ``marks`` is what to tell as this end's fingerprint.

        Raises:
            ConfigError: the address cannot be had, a key cannot be read, or no pipe carries such memory.

        """
        self._beacon = Beacon()
        self._blocks = Blocks(case, device, stamped=True)
        mine = settings(intent.config, every_pipe(intent.pipe), marks, produces=True)
        self._mover = Mover(mine, 0, self._blocks.memory)
        try:
            server, self.endpoint = Access(intent.config).server("kvconnect-doctor")
        except ConfigError:
            self._mover.close()
            raise
        self._lender = Lender(Hello.of(mine, secrets.token_hex(8)), server, self.endpoint)
        told = {**host.facts(), "pipe": intent.pipe.name, "beacon": self._beacon.card()}
        self._lender.introduce([{**self._mover.describe(), MARK: told}])

    def close(self) -> None:
        """End everything."""
        self._lender.close()
        self._mover.close()


def listening_at(intent: Intent, address: str | None, port: int) -> Intent:
    """Return ``intent`` for a doctor: on ``address``, if that is given, and on ``port`` instead of an engine's."""
    config = intent.config
    own = config.bind_host if config.kv_ip is None else config.kv_ip
    config = dataclasses.replace(
        config, bind_host=address or own, port=port, kv_ip=None, kv_port=None, kv_rank=None, kv_parallel_size=None
    )
    return dataclasses.replace(intent, config=config)
