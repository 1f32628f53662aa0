"""Layouts of the KV cache: what a connector wishes for, and what must be the same at both ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout
from vllm.v1.attention.backends import utils

from kvconnect import _plugin, registry
from kvconnect.connectors import compat
from kvconnect.pipes.base import Traits

pytestmark = pytest.mark.skipif(not hasattr(utils, "resolve_kv_cache_layout"), reason="this vLLM knows two layouts")

LONG_RUNS = {"nixl"}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register all connectors, as vLLM does, and let each pipe be had here."""
    _plugin.register()
    known = {
        name: SimpleNamespace(traits=Traits(likes_long_runs=name in LONG_RUNS))
        for name in ("nixl", "cuda_ipc", "nccl", "tcp", "shm")
    }
    monkeypatch.setattr(registry, "pipe", known.__getitem__)


def transfer(name: str, **extra: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def asked(config: dict[str, Any]) -> str | None:
    """Return what vLLM hears when it asks the connector."""
    layout: str | None = get_kv_connector_cache_layout(vllm_config(config))
    return layout


def vllm_config(config: dict[str, Any]) -> Any:
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**config), cache_config=SimpleNamespace(kv_cache_layout=None)
    )


@pytest.mark.parametrize("name", ["KvConnectCudaIpc", "KvConnectNccl", "KvConnectTcp", "KvConnectShm"])
def test_nothing_is_asked_for_a_pipe_that_is_as_fast_with_any(name: str) -> None:
    assert asked(transfer(name)) is None


def test_blocks_outermost_are_asked_for_a_pipe_that_is_faster_with_long_runs() -> None:
    assert asked(transfer("KvConnectNixl")) == "BLHNC"
    assert asked(transfer("KvConnect", pipe="nixl")) == "BLHNC"


def test_a_wrong_configuration_is_left_for_the_connector_itself_to_name() -> None:
    assert asked(transfer("KvConnectNixl", pipe="tcp")) is None
    assert asked(transfer("KvConnectNixl", no_such_option=1)) is None


@pytest.mark.parametrize(
    ("supported", "wanted"),
    [(["LBNHC", "LBHNC", "BLHNC"], "BLHNC"), (["LBHNC"], "LBHNC")],
    ids=["met", "dropped"],
)
def test_vllm_meets_the_wish_or_drops_it(supported: list[str], wanted: str) -> None:
    config = vllm_config(transfer("KvConnectNixl"))
    assert utils.resolve_kv_cache_layout(config, [supported]).name == wanted


def test_what_the_user_chose_comes_before_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    config = vllm_config(transfer("KvConnectNixl"))
    assert utils.resolve_kv_cache_layout(config, [["LBNHC", "LBHNC", "BLHNC"]]).name == "LBHNC"


def test_a_child_of_a_multi_connector_has_no_wish_that_could_clash_with_another_childs() -> None:
    children = [transfer("KvConnectNixl"), transfer("OffloadingConnector")]
    both = transfer("MultiConnector", connectors=children)
    config = vllm_config(both)
    config.attention_config = SimpleNamespace(hisparse_config=None)
    assert get_kv_connector_cache_layout(config) == "LBHNC"


def test_releases_that_would_stop_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "resolve_kv_cache_layout")
    assert asked(transfer("KvConnectNixl")) is None


def test_heads_before_tokens_and_tokens_before_heads_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner(**fields: Any) -> str:
        return compat.inner_layout(SimpleNamespace(**fields))

    assert inner(kv_cache_layout="BLHNC") == inner(kv_cache_layout="LBHNC") != inner(kv_cache_layout="LBNHC")
    before = []
    for setting in ("NHD", "HND"):
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", setting)
        before.append(inner())
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT")
    assert before[0] == inner() != before[1]
