"""What vLLM calls in every process to learn of the connectors (``vllm.general_plugins``)."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from kvconnect import registry

_log = logging.getLogger("kvconnect.plugin")


def register() -> None:
    """Register every ``kvconnect.connectors`` entry point with vLLM, under its name, by dotted path.

    Imports vLLM's factory and nothing else, so it is cheap and makes no CUDA
    context. Calling it again does nothing.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        for entry in registry.connectors().values():
            _register(KVConnectorFactory, entry)
    # vLLM does not catch what a plugin raises: an error here would stop engines
    # that use no connector at all. One that does ask for a connector is told
    # "Unsupported connector type" by vLLM, below the reason logged here.
    except Exception:  # noqa: BLE001
        _log.exception("kvconnect's connectors were not registered with vLLM")


def _register(factory: Any, entry: registry.Entry) -> None:
    try:
        factory.register_connector(entry.name, entry.module, entry.attr)
    except ValueError:  # vLLM refuses a name that it has already
        if _registered_target(factory, entry.name) != (entry.module, entry.attr):
            _log.warning(
                "connector %r is registered with vLLM for another class; the one of %s (%s) is left out",
                entry.name,
                entry.distribution,
                entry.value,
            )


def _registered_target(factory: Any, name: str) -> tuple[str, str] | None:
    """Return module and class that vLLM has under ``name``, without importing them.

    vLLM keeps a closure over the two and offers no other look at them.
    """
    loader = getattr(factory, "_registry", {}).get(name)
    if not inspect.isfunction(loader):
        return None
    seen = inspect.getclosurevars(loader).nonlocals
    return seen.get("module_path", ""), seen.get("class_name", "")
