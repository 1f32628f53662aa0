"""Strict reading of fields in what peers send: wrong ones are named, never asserted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvconnect.buffers.base import LookupKey
from kvconnect.errors import HandshakeError

_MAX_TEXT = 1024


def text(data: Mapping[str, Any], name: str) -> str:
    """Return the non-empty string ``name``; it is printable, since it may come to stand in a log."""
    value = data.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise HandshakeError(f"field {name!r} must be a short printable string, got {type(value).__name__}")
    return value


def shown(value: object, limit: int = 80) -> str:
    """Return what a peer sent as text for a log or a report: short, printable, on one line."""
    cut = str(value)[:limit]
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def number(data: Mapping[str, Any], name: str, limit: int, least: int = 0) -> int:
    """Return the whole number ``name`` in ``least <= n < limit``."""
    value = data.get(name)
    if type(value) is not int or not least <= value < limit:
        raise HandshakeError(f"field {name!r} must be a whole number from {least} to {limit - 1}, got {value!r:.80}")
    return value


def binary(data: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes that the string ``name`` holds in hexadecimal."""
    try:
        return bytes.fromhex(text(data, name))
    except ValueError as error:
        raise HandshakeError(f"field {name!r} must be hexadecimal") from error


def packed(data: Mapping[str, Any], name: str, limit: int) -> bytes:
    """Return the bytes ``name``, at most ``limit`` of them."""
    value = data.get(name)
    if not isinstance(value, bytes) or len(value) > limit:
        raise HandshakeError(f"field {name!r} must be at most {limit} bytes, got {type(value).__name__}")
    return value


def texts(data: Mapping[str, Any], name: str, limit: int = 1 << 16) -> list[str]:
    """Return the list of strings ``name``; an absent one is empty."""
    value = data.get(name, [])
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(item, str) for item in value):
        raise HandshakeError(f"field {name!r} must be a list of strings")
    return value


def mapping(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the map with string keys ``name``."""
    value = data.get(name)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise HandshakeError(f"field {name!r} must be a map with string keys, got {type(value).__name__}")
    return value


def write_key(key: LookupKey) -> dict[str, Any]:
    """Return a key's fields."""
    return {"namespace": key.namespace, "digest": key.digest.hex(), "length": key.length}


def read_key(data: Mapping[str, Any]) -> LookupKey:
    """Read `write_key`'s fields."""
    return LookupKey(text(data, "namespace"), binary(data, "digest"), number(data, "length", 1 << 40))
