"""Fleets of real engines on GPUs: which pipe, which place, which way to compute."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from kvconnect.demo import model
from tests.gpu.agreement import sharper_model
from tests.vllm.conftest import running
from tests.vllm.fleet import Fleet, Plan

BLOCK = 16
#: Engines that share GPUs with others: nothing is taken by the share of what is free.
SMALL = (
    *("--num-gpu-blocks-override", "2000", "--block-size", str(BLOCK)),
    *("--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.05"),
)
#: Other batches give other last bits, of which bfloat16 has so few that tokens change places. VLLM_BATCH_INVARIANT
#: does not help: prefill and decode still differ, in 24 of 1,470 tokens by one or two steps of bfloat16 (0.32.0).
FLOAT32 = ("--dtype", "float32", "--attention-backend", "TRITON_ATTN")
GRAPHS = (
    "--no-enforce-eager",
    "--compilation-config",
    json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}),
)
APART, TOGETHER = ((0,), (1,)), ((0,), (0,))


@dataclass(frozen=True)
class Case:
    """One fleet: a connector and what is special; with ``exact`` its tokens are those of one engine."""

    connector: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[tuple[int, ...], tuple[int, ...]] = APART
    exact: bool = True


CASES = {
    "cuda_ipc": Case("KvConnectCudaIpc", FLOAT32),
    "nccl": Case("KvConnectNccl", FLOAT32),
    "nixl": Case("KvConnectNixl", FLOAT32),
    "bfloat16": Case("KvConnectCudaIpc", exact=False),
    "graphs": Case("KvConnectCudaIpc", FLOAT32 + GRAPHS),
    "one_gpu": Case("KvConnectCudaIpc", FLOAT32, devices=TOGETHER),
    "block_outermost": Case("KvConnectCudaIpc", FLOAT32, {"VLLM_KV_CACHE_LAYOUT": "BLHNC"}),
}


@contextmanager
def started(case: Case, folder: Path, **more: object) -> Iterator[Fleet]:
    """Run a fleet of one producer and one consumer, unless ``more`` says otherwise; skip where it cannot run."""
    devices = max((device for each in case.devices for device in each), default=-1) + 1
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices, here are {torch.cuda.device_count()}")
    if "VLLM_KV_CACHE_LAYOUT" in case.env and importlib.util.find_spec("vllm.v1.kv_cache_layout") is None:
        pytest.skip("this vLLM has no layout with blocks outermost")
    plan = Plan(
        case.connector,
        producers=1,
        consumers=1,
        tiny=False,
        devices=case.devices,
        env=case.env,
        model=sharper_model(folder, str(model.ensure())),
        lease_s=30.0,
        arguments=(*SMALL, *case.arguments),
    )
    with running(replace(plan, **more), folder) as fleet:  # type: ignore[arg-type]
        yield fleet
