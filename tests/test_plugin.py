"""What vLLM calls in each of its processes, against the real vLLM in fresh ones."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import textwrap
import types

import pytest

from kvconnect import _plugin, registry
from kvconnect.registry import Entry

# Looked for, not imported: that would take longer than all other tests here.
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

NAMES = ["KvConnect", "KvConnectCudaIpc", "KvConnectNccl", "KvConnectNixl", "KvConnectShm", "KvConnectTcp"]


class Factory:
    """vLLM's factory, as far as a plugin sees it."""

    def __init__(self) -> None:
        self._registry: dict[str, object] = {}

    def register_connector(self, name: str, module_path: str, class_name: str) -> None:
        if name in self._registry:
            raise ValueError(f"Connector '{name}' is already registered.")

        def loader() -> tuple[str, str]:
            return module_path, class_name

        self._registry[name] = loader


@pytest.fixture
def factory(monkeypatch):
    """Stand in for vLLM's factory module."""
    factory = Factory()
    where = "vllm.distributed.kv_transfer.kv_connector.factory"
    parts = where.split(".")
    for n in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    module = types.ModuleType(where)
    module.KVConnectorFactory = factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, where, module)
    return factory


def test_every_connector_is_registered_under_its_name(factory):
    _plugin.register()
    assert {name: load() for name, load in factory._registry.items()} == {
        name: registry.connector_target(name) for name in registry.connectors()
    }
    assert set(NAMES) <= factory._registry.keys()


def test_calling_it_twice_changes_and_says_nothing(factory, caplog):
    _plugin.register()
    before = dict(factory._registry)
    _plugin.register()
    assert factory._registry == before
    assert not caplog.records


def test_a_name_taken_by_another_class_is_left_to_it_and_logged(factory, caplog):
    factory.register_connector("KvConnectTcp", "somewhere.else_", "KvConnectTcp")
    _plugin.register()
    assert factory._registry["KvConnectTcp"]() == ("somewhere.else_", "KvConnectTcp")
    assert set(NAMES) <= factory._registry.keys()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'KvConnectTcp' is registered with vLLM for another class" in record.getMessage()


def test_a_name_taken_by_something_opaque_is_left_to_it(factory, caplog):
    factory._registry["KvConnectTcp"] = "not a function"
    _plugin.register()
    assert factory._registry["KvConnectTcp"] == "not a function"
    assert len(caplog.records) == 1


def test_an_error_stops_no_engine(factory, caplog, monkeypatch):
    def broken() -> dict[str, Entry]:
        raise RuntimeError("broken metadata")

    monkeypatch.setattr(registry, "connectors", broken)
    _plugin.register()
    assert not factory._registry
    assert "broken metadata" in caplog.text


def test_a_vllm_without_the_factory_stops_no_engine(caplog, monkeypatch):
    # The module itself, too: another test of this process may have imported it.
    for name in ("vllm", "vllm.distributed.kv_transfer.kv_connector.factory"):
        monkeypatch.setitem(sys.modules, name, None)
    _plugin.register()
    assert "kvconnect's connectors were not registered with vLLM" in caplog.text


def run(code: str) -> str:
    """Run code in a fresh process and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True, timeout=220
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_vllm
@pytest.mark.timeout(240)
def test_vllm_finds_every_connector_by_name_alone_and_also_twice():
    out = run(
        f"""
        import sys
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        assert set({NAMES}) <= KVConnectorFactory._registry.keys(), KVConnectorFactory._registry.keys()
        assert not any(m.startswith(("kvconnect.connectors", "kvconnect.pipes", "kvconnect.buffers"))
                       for m in sys.modules), "the plugin loaded a backend"
        from kvconnect._plugin import register
        register()
        from vllm.config import KVTransferConfig
        for name in {NAMES}:
            config = KVTransferConfig(kv_connector=name, kv_role="kv_both")
            loaded = KVConnectorFactory.get_connector_class(config)
            assert loaded.__name__ == name, (name, loaded)
            assert KVConnectorFactory.get_connector_class_by_name(name) is loaded
            assert KVConnectorFactory.supports_hma_config(config) in (True, False)
        import torch
        assert not torch.cuda.is_initialized()
        print("found")
        """
    )
    assert out.split()[-1] == "found"
