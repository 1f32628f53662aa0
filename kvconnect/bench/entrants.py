"""Which pipes are measured, and what rows call them."""

from __future__ import annotations

import json
from typing import Any

from kvconnect import registry
from kvconnect.config import Backend, parse_backend
from kvconnect.errors import ConfigError, KVConnectError
from kvconnect.pipes.base import Reach

#: Options that pipes are measured with unless told otherwise: what their goals are about.
OPTIONS: dict[str, dict[str, Any]] = {"tcp": {"checksum": False}}


def backends(only: list[str], left_out: dict[str, str]) -> list[Backend]:
    """Return what to measure; note in ``left_out`` which registered pipes are not, and why."""
    if only:
        named = [parse_backend("--pipe", _read(text)) for text in only]
        return [Backend(one.name, OPTIONS.get(one.name, {}) | dict(one.options)) for one in named]
    found = []
    for name in sorted(registry.pipes()):
        try:
            pipe = registry.pipe(name)
        except KVConnectError as error:
            left_out[name] = str(error)
            continue
        if "cpu" not in pipe.traits.devices or pipe.traits.reach < Reach.HOST:
            left_out[name] = "does not join two processes over CPU memory"
            continue
        found.append(Backend(name, OPTIONS.get(name, {})))
    return found


def _read(text: str) -> Any:
    try:
        return json.loads(text) if text.startswith("{") else text
    except json.JSONDecodeError as error:
        raise ConfigError(f"--pipe is not valid JSON: {error}") from error


def label(backend: Backend) -> str:
    """Return what rows call a pipe: its name, and its options if they are not the usual ones."""
    usual = OPTIONS.get(backend.name, {})
    unusual = [f"{key}={value}" for key, value in backend.options.items() if key not in usual or usual[key] != value]
    return " ".join([backend.name, *unusual])
