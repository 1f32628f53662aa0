"""Who is compared: how P and D are configured for each connector, and how a request is led through them."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serving.setups import Setup
from kvconnect.demo import engines
from kvconnect.demo.deployment import write_logging_config
from kvconnect.demo.engines import Server

HOST = "127.0.0.1"


class Legs(enum.Enum):
    """How a request goes from P to D."""

    #: P's answer carries ``kv_transfer_params``, which D is given: vLLM's usual protocol, and kvconnect's.
    TICKET = enum.auto()
    #: Both legs carry one request id, which contains the addresses of P and D.
    ADDRESSES = enum.auto()
    #: There is no P: D fills the KV of a prompt with constants. The floor of what a hand-over can take.
    NONE = enum.auto()


@dataclass(frozen=True)
class Contender:
    """A connector on both engines.

    ``decode_config`` goes into ``kv_transfer_config`` of D only, ``config`` into both; ``extra_config`` into its
    ``kv_connector_extra_config``.
    """

    name: str
    connector: str
    legs: Legs = Legs.TICKET
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    decode_config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


FLOOR = "DecodeBenchConnector"
#: The floor without the filling, which takes 8 ms for 16,000 tokens and would be no part of a hand-over (0.32).
LOWER_FLOOR = "DecodeBenchConnector, filled at start"
P2P_NCCL = "P2pNcclConnector"
NIXL = "NixlConnector"
_BLHNC = {"VLLM_KV_CACHE_LAYOUT": "BLHNC"}
_P2P_ENV = {
    "VLLM_HOST_IP": HOST,
    # It finds what it received by the request's id, which must therefore be the same on both engines.
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(FLOOR, "DecodeBenchConnector", Legs.NONE),
        Contender(LOWER_FLOOR, "DecodeBenchConnector", Legs.NONE, extra_config={"startup_fill": True}),
        Contender("cuda_ipc", "KvConnectCudaIpc"),
        Contender("nccl", "KvConnectNccl"),
        Contender("nixl", "KvConnectNixl"),
        Contender("shm", "KvConnectShm"),
        Contender(NIXL, "NixlConnector"),
        Contender(f"{NIXL} BLHNC", "NixlConnector", env=_BLHNC),
        Contender("cuda_ipc BLHNC", "KvConnectCudaIpc", env=_BLHNC),
        Contender(
            P2P_NCCL,
            "P2pNcclConnector",
            Legs.ADDRESSES,
            # Host memory for what D has no room for; the default of 32 GB takes long to pin.
            extra_config={"mem_pool_size_gb": "1"},
            # As in its own examples: what D keeps on the GPU, beside vLLM's pool, until a request is over.
            decode_config={"kv_buffer_size": 8e9},
            env=_P2P_ENV,
        ),
    )
}


@dataclass(frozen=True)
class Fleet:
    """The engines of one contender; ``prefill`` is None where nothing is handed over."""

    prefill: Server | None
    decode: Server
    #: Host and port of P's and D's ends, where request ids name them.
    addresses: tuple[str, str] | None = None

    @property
    def servers(self) -> list[Server]:
        """All engines."""
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]

    def request_id(self, mark: str = "bench") -> str:
        """Return a new ``X-Request-Id`` for both legs."""
        unique = f"{mark}-{uuid.uuid4().hex}"
        if self.addresses is None:
            return unique
        prefill, decode = self.addresses
        return f"___prefill_addr_{prefill}___decode_addr_{decode}_{unique}"


def fleet(contender: Contender, setup: Setup, folder: Path, *, device: int | None = None) -> Fleet:
    """Describe a contender's engines, logging to ``folder``; ``device`` is where a D without P stands."""
    if contender.legs is Legs.NONE:
        return Fleet(None, _engine(contender, setup, folder, "D", setup.devices[1] if device is None else device))
    ports = (engines.free_port(), engines.free_port()) if contender.legs is Legs.ADDRESSES else (None, None)
    return Fleet(
        _engine(contender, setup, folder, "P", setup.devices[0], ports[0]),
        _engine(contender, setup, folder, "D", setup.devices[1], ports[1]),
        (f"{HOST}:{ports[0]}", f"{HOST}:{ports[1]}") if contender.legs is Legs.ADDRESSES else None,
    )


def _engine(
    contender: Contender, setup: Setup, folder: Path, name: str, device: int | None, kv_port: int | None = None
) -> Server:
    decodes = name == "D"
    own = contender.connector.startswith("KvConnect")
    extra = {"group": folder.name, "log_transfers": True} if own else {}
    role = "kv_consumer" if decodes else "kv_producer"
    transfer: dict[str, Any] = {
        "kv_connector": contender.connector,
        # The others of the ticket's protocol know no roles: either engine may do both.
        "kv_role": role if own or contender.legs is Legs.ADDRESSES else "kv_both",
        "kv_connector_extra_config": extra | dict(contender.extra_config),
        **(contender.decode_config if decodes else {}),
    }
    if kv_port is not None:
        transfer["kv_port"] = kv_port
    env = {"VLLM_LOGGING_CONFIG_PATH": str(write_logging_config(folder)), **contender.env}
    if contender.connector == "NixlConnector":
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(engines.free_port())
    size = ("--kv-cache-memory-bytes", str(setup.kv_cache_bytes[decodes]))
    return engines.engine(name, setup.options, folder, kv_transfer=transfer, device=device, env=env, extra=size)
