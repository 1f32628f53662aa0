"""A kvconnect lookup buffer in an SQLite table, of a file that processes share: three methods."""

import io
import sqlite3
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvconnect.buffers.base import BufferTraits, LookupBuffer, LookupKey
from kvconnect.errors import BrokenError, ClosedError, LoadError
from kvconnect.pipes import wire

_TABLE = """CREATE TABLE IF NOT EXISTS entries (
    namespace TEXT, digest BLOB, length INTEGER, parts INTEGER, stream BLOB, PRIMARY KEY (namespace, digest, length))"""


class SqliteBuffer(LookupBuffer):
    name = "sqlite"
    traits = BufferTraits(shared=True)

    def __init__(self, path: str) -> None:
        self._turn, self._closed = threading.Lock(), False
        # Every statement is a transaction of its own; another process's may take a while.
        self._table = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        self._rows(_TABLE)

    def insert(self, key: LookupKey, kv: Sequence[Tensor]) -> None:
        stream = bytearray()
        for header, dense in map(wire.encode, kv):
            stream += header
            stream += b"" if dense is None else wire.memory(dense)
        self._rows("REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", *_columns(key), len(kv), stream)

    def drop_select(self, key: LookupKey) -> list[Tensor] | None:
        where = "namespace = ? AND digest = ? AND length = ?"
        rows = self._rows(f"DELETE FROM entries WHERE {where} RETURNING parts, stream", *_columns(key))  # noqa: S608
        return _tensors(*rows[0]) if rows else None

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._table.close()

    def _rows(self, statement: str, *values: object) -> list[Any]:
        with self._turn:
            if self._closed:
                raise ClosedError("the buffer was closed")
            try:
                return self._table.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise BrokenError(f"SQLite: {error}") from error


def _columns(key: LookupKey) -> tuple[str, bytes, int]:
    return key.namespace, key.digest, key.length


def _tensors(parts: int, stream: bytes) -> list[Tensor]:
    read = io.BytesIO(stream).readinto
    try:
        return [tensor for _ in range(parts) if (tensor := wire.receive(read)) is not None]
    except BrokenError as error:
        raise LoadError("the entry is cut off") from error
