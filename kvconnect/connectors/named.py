"""The connectors that vLLM loads by name. A class's ``__name__`` is its registered name."""

from __future__ import annotations

from kvconnect.connectors.base import KvConnector


class KvConnect(KvConnector):
    """Any pipe: ``"pipe"`` in the extra config, or ``"auto"``, the nearest that reaches the peer; any ``"buffer"``."""


class KvConnectTcp(KvConnector):
    """Hand-over by TCP, between any hosts."""

    pipe = "tcp"


class KvConnectShm(KvConnector):
    """Hand-over through shared memory, on one host."""

    pipe = "shm"


class KvConnectNccl(KvConnector):
    """Hand-over by NCCL."""

    pipe = "nccl"


class KvConnectNixl(KvConnector):
    """Hand-over by NIXL."""

    pipe = "nixl"


class KvConnectCudaIpc(KvConnector):
    """Hand-over from GPU to GPU of one host by CUDA IPC."""

    pipe = "cuda_ipc"


class KvConnectFilesystem(KvConnector):
    """Hand-over through a directory: engines need not know or reach each other."""

    buffer = "filesystem"


class KvConnectRedis(KvConnector):
    """Hand-over through a Redis server, likewise."""

    buffer = "redis"
