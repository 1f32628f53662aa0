"""Each law catches a connector that breaks it, by itself, by vLLM's own assertions or by what its engine saw."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvconnect.connectors.named import KvConnectTcp
from kvconnect.testing import checked_engine, connector_laws
from kvconnect.testing.connector_laws import Deployment, Law
from kvconnect.testing.engine import BLOCK, describe_model


class LoadsBesideTheCache(KvConnectTcp):
    def register_kv_caches(self, kv_caches):
        super().register_kv_caches({layer: cache.clone() for layer, cache in kv_caches.items()})


class LoadsForOneRequestOnly(KvConnectTcp):
    first = None

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        self.first = self.first or request.request_id
        if request.request_id == self.first:
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        return 0, False


class SaysThatAllIsThere(KvConnectTcp):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.kv_transfer_params:
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        return BLOCK, False


class SaysThatFailuresAreLoads(KvConnectTcp):
    def get_transfer_results(self, finished_req_ids):
        told = super().get_transfer_results(finished_req_ids)
        told.failed_recving = set()
        return told

    def get_block_ids_with_load_errors(self):
        return set()


class ForgetsWhatWasAborted(KvConnectTcp):
    over: frozenset[str] = frozenset()

    def get_transfer_results(self, finished_req_ids):
        self.over |= finished_req_ids
        told = super().get_transfer_results(finished_req_ids)
        told.finished_recving = set(told.finished_recving or ()) - self.over
        return told


class LendsForEver(KvConnectTcp):
    def __init__(self, vllm_config, role, kv_cache_config):
        vllm_config.kv_transfer_config.kv_connector_extra_config["lease_s"] = 1000.0
        super().__init__(vllm_config, role, kv_cache_config)


class LoadsNothingTheSecondTime(KvConnectTcp):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.num_preemptions:
            return BLOCK, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


CAUGHT: list[tuple[type, Law]] = [
    (LoadsBesideTheCache, connector_laws.a_load_brings_every_block),
    (LoadsForOneRequestOnly, connector_laws.several_loads_run_at_once),
    (SaysThatAllIsThere, connector_laws.what_was_not_offered_is_computed),
    (SaysThatFailuresAreLoads, connector_laws.a_load_that_fails_is_computed),
    (ForgetsWhatWasAborted, connector_laws.an_aborted_load_gives_its_blocks_back),
    (LendsForEver, connector_laws.a_request_aborted_before_its_load_leaves_nothing),
    (LoadsNothingTheSecondTime, connector_laws.a_preempted_request_comes_back),
]


@pytest.mark.parametrize(("broken", "law"), [pytest.param(*case, id=case[0].__name__) for case in CAUGHT])
def test_a_law_catches_the_connector_that_breaks_it(
    broken: type, law: Law, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checked_engine, "PATIENCE_S", 8.0)
    monkeypatch.setitem(KVConnectorFactory._registry, broken.__name__, lambda: broken)
    extra = {"group": f"test-{broken.__name__}", "lease_s": 1.0}
    engines = Deployment.open(describe_model(tmp_path), broken.__name__, extra)
    try:
        with pytest.raises(AssertionError):
            law(engines)
    finally:
        engines.close()


def test_every_law_has_a_connector_that_it_catches() -> None:
    assert [law for _, law in CAUGHT] == list(connector_laws.LAWS)
