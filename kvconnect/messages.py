"""The control channel's messages: msgpack maps, bounded in size and depth, no extension types.

A request is ``{"p": [low, high], "id": n, "op": name, "body": {...}}``; a reply
has the same ``id`` and either ``"body"`` or ``"error"`` (a class name from a
fixed table) with ``"text"``. ``p`` is the range of protocol versions its sender
speaks: peers whose ranges meet can talk, so engines may be upgraded one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from kvconnect import errors
from kvconnect.errors import HandshakeError, KVConnectError

#: Lowest and highest protocol version spoken here.
PROTOCOL = (1, 1)
MAX_MESSAGE_BYTES = 16 << 20
_MAX_DEPTH = 12
_MAX_ERROR_CHARS = 4096
#: Items of a message, in all: what is a byte on the wire may take a hundred in memory. A list or map counts as several.
_MAX_ITEMS = 1 << 20
_CONTAINER_ITEMS = 8

# Fixed, so that no name a peer sends can make anything else be constructed. Classes
# with constructors of their own travel as their nearest listed base.
_ERRORS: dict[str, type[KVConnectError]] = {
    cls.__name__: cls
    for cls in (
        errors.KVConnectError,
        errors.ConfigError,
        errors.HandshakeError,
        errors.TensorRejectedError,
        errors.ClosedError,
        errors.BrokenError,
        errors.EndOfPipe,
        errors.BusyError,
        errors.DeadlineError,
        errors.BufferFullError,
        errors.IntegrityError,
        errors.LoadError,
        errors.StaleError,
    )
}


class MalformedError(KVConnectError):
    """Bytes that are no message of ours. The channel drops and counts them; it stays usable."""


def pack_request(number: int, op: str, body: Mapping[str, Any]) -> bytes:
    """Encode a request. Raises `KVConnectError` for what msgpack cannot carry or is too big."""
    return _pack({"p": PROTOCOL, "id": number, "op": op, "body": body})


def pack_reply(number: int, body: Mapping[str, Any]) -> bytes:
    """Encode an answer. Raises `KVConnectError` for what msgpack cannot carry or is too big."""
    return _pack({"p": PROTOCOL, "id": number, "body": body})


def pack_error(number: int, error: KVConnectError) -> bytes:
    """Encode a failure by its class's name."""
    name = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ERRORS)
    return _pack({"p": PROTOCOL, "id": number, "error": name, "text": str(error)[:_MAX_ERROR_CHARS]})


def unpack(data: bytes) -> dict[str, Any]:
    """Decode a message and check its frame: ``p`` and ``id`` are there and well-formed.

    Raises:
        MalformedError: anything else.

    """
    message = decode(data)
    if not isinstance(message, dict) or not _is_frame(message) or not _shallow(message):
        raise MalformedError("not a message: the frame is wrong")
    return message


def decode(data: bytes) -> Any:
    """Decode msgpack from anywhere, whatever its shape, within bounds of size and memory.

    Raises:
        MalformedError: it is no msgpack, or too much.

    """
    left = _MAX_ITEMS

    def spend(container: Any) -> Any:
        nonlocal left
        left -= _CONTAINER_ITEMS + len(container)
        if left < 0:
            raise ValueError(f"more than {_MAX_ITEMS} items")
        return container

    # Memory for a list is taken when its length is read: there cannot be more items than bytes.
    most = min(_MAX_ITEMS, len(data))
    try:
        return msgpack.unpackb(
            data,
            strict_map_key=True,
            ext_hook=_no_extension,
            list_hook=spend,
            object_hook=spend,
            max_str_len=MAX_MESSAGE_BYTES,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=most,
            max_map_len=most,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise MalformedError(f"not a message: {error}") from error


def check_version(message: Mapping[str, Any]) -> None:
    """Raise `HandshakeError` unless the sender's protocol versions meet ours."""
    low, high = message["p"]
    if low > PROTOCOL[1] or high < PROTOCOL[0]:
        raise HandshakeError(
            f"protocol versions differ: ours {PROTOCOL[0]}..{PROTOCOL[1]}, theirs {low}..{high}; "
            "upgrade the older kvconnect"
        )


def error_of(message: Mapping[str, Any]) -> KVConnectError:
    """Rebuild the error that a reply carries; an unknown class becomes `KVConnectError`.

    What would break a line is escaped: these texts come to stand in logs.
    """
    cls = _ERRORS.get(str(message.get("error")), KVConnectError)
    text = str(message.get("text", ""))[:_MAX_ERROR_CHARS]
    return cls(text if text.isprintable() else ascii(text)[1:-1])


def _pack(message: Mapping[str, Any]) -> bytes:
    try:
        data = msgpack.packb(message, strict_types=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise KVConnectError(f"msgpack cannot carry this message: {error}") from error
    if len(data) > MAX_MESSAGE_BYTES:
        raise KVConnectError(f"a control message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return bytes(data)


def _no_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _is_frame(message: dict[Any, Any]) -> bool:
    versions, number = message.get("p"), message.get("id")
    if not isinstance(versions, list) or len(versions) != 2 or not all(type(v) is int for v in versions):
        return False
    return type(number) is int


def _shallow(message: dict[Any, Any]) -> bool:
    """Whether nothing nests deeper than the limit; level by level, so that it cannot recurse."""
    level: list[Any] = [message]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return True
    return False
