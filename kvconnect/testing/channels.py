"""Channels and exchanges for tests: in memory, and over a connection between two processes."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from kvconnect import errors
from kvconnect.errors import BrokenError, DeadlineError, KVConnectError
from kvconnect.pipes.turns import Turns

Body = Mapping[str, Any]
Handler = Callable[[dict[str, Any]], Body]


class MemoryChannel:
    """A `kvconnect.pipes.base.Channel` to another one in this process; made by `memory_channels`."""

    def __init__(self) -> None:
        self.peer: MemoryChannel = self
        self.closed = False
        self._handlers: dict[str, Handler] = {}

    def call(self, op: str, body: Body) -> Future[dict[str, Any]]:
        """Ask the peer; it answers on the one thread that all channels of a process share."""
        answer: Future[dict[str, Any]] = Future()
        if self.closed or self.peer.closed:
            answer.set_exception(BrokenError("the channel was closed"))
        else:
            packed = msgpack.packb(dict(body))
            _thread().add(lambda: self.peer.serve(op, packed, answer))
        return answer

    def handle(self, op: str, handler: Handler) -> None:
        """Answer the peer's calls of ``op``."""
        self._handlers[op] = handler

    def close(self) -> None:
        """Fail later calls, from both sides."""
        self.closed = True

    def serve(self, op: str, body: bytes, answer: Future[dict[str, Any]]) -> bool:
        """Answer one call, whose body comes packed; a step of `Turns`."""
        try:
            if self.closed:
                raise BrokenError("the channel was closed")
            reply = self._handlers[op](msgpack.unpackb(body))
            answer.set_result(msgpack.unpackb(msgpack.packb(dict(reply))))
        except KVConnectError as error:
            answer.set_exception(error)
        except Exception as error:  # noqa: BLE001 - a bug in a handler must fail its call, not the thread
            answer.set_exception(KVConnectError(f"{op}: {error!r}"))
        return False


def memory_channels() -> tuple[MemoryChannel, MemoryChannel]:
    """Return two joined channels."""
    a, b = MemoryChannel(), MemoryChannel()
    a.peer, b.peer = b, a
    return a, b


class _Shared:
    lock = threading.Lock()
    turns: Turns | None = None
    pid = 0


def _thread() -> Turns:
    with _Shared.lock:
        if _Shared.turns is None or _Shared.pid != os.getpid():
            _Shared.turns, _Shared.pid = Turns("kvconnect-test-channel", 1), os.getpid()
        return _Shared.turns


class MemoryExchange:
    """`PipeSpec.exchange` between two threads: the asking end's message arrives first."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._asked: queue.Queue[Body] = queue.Queue()
        self._answered: queue.Queue[Body | BaseException] = queue.Queue()

    def ask(self, mine: Body) -> Body:
        """Exchange for the asking end."""
        self._asked.put(msgpack.unpackb(msgpack.packb(dict(mine))))
        return _get(self._answered, self._timeout_s)

    def await_asked(self) -> None:
        """Block until the asking end has sent its message (the serving end opens then)."""
        self._theirs = _get(self._asked, self._timeout_s)

    def serve(self, mine: Body) -> Body:
        """Exchange for the serving end; returns at once."""
        self._answered.put(msgpack.unpackb(msgpack.packb(dict(mine))))
        return self._theirs

    def fail(self, error: BaseException) -> None:
        """End the other side's wait: this end could not open."""
        self._asked.put({})
        self._answered.put(error)


def _get(source: queue.Queue[Any], timeout_s: float) -> Body:
    try:
        got = source.get(timeout=timeout_s)
    except queue.Empty:
        raise DeadlineError(f"no message from the other end within {timeout_s} s") from None
    if isinstance(got, BaseException):
        raise BrokenError("the other end could not open") from got
    body: Body = got
    return body


class ConnectionChannel:
    """A `kvconnect.pipes.base.Channel` over one end of a `multiprocessing.Pipe`.

    A handler may also return a future, to answer later.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._handlers: dict[str, Callable[[dict[str, Any]], Body | Future[dict[str, Any]]]] = {}
        self._gone = False
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)

    def start(self) -> None:
        """Start to answer; call it once the first handlers are in place."""
        self._reader.start()

    def handle(self, op: str, handler: Callable[[dict[str, Any]], Body | Future[dict[str, Any]]]) -> None:
        """Answer the peer's calls of ``op``."""
        self._handlers[op] = handler

    def call(self, op: str, body: Body) -> Future[dict[str, Any]]:
        """Ask the peer."""
        answer: Future[dict[str, Any]] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._gone:
                answer.set_exception(BrokenError("the other process is gone"))
                return answer
            self._open[number] = answer
        self._write(["call", number, op, dict(body)])
        return answer

    def close(self) -> None:
        """Close the connection's writing side; the reader ends when the peer's does."""
        with self._writing:
            self._connection.close()

    def join(self) -> None:
        """Wait until the other process closes the connection or ends."""
        self._reader.join()

    def _write(self, frame: list[Any]) -> None:
        try:
            with self._writing:
                self._connection.send_bytes(msgpack.packb(frame))
        except OSError:
            self._fail_all()

    def _read(self) -> None:
        while True:
            try:
                kind, number, *rest = msgpack.unpackb(self._connection.recv_bytes())
            except (OSError, EOFError):
                self._fail_all()
                return
            if kind == "call":
                self._serve(number, *rest)
            else:
                self._settle(number, kind, *rest)

    def _serve(self, number: int, op: str, body: dict[str, Any]) -> None:
        try:
            reply = self._handlers[op](body)
        except Exception as error:  # noqa: BLE001 - a bug in a handler must fail its call, not the thread
            self._refuse(number, error)
            return
        if isinstance(reply, Future):
            reply.add_done_callback(lambda done: self._answer_later(number, done))
        else:
            self._write(["reply", number, dict(reply)])

    def _answer_later(self, number: int, done: Future[dict[str, Any]]) -> None:
        error = done.exception()
        if error is None:
            self._write(["reply", number, done.result()])
        else:
            self._refuse(number, error)

    def _refuse(self, number: int, error: BaseException) -> None:
        self._write(["error", number, type(error).__name__, str(error) or repr(error)])

    def _settle(self, number: int, kind: str, *rest: Any) -> None:
        with self._lock:
            answer = self._open.pop(number, None)
        if answer is None:
            return
        if kind == "reply":
            answer.set_result(rest[0])
        else:
            answer.set_exception(named_error(rest[0], rest[1]))

    def _fail_all(self) -> None:
        with self._lock:
            self._gone = True
            waiting, self._open = list(self._open.values()), {}
        for answer in waiting:
            answer.set_exception(BrokenError("the other process is gone"))


def named_error(name: str, text: str) -> KVConnectError:
    """Return the kvconnect error called ``name``, or a plain `KVConnectError` that says so."""
    kind = getattr(errors, name, None)
    simple = isinstance(kind, type) and issubclass(kind, KVConnectError) and "__init__" not in vars(kind)
    return kind(text) if simple and kind is not None else KVConnectError(f"{name}: {text}")
