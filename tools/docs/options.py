"""``docs/config.md``: every option, from the dataclasses that parse it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from kvconnect.buffers.choice import AutoOptions
from kvconnect.buffers.filesystem import FilesystemOptions
from kvconnect.buffers.redis import RedisOptions
from kvconnect.config import Backend, Config
from kvconnect.pipes.cuda_ipc import CudaIpcOptions
from kvconnect.pipes.inproc import InprocOptions
from kvconnect.pipes.nccl import NcclOptions
from kvconnect.pipes.nixl import NixlOptions
from kvconnect.pipes.shm import ShmOptions
from kvconnect.pipes.tcp_meeting import TcpOptions
from kvconnect.pipes.tcp_tls import TlsOptions

#: Heading → the dataclass that reads what users write there.
SECTIONS: dict[str, type] = {
    "kv_connector_extra_config": Config,
    'pipe: {"name": "auto"}': AutoOptions,
    'pipe: {"name": "cuda_ipc"}': CudaIpcOptions,
    'pipe: {"name": "inproc"}': InprocOptions,
    'pipe: {"name": "nccl"}': NcclOptions,
    'pipe: {"name": "nixl"}': NixlOptions,
    'pipe: {"name": "shm"}': ShmOptions,
    'pipe: {"name": "tcp"}': TcpOptions,
    'pipe: {"name": "tcp", "tls": {…}}': TlsOptions,
    'buffer: {"name": "filesystem"}': FilesystemOptions,
    'buffer: {"name": "redis"}': RedisOptions,
}
_NOUNS = {int: "whole number", float: "number", str: "string", bool: "true or false", Backend: "name or object"}
_UNITS = {"_s": "seconds", "_bytes": "bytes"}


def render() -> str:
    """Return all sections as Markdown."""
    return "\n\n".join(f"## `{title}`\n\n{table(cls)}" for title, cls in SECTIONS.items())


def table(cls: type) -> str:
    """Return a dataclass's fields as a table."""
    hints, documented = typing.get_type_hints(cls), dict(_documented(cls))
    lines = ["| option | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        unit = next((unit for suffix, unit in _UNITS.items() if field.name.endswith(suffix)), "")
        cells = [f"`{field.name}`", _type(hints[field.name]), _default(field), unit, documented[field.name]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _documented(cls: type) -> Iterator[tuple[str, str]]:
    """Read the ``Args`` of a class's docstring and of those it inherits from: each name with its text."""
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        for entry in re.split(r"\n(?=    \w)", "\n" + section):
            names, colon, text = entry.strip().partition(": ")
            if colon:
                words = re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))
                yield from ((name, words) for name in names.split(", "))


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin is tuple:
        return f"list ({_type(arguments[0])})"
    if origin in {types.UnionType, typing.Union}:
        return _type(next(a for a in arguments if a is not type(None)))
    return "object" if origin is not None and issubclass(origin, Mapping) else _NOUNS[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return "none" if value is None else f"`{json.dumps(_plain(value))}`"


def _plain(value: Any) -> Any:
    if isinstance(value, Backend):
        return {"name": value.name, **value.options} if value.options else value.name
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
