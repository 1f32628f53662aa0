"""The block path over NCCL: both ends' transfers, what they tell each other, and how they meet.

One communicator for each direction, made when the first transfer needs it: two directions
on one could wait for each other. Messages (`Channel`), handled without blocking:

- ``nccl.meet`` from the end that will receive: the communicator's name and its slots' size;
- ``nccl.orders`` from it: new reads, the next chunks in their order, and what was given up;
- ``nccl.write`` and ``nccl.stop`` from the end that sends in a write, ``nccl.done`` back;
- ``nccl.alive`` where nothing moves; ``nccl.broken`` when an end ends.

A direction that fails (a dead peer, a deadline) ends the whole block path, at both ends:
NCCL cannot take back what was enqueued, so the communicators are aborted, and whoever
opened the pipe opens another. A transfer that is cancelled harms nothing: what was
ordered of it runs to its end, and only then is it over.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from kvconnect.blocks import check_pair, check_shapes
from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    HandshakeError,
    KVConnectError,
    LoadError,
)
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes.base import Channel, Message, Transfer
from kvconnect.pipes.flows import Kind, count, pack
from kvconnect.pipes.nccl_lines import Arrival, Line, Receiver, Sender, Wire, ending
from kvconnect.pipes.nccl_loop import Loop
from kvconnect.pipes.nccl_plan import Key, read_selection, slot_bytes
from kvconnect.pipes.turns import Turns

log = logging.getLogger(__name__)

#: Writes that the other end may have running here at once; the rest is refused.
MAX_WRITES = 1 << 12
#: Reads likewise. It asks when it is about to order them; beyond this it does not mean to.
MAX_READS = 1 << 14
_LET_GO_S = 5.0


class Wires(Protocol):
    """How an end makes its wires.

    Args:
        loop: the thread of all lines of the device.
        meetings: threads that may wait; what is here is called on them.

    """

    loop: Loop
    meetings: Turns

    def name(self) -> bytes:
        """Return the name of a new communicator."""
        ...

    def make(self, name: bytes, slot_bytes: int, *, receives: bool) -> Wire:
        """Return this end's wire on that communicator, which the other end is perhaps still to join."""
        ...


class NcclBlocks:
    """The block path of one end.

    Args:
        local: this end's paged memory.
        remote: the other end's layout.
        channel: messages to the other end.
        wires: makes them.
        slot_bytes: the largest chunk that this end wishes for.
        timeout_s: how long nothing may move while something should.

    Raises:
        HandshakeError: the layouts' shapes differ.

    """

    def __init__(
        self,
        local: PagedMemory,
        remote: PagedLayout,
        channel: Channel,
        wires: Wires,
        *,
        slot_bytes: int,
        timeout_s: float,
    ) -> None:
        check_shapes(local.layout, remote)
        self._layout, self._remote, self._channel = local.layout, remote, channel
        self._wires, self._loop, self._slot_bytes = wires, wires.loop, slot_bytes
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._ended: KVConnectError | None = None
        self._writes: dict[int, Transfer] = {}
        self._arriving = 0
        self._met = False
        sizes = local.layout.block_bytes
        self._into = Receiver(self, timeout_s, sizes, self._meet)
        self._out = Sender(self, timeout_s, sizes, self._released)
        handlers: dict[str, Callable[[dict[str, Any]], Message]] = {
            "nccl.meet": self._on_meet,
            "nccl.orders": self._on_orders,
            "nccl.write": self._on_write,
            "nccl.stop": self._on_stop,
            "nccl.done": self._on_done,
            "nccl.alive": self._on_alive,
            "nccl.broken": self._on_broken,
        }
        for op, handler in handlers.items():
            channel.handle(op, handler)

    # -- asking -------------------------------------------------------------------

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to copy the peer's blocks ``remote`` into ``local``; as `Pipe.read_blocks`."""
        key, transfer = self._begin(Kind.READ, remote, local)
        if not transfer.nbytes:
            transfer.finish()
            return transfer
        ask = {"number": key[1], "groups": pack(remote), "nbytes": transfer.nbytes}
        arrival = Arrival(key, _own(local), transfer.finish, ask)
        self._loop.bring(self._into, lambda: self._into.add(arrival))
        return transfer

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to copy ``local`` into the peer's blocks ``remote``; as `Pipe.write_blocks`."""
        key, transfer = self._begin(Kind.WRITE, remote, local)
        if not transfer.nbytes:
            transfer.finish()
            return transfer
        body = {"number": key[1], "groups": pack(remote), "nbytes": transfer.nbytes}
        ids = _own(local)
        self._loop.bring(self._out, lambda: self._offer(key, ids, body, transfer))
        return transfer

    def _begin(self, kind: Kind, remote: BlockIds, local: BlockIds) -> tuple[Key, Transfer]:
        self._check_usable()
        nbytes = check_pair(self._layout, local, self._remote, remote)
        key = kind, next(self._numbers)
        return key, Transfer(nbytes, lambda: self._give_up(key))

    def _check_usable(self) -> None:
        error = self._ended
        if isinstance(error, ClosedError):
            raise ClosedError(str(error)) from error
        if error is not None:
            raise BrokenError(str(error)) from error

    def _give_up(self, key: Key) -> None:
        """Have a transfer of this end's end soon; behind its beginning, which is posted, too."""
        if key[0] is Kind.READ:
            self._loop.post(self._into, lambda: self._into.stop(key))
        else:
            self._loop.post(self._out, lambda: self._send("nccl.stop", {"number": key[1]}))

    def _offer(self, key: Key, ids: BlockIds, body: Message, transfer: Transfer) -> None:
        if self._out.error is not None:
            transfer.finish(self._out.error)
            return
        self._writes[key[1]] = transfer
        self._out.know(key, ids)
        self._channel.call("nccl.write", body).add_done_callback(lambda answer: self._offered(key, answer))

    def _offered(self, key: Key, answer: Future[dict[str, Any]]) -> None:
        error = answer.exception()
        if isinstance(error, (HandshakeError, BusyError)):
            refused: KVConnectError = error

            def forget() -> None:
                self._out.forget(key)
                self._finish_write(key[1], refused)

            self._loop.post(self._out, forget)
        elif error is not None:
            self.end(BrokenError(f"the other end cannot be asked: {error}"))

    def _finish_write(self, number: int, error: KVConnectError | None) -> None:
        transfer = self._writes.pop(number, None)
        if transfer is not None:
            transfer.finish(error)

    def _released(self) -> None:
        for number in list(self._writes):
            self._finish_write(number, self._out.error)

    # -- meeting --------------------------------------------------------------------

    def _meet(self) -> None:
        """Have the other end join a communicator; all of it on threads that may wait."""

        def name() -> None:
            body = {"name": self._wires.name(), "slot_bytes": self._slot_bytes}
            log.debug("asks the other end to a communicator")
            self._channel.call("nccl.meet", body).add_done_callback(lambda answer: answered(body["name"], answer))

        def answered(named: Any, answer: Future[dict[str, Any]]) -> None:
            try:
                theirs = count(answer.result(), "slot_bytes")
            except KVConnectError as error:
                self.end(BrokenError(f"the other end does not join: {error}"))
            else:
                self._join(named, theirs, self._into)

        self._wait(name)

    def _join(self, name: bytes, theirs: int, line: Line) -> None:
        size = slot_bytes(self._layout, self._slot_bytes, theirs)

        def join() -> None:
            began = time.monotonic()
            wire = self._wires.make(name, size, receives=line is self._into)
            log.debug("a wire with slots of %d bytes begun in %.3f s", size, time.monotonic() - began)
            self._loop.post(line, lambda: line.wired(wire))

        self._wait(join)

    def _wait(self, job: Callable[[], None]) -> None:
        def step() -> bool:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - whatever CUDA's bindings raise, transfers must hear of it
                self.end(error if isinstance(error, KVConnectError) else BrokenError(f"cannot meet: {error!r}"))
            return False

        self._wires.meetings.add(step)

    def call(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Ask the other end, for a line; as `end` it is what they reach the rest by."""
        return self._channel.call(op, body)

    # -- answering, on the channel's thread ---------------------------------------------

    def _on_meet(self, body: dict[str, Any]) -> Message:
        name = body.get("name")
        theirs = count(body, "slot_bytes")
        self._check_usable()
        with self._lock:
            again, self._met = self._met, True
        if again or not isinstance(name, bytes):
            raise HandshakeError("the other end asks to a second communicator, or to none")
        self._join(name, theirs, self._out)
        return {"slot_bytes": self._slot_bytes}

    def _on_orders(self, body: dict[str, Any]) -> Message:
        self._check_usable()
        asks = [read_selection(self._layout, ask) for ask in _rows(body, "asks")]
        first, rows = count(body, "first"), _rows(body, "rows")
        drops = [(Kind(kind), int(number)) for kind, number in map(_pair, _rows(body, "drops"))]

        def take() -> None:
            if self._out.error is not None:
                return
            if self._out.known + len(asks) > MAX_READS:
                raise HandshakeError(f"the other end asks for more than {MAX_READS} transfers at once")
            for number, ids in asks:
                self._out.know((Kind.READ, number), ids)
            self._out.ordered(first, rows)
            for key in drops:
                self._out.forget(key)

        self._loop.bring(self._out, take)
        return {}

    def _on_write(self, body: dict[str, Any]) -> Message:
        self._check_usable()
        number, ids = read_selection(self._layout, body)
        with self._lock:
            if self._arriving >= MAX_WRITES:
                raise BusyError(f"{MAX_WRITES} transfers of the other end are running here already")
            self._arriving += 1
        arrival = Arrival((Kind.WRITE, number), ids, lambda error: self._written(number, error))
        self._loop.bring(self._into, lambda: self._into.add(arrival))
        return {}

    def _written(self, number: int, error: KVConnectError | None) -> None:
        with self._lock:
            self._arriving -= 1
        # Of anything worse the other end hears by ``nccl.broken``, and waits for its own device first.
        if error is None or isinstance(error, (LoadError, HandshakeError)):
            self._send("nccl.done", {"number": number, "error": None if error is None else str(error)})

    def _on_stop(self, body: dict[str, Any]) -> Message:
        key = Kind.WRITE, count(body, "number")
        self._loop.post(self._into, lambda: self._into.stop(key))
        return {}

    def _on_done(self, body: dict[str, Any]) -> Message:
        number, error = count(body, "number"), body.get("error")
        failed = None if error is None else LoadError(f"the other end could not go on: {error}")
        self._loop.post(self._out, lambda: self._finish_write(number, failed))
        return {}

    def _on_alive(self, body: dict[str, Any]) -> Message:
        self._check_usable()
        return {}

    def _on_broken(self, body: dict[str, Any]) -> Message:
        self.end(BrokenError(f"the other end ended: {body.get('error')}"), tell=False)
        return {}

    # -- the end ----------------------------------------------------------------------

    def end(self, error: KVConnectError, *, tell: bool = True) -> None:
        """Refuse new transfers and end the others with ``error``, at both ends. Idempotent, never blocks."""
        with self._lock:
            if self._ended is not None:
                return
            ended = self._ended = ending(error)
        log.debug("the block path ends: %s", error)
        for line in (self._into, self._out):
            self._loop.post(line, lambda line=line: line.fail(ended))  # type: ignore[misc]
        if tell:
            self._send("nccl.broken", {"error": str(error)})

    def close(self, error: KVConnectError) -> None:
        """End and wait, for a few seconds at most, until the device does nothing for this end any more."""
        self.end(error)
        if not self._loop.is_current():
            deadline = time.monotonic() + _LET_GO_S
            for line in (self._into, self._out):
                line.ended.wait(max(0.0, deadline - time.monotonic()))

    def _send(self, op: str, body: Message) -> None:
        """Tell the other end something that needs no answer: if it is gone, that shows elsewhere."""

        def heard(answer: Future[dict[str, Any]]) -> None:
            if (error := answer.exception()) is not None:
                log.debug("the other end did not take %s: %s", op, error)

        self._channel.call(op, body).add_done_callback(heard)


def _own(blocks: BlockIds) -> BlockIds:
    """Return a copy that the caller cannot change."""
    return [list(ids) for ids in blocks]


def _rows(body: dict[str, Any], field: str) -> list[Any]:
    rows = body.get(field)
    if not isinstance(rows, list):
        raise HandshakeError(f"{field} must be a list, got {rows!r}")
    return rows


def _pair(row: Any) -> tuple[int, int]:
    if not isinstance(row, list) or len(row) != 2 or row[0] not in (Kind.READ, Kind.WRITE):
        raise HandshakeError(f"a transfer's name is {row!r}")
    kind, number = row
    if not isinstance(number, int):
        raise HandshakeError(f"a transfer's name is {row!r}")
    return int(kind), number
