"""What crosses between the scheduler's half and the workers' halves: plain frozen data.

vLLM pickles these (or hands over the same object within one process), so nobody
changes one after it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvconnect.buffers.base import Claim
from kvconnect.connectors.timeline import Times
from kvconnect.connectors.tracing import Carrier

Blocks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Load:
    """One request's blocks to fetch.

    Args:
        request_id: vLLM's id, reported back when the load is over.
        claim: the right to read, and the owner to read from.
        remote: the owner's block ids per group, paired with ``local``.
        local: this engine's block ids per group; never the null block.
        tokens: how many tokens' KV this brings.
        refused: why it cannot be done after all; vLLM still wants it reported, as failed.
        times: when its phases in the scheduler's half ended (`kvconnect.connectors.timeline`).
        trace: carries the trace that it belongs to, if somebody traces it (`kvconnect.connectors.tracing`).

    """

    request_id: str
    claim: Claim
    remote: Blocks
    local: Blocks
    tokens: int
    refused: str = ""
    times: Times = field(default_factory=dict)
    trace: Carrier = field(default_factory=dict)


@dataclass(frozen=True)
class Plan(KVConnectorMetadata):
    """One step's orders from the scheduler to the workers."""

    loads: tuple[Load, ...] = ()
    #: Ask every worker to describe itself (`WorkerNews`): the scheduler does not know them yet.
    introduce: bool = False
    #: The step computes nothing, and nobody waits for it: it may wait for loads.
    patient: bool = False


@dataclass(frozen=True)
class WorkerNews(KVConnectorWorkerMetadata):
    """What workers tell the scheduler: descriptions by rank."""

    descriptions: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerNews:
        """Merge the news of two ranks."""
        if not isinstance(other, WorkerNews):
            raise TypeError(f"expected WorkerNews, got {type(other).__name__}")
        return WorkerNews({**self.descriptions, **other.descriptions})
