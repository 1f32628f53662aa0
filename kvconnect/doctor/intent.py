"""What an engine is to be started with: its KV transfer configuration, read by what the engine reads it with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvconnect import listing, registry
from kvconnect.buffers.access import Access
from kvconnect.buffers.choice import AutoOptions
from kvconnect.config import PATH, Backend, Config, chosen
from kvconnect.doctor.findings import Finding
from kvconnect.errors import ConfigError, KVConnectError, nearest

#: vLLM's `KVTransferConfig`, all releases since 0.23 together.
_FIELDS = (
    "enable_permute_local_kv",
    "engine_id",
    "kv_buffer_device",
    "kv_buffer_size",
    "kv_connector",
    "kv_connector_extra_config",
    "kv_connector_module_path",
    "kv_ip",
    "kv_load_failure_policy",
    "kv_parallel_size",
    "kv_port",
    "kv_rank",
    "kv_role",
)
_ROLES = ("kv_producer", "kv_consumer", "kv_both")
#: Fields that later releases take in the extra configuration only.
_OLDER = ("kv_ip", "kv_port", "kv_rank", "kv_parallel_size")


@dataclass(frozen=True)
class Intent:
    """What is to be started.

    Args:
        config: the parsed extra configuration.
        pipe: the pipe that the connector and the configuration ask for.

    """

    config: Config = field(default_factory=Config)
    pipe: Backend = field(default_factory=lambda: Backend("auto"))


def load(text: str) -> Mapping[str, Any]:
    """Return the KV transfer configuration that ``text`` is, as JSON, or names, as a file.

    Raises:
        ConfigError: there is no such file, or it is no JSON object.

    """
    source = "--config"
    if not text.lstrip().startswith("{"):
        source = text
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config is neither a JSON object nor a file that can be read: {error}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a JSON object such as vLLM's --kv-transfer-config, got {data!r:.80}")
    return data


def examine(data: Mapping[str, Any]) -> tuple[Intent | None, list[Finding]]:
    """Check a KV transfer configuration as an engine's start would; no intent if it would not start."""
    findings = [_unknown(name) for name in data if name not in _FIELDS]
    try:
        if (role := data.get("kv_role", "kv_both")) not in _ROLES:
            raise ConfigError(f"kv_role must be one of {', '.join(_ROLES)}, got {role!r}")
        intent = _intent(data)
    except KVConnectError as error:
        return None, [*findings, Finding("config", "bad", str(error), "correct it: the engine would not start")]
    findings += _address(intent)
    what = f"{data.get('kv_connector', 'KvConnect')} over pipe {intent.pipe.name!r}"
    return intent, [Finding("config", "ok", what), *findings]


def _unknown(name: str) -> Finding:
    near = nearest(name, _FIELDS)
    hint = f"; did you mean {near!r}?" if near else ""
    cure = "correct it, or move it into kv_connector_extra_config"
    return Finding("config", "bad", f"{name} is not a field of vLLM's KV transfer configuration{hint}", cure)


def _intent(data: Mapping[str, Any]) -> Intent:
    extra = data.get("kv_connector_extra_config")
    extra = {} if extra is None else extra
    if not isinstance(extra, Mapping):
        raise ConfigError(f"{PATH} must be an object, got {extra!r:.80}")
    extra = {**{name: data[name] for name in _OLDER if data.get(name) is not None}, **extra}
    config = Config.parse(extra)
    connector = str(data.get("kv_connector", "KvConnect"))
    pipe = chosen("pipe", extra, config, _preset("pipe", connector))
    AutoOptions.of(pipe)
    registry.buffer(chosen("buffer", extra, config, _preset("buffer", connector)).name)
    if pipe.name != "auto":
        registry.pipe(pipe.name)
    Access(config).check_pipe(pipe.options)
    return Intent(config, pipe)


def _preset(kind: Literal["pipe", "buffer"], connector: str) -> str | None:
    registry.connector_target(connector)
    preset = listing.preset(kind, registry.connectors()[connector])
    return None if preset == "auto" else preset


def _address(intent: Intent) -> list[Finding]:
    """Say whether the control port can be had."""
    try:
        server, endpoint = Access(intent.config).server("kvconnect-doctor-port")
    except KVConnectError as error:
        return [Finding("host.port", "bad", str(error), "free it, or choose another")]
    server.close()
    chosen = "" if intent.config.port or intent.config.kv_port else ", a free port"
    return [Finding("host.port", "ok", f"the control channel can listen on {endpoint.rpartition('@')[2]}{chosen}")]
