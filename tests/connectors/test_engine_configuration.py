"""What vLLM's configuration makes of a connector: fingerprints, ports, and children of a MultiConnector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.request import Request, RequestStatus

from kvconnect import _plugin
from kvconnect.buffers.hello import Hello, check_fit
from kvconnect.connectors import compat, setup
from kvconnect.connectors.named import KvConnectTcp
from kvconnect.errors import ConfigError, HandshakeError

BLOCK = 16


def kv_config(kv_heads: int = 4, layers: int = 2) -> KVCacheConfig:
    """Return a cache of one group of full attention."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=kv_heads, head_size=64, dtype=torch.float32)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(layers)]
    return KVCacheConfig(num_blocks=32, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])


def vllm_config(transfer: KVTransferConfig, *, dp_index: int = 0, draft: Any = None, **shape: int) -> Any:
    """Return the part of vLLM's configuration that connectors read; ``shape`` is ``tp``, ``pp``, ``dp``."""
    return SimpleNamespace(
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(model="m", revision=None, dtype=torch.float32, quantization=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=64, max_num_seqs=4, disable_hybrid_kv_cache_manager=False
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=shape.get("tp", 1),
            pipeline_parallel_size=shape.get("pp", 1),
            data_parallel_size=shape.get("dp", 1),
            data_parallel_index=dp_index,
        ),
        speculative_config=draft,
        kv_events_config=None,
    )


def transfer_config(role: str = "kv_both", name: str = "KvConnectTcp", **extra: Any) -> KVTransferConfig:
    extra = {"group": "test-configuration", **extra}
    return KVTransferConfig(kv_connector=name, kv_role=role, kv_connector_extra_config=extra)


def draft(method: str = "draft_model", model: str = "small", tokens: int = 3) -> Any:
    return SimpleNamespace(
        method=method,
        model=model,
        num_speculative_tokens=tokens,
        draft_model_config=SimpleNamespace(model=model, revision=None),
    )


def hello(kv: KVCacheConfig | None = None, **how: Any) -> Hello:
    engine = setup.engine(vllm_config(transfer_config(), **how), kv or kv_config(), "tcp")
    return Hello.of(engine.settings, "0" * 16)


# -- fingerprints -----------------------------------------------------------------------


def test_unequal_tensor_parallelism_is_named_although_the_blocks_differ_too() -> None:
    with pytest.raises(HandshakeError, match=r"^tensor_parallel_size differs: ours 1, theirs 2"):
        check_fit(hello(), hello(kv_config(kv_heads=2), tp=2))


@pytest.mark.parametrize(("ours", "theirs"), [(None, draft()), (draft(), None), (draft(), draft(model="other"))])
def test_another_draft_model_is_named_although_the_layers_differ_too(ours: Any, theirs: Any) -> None:
    mine = hello(kv_config(layers=2 + (ours is not None)), draft=ours)
    with pytest.raises(HandshakeError, match=r"^draft_model differs: ours '.*', theirs '.*'"):
        check_fit(mine, hello(kv_config(layers=2 + (theirs is not None)), draft=theirs))


def test_how_many_tokens_are_drafted_and_drafts_without_kv_do_not_matter() -> None:
    check_fit(hello(draft=draft(tokens=2)), hello(draft=draft(tokens=5)))
    check_fit(hello(), hello(draft=draft(method="ngram", model="ngram")))


# -- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_a_failed_load_never_meets_a_release_that_would_stop_at_it(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = kv_config(), kv_config()
    several.kv_cache_groups *= 2
    built = {}
    for by_request in (True, False):
        monkeypatch.setattr(compat, "reports_failed_requests", lambda known=by_request: known)
        for name, kv in (("one", one), ("several", several)):
            built[name, by_request] = setup.engine(vllm_config(transfer_config(role)), kv, "tcp").refusal
    refused = {case for case, refusal in built.items() if refusal}
    assert refused == (set() if role == "kv_producer" else {("several", False)})


# -- ports ------------------------------------------------------------------------------


def test_data_parallel_engines_count_their_ports_from_the_configured_one() -> None:
    ports = [
        setup.engine(vllm_config(transfer_config(port=20_000), dp_index=i), kv_config(), "tcp").config.port
        for i in range(3)
    ]
    assert ports == [20_000, 20_001, 20_002]


@pytest.mark.parametrize(("shape", "alone"), [({}, True), ({"tp": 2}, True), ({"pp": 2}, False), ({"dp": 2}, False)])
def test_an_empty_step_waits_for_loads_where_no_other_stage_or_rank_waits_for_it(
    shape: dict[str, int], *, alone: bool
) -> None:
    assert setup.engine(vllm_config(transfer_config(), **shape), kv_config(), "tcp").steps_alone is alone


def test_a_port_for_the_last_data_parallel_engine_must_exist() -> None:
    with pytest.raises(ConfigError, match="port must be a TCP port"):
        setup.engine(vllm_config(transfer_config(port=65_535), dp_index=1), kv_config(), "tcp")


# -- children of a MultiConnector -----------------------------------------------------------


@contextlib.contextmanager
def multi(*children: tuple[str, str], engine_id: str = "e") -> Iterator[MultiConnector]:
    """Build vLLM's MultiConnector in a scheduler over children of these names and roles."""
    _plugin.register()
    shared = {"kv_connector_extra_config": {"group": "test-children"}}
    connectors = [{"kv_connector": name, "kv_role": role, **shared} for name, role in children]
    config = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        engine_id=engine_id,
        kv_connector_extra_config={"connectors": connectors},
    )
    connector = MultiConnector(vllm_config(config), KVConnectorRole.SCHEDULER, kv_config())
    try:
        yield connector
    finally:
        connector.shutdown()


def finished_request(pool: BlockPool) -> tuple[Request, list[int]]:
    """Return a request that has ended, with its blocks."""
    request = Request("cmpl-a-0-00000000", list(range(3 * BLOCK)), SamplingParams(max_tokens=1), None)
    request.num_computed_tokens, request.status = 3 * BLOCK, RequestStatus.FINISHED_LENGTH_CAPPED
    return request, [block.block_id for block in pool.get_new_blocks(3)]


@pytest.mark.parametrize("roles", [("kv_both", "kv_both"), ("kv_producer", "kv_both"), ("kv_producer", "kv_producer")])
def test_two_children_that_would_return_two_tickets_are_refused_at_the_start(roles: tuple[str, str]) -> None:
    why = "KvConnectTcp and KvConnectShm.* both offer .* kv_connector='KvConnect'"
    with pytest.raises(ConfigError, match=why), multi(("KvConnectTcp", roles[0]), ("KvConnectShm", roles[1])):
        pass


def test_two_children_that_would_race_for_one_ticket_are_refused_at_the_start() -> None:
    children = [("KvConnectTcp", "kv_consumer"), ("KvConnectShm", "kv_consumer")]
    with pytest.raises(ConfigError, match="both fetch"), multi(*children):
        pass


def test_one_child_that_fetches_and_one_that_lends_work_together() -> None:
    with multi(("KvConnectTcp", "kv_consumer"), ("KvConnectShm", "kv_producer")) as connector:
        pool = BlockPool(32, enable_caching=True, hash_block_size=BLOCK)
        connector.bind_gpu_block_pool(pool)
        request, ids = finished_request(pool)
        delayed, params = connector.request_finished_all_groups(request, (ids,))
        assert not delayed
        assert params is not None
        assert params["kvconnect"]["length"] == 3 * BLOCK


def test_an_engine_can_be_built_again_after_it_was_shut_down() -> None:
    for _ in range(2):
        with multi(("KvConnectTcp", "kv_both")):
            pass


def test_engines_of_one_process_do_not_stand_in_each_others_way() -> None:
    with multi(("KvConnectTcp", "kv_both"), engine_id="one"), multi(("KvConnectTcp", "kv_both"), engine_id="two"):
        pass


def test_a_connector_that_was_dropped_without_shutdown_does_not_count() -> None:
    config = transfer_config("kv_consumer")
    for _ in range(2):
        connector = KvConnectTcp(vllm_config(config), KVConnectorRole.SCHEDULER, kv_config())
        connector._scheduler.close()  # its threads, so that none is left behind
        del connector


# -- sizes ------------------------------------------------------------------------------


def test_a_block_is_counted_once_although_every_tensor_names_the_allocation_that_all_share() -> None:
    kv = kv_config()
    kv.kv_cache_tensors = [
        KVCacheTensor(size=32 * 4096, layers=[name], layer_stride=1, block_stride=1) for name in "ab"
    ]
    assert compat.block_bytes(kv) == 4096
