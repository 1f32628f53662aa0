"""The default block path: paged blocks over nothing but a pipe's three methods and a `Channel`.

The end that receives drives. It asks over the channel and grants credit for a
few chunks (`WINDOW`); the end that sends gathers a chunk, announces it over the
channel and sends it as one uint8 tensor that ends in a tag: which transfer, and
at which offset. Chunks of several transfers take turns; the receiver scatters
one while the next is on its way.

A pipe knows nothing of its stream. What happens to it shows in the calls to it:
where a transfer rests for `kvconnect.pipes.chunks.LISTEN_S`, one thread listens on
the pipe itself, so that a closed or broken pipe ends its transfers with an
error. A transfer on which nothing moves for ``timeout_s`` fails with
`DeadlineError` and the pipe stays usable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvconnect import blocks as paged
from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    DeadlineError,
    HandshakeError,
    KVConnectError,
    LoadError,
)
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory, Pieces
from kvconnect.pipes.base import Channel, Message, Pipe, Transfer
from kvconnect.pipes.chunks import LISTEN_S, ChunkReceiver, ChunkSender, Threads, again, ours
from kvconnect.pipes.flows import Flow, Key, Kind, count, flow_key, pack, unpack

#: Chunks of one transfer that may be under way at once; bounds what a slow receiver has to hold.
WINDOW = 4
#: Transfers that the other end may have running here at once; the rest of its requests is refused.
MAX_FLOWS = 1024


class BlockStream:
    """The block path of one end of a pipe.

    Args:
        pipe: the end; its `send_tensor` and `recv_tensor` belong to the stream from now on.
        local: this end's paged memory, on a device whose tensors the pipe carries.
        remote_layout: the other end's layout, of the same `PagedLayout.shape`.
        channel: messages to the other end's stream.
        timeout_s: a transfer on which nothing moves for so long fails.

    Raises:
        HandshakeError: the two layouts' shapes differ, or the pipe does not carry the memory's tensors.

    """

    def __init__(
        self, pipe: Pipe, local: PagedMemory, remote_layout: PagedLayout, channel: Channel, timeout_s: float = 30.0
    ) -> None:
        paged.check_shapes(local.layout, remote_layout)
        if local.device.partition(":")[0] not in pipe.traits.devices:
            carried = ", ".join(sorted(pipe.traits.devices))
            raise HandshakeError(f"the memory is on {local.device}, pipe {pipe.name!r} carries tensors on: {carried}")
        self._local, self._remote, self._channel, self._timeout_s = local, remote_layout, channel, timeout_s
        self._lock = threading.Lock()
        #: Running flows by whether this end receives in them.
        self._flows: dict[bool, dict[Key, Flow]] = {True: {}, False: {}}
        self._last_number = 0
        self._failure: KVConnectError | None = None
        self._sender = ChunkSender(pipe, local, channel, self._lock, self)
        self._receiver = ChunkReceiver(pipe, local, self._lock, self, self._flows[True].get, self._placed)
        for op, handler in self._handlers().items():
            channel.handle(op, handler)

    # -- asking -------------------------------------------------------------------

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to copy the other end's blocks ``remote`` into ``local``; as `Pipe.read_blocks`."""
        return self._begin(Kind.READ, local, remote)

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to copy ``local`` into the other end's blocks ``remote``; as `Pipe.write_blocks`.

        The transfer succeeds when the other end has acknowledged its last scatter.
        """
        return self._begin(Kind.WRITE, local, remote)

    def _begin(self, kind: Kind, local: BlockIds, remote: BlockIds) -> Transfer:
        nbytes = paged.check_pair(self._local.layout, local, self._remote, remote)
        pieces = Pieces(self._local.iovec(local))
        with self._lock:
            self._last_number += 1
            flow = Flow((kind, self._last_number), kind is Kind.READ, pieces)
            transfer = flow.transfer = Transfer(nbytes, lambda: self._stop(flow, _cancelled()))
            self._enter(flow)
        body = {"transfer": flow.key[1], "groups": pack(remote), "nbytes": nbytes, "credit": WINDOW}
        asked = self._tell("blocks.read" if flow.receives else "blocks.write", body)
        asked.add_done_callback(lambda answer: self._answered(flow, answer))
        return transfer

    def _tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        try:
            return self._channel.call(op, body)
        except Exception as error:  # noqa: BLE001 - a third party's channel that raises has failed, no more
            failed: Future[dict[str, Any]] = Future()
            failed.set_exception(ours(error))
            return failed

    def _enter(self, flow: Flow) -> None:
        if self._failure is not None:
            raise again(self._failure)
        flows = self._flows[flow.receives]
        if flow.key in flows:
            raise HandshakeError(f"transfer {flow.key[1]} is already running")
        flows[flow.key] = flow
        Threads.current().watch(self)

    def _answered(self, flow: Flow, answer: Future[dict[str, Any]]) -> None:
        try:
            credit = count(answer.result(), "credit")
        except Exception as error:  # noqa: BLE001 - whatever the channel raises ends this transfer
            self.end(flow, ours(error))
            return
        if flow.nbytes == 0:
            self.end(flow, None)
        elif not flow.receives:
            self._sender.grant(flow, credit)

    def _stop(self, flow: Flow, error: KVConnectError) -> None:
        """Give up ``flow`` at both ends; what is still on its way is received and dropped."""
        answer = self._tell("blocks.stop", flow.address())
        with self._lock:
            twice, flow.error = flow.error is not None, flow.error or error
            flow.credit = -(1 << 60)  # no more chunks, whatever the other end grants
            flow.stamp = time.monotonic()
        if flow.receives or flow.transfer is None or twice:
            self.end(flow, error)
        else:
            # The other end's blocks may be written until it says that it is done.
            answer.add_done_callback(lambda done: self._stopped(flow, done))

    def _stopped(self, flow: Flow, answer: Future[dict[str, Any]]) -> None:
        if answer.exception() is not None or not answer.result().get("running"):
            self.end(flow, None)

    # -- answering ----------------------------------------------------------------

    def _handlers(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "blocks.read": lambda body: self._accept(Kind.READ, body),
            "blocks.write": lambda body: self._accept(Kind.WRITE, body),
            "blocks.credit": self._on_credit,
            "blocks.chunk": self._on_chunk,
            "blocks.stop": self._on_stop,
            "blocks.done": self._on_done,
            "blocks.broken": self._on_broken,
        }

    def _accept(self, kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
        """The other end asks: check before anything is touched, then send, or be ready to receive.

        What it asks for costs memory here (an address and a length for every piece), so both
        the size of a request and the number of requests are bounded.
        """
        blocks = unpack(body.get("groups"))
        self._local.layout.check(blocks)
        paged.check_counts(self._local.layout, blocks)
        nbytes = self._local.layout.nbytes(blocks)
        if body.get("nbytes") != nbytes:
            raise HandshakeError(f"these blocks have {nbytes} bytes here, {body.get('nbytes')} at the other end")
        flow = Flow((kind, count(body, "transfer")), kind is Kind.WRITE, Pieces(self._local.iovec(blocks)))
        credit = count(body, "credit")
        if nbytes:
            with self._lock:
                if (
                    sum(other.transfer is None for table in self._flows.values() for other in table.values())
                    >= MAX_FLOWS
                ):
                    raise BusyError(f"{MAX_FLOWS} transfers of the other end are running here already")
                self._enter(flow)
            if not flow.receives:
                self._sender.grant(flow, credit)
        return {"credit": WINDOW}

    def _on_credit(self, body: dict[str, Any]) -> dict[str, Any]:
        flow = self._find(body)
        if flow is not None and not flow.receives:
            self._sender.grant(flow, count(body, "chunks"))
        return {}

    def _on_chunk(self, body: dict[str, Any]) -> dict[str, Any]:
        self._receiver.announced()
        return {}

    def _on_stop(self, body: dict[str, Any]) -> dict[str, Any]:
        flow = self._find(body)
        if flow is not None:
            self.end(flow, LoadError("the other end gave the transfer up"))
        return {"running": flow is not None}

    def _on_done(self, body: dict[str, Any]) -> dict[str, Any]:
        flow, error = self._find(body), body.get("error")
        if flow is not None and flow.receives and error is None:
            # Its bytes say so, when the last of them is in place.
            raise HandshakeError("only the end that receives can tell that a transfer is done")
        if flow is not None:
            self.end(flow, None if error is None else LoadError(f"the other end could not go on: {error}"))
        return {}

    def _on_broken(self, body: dict[str, Any]) -> dict[str, Any]:
        self.fail(BrokenError(f"the other end could not go on: {body.get('error')}"))
        return {}

    def _find(self, body: dict[str, Any]) -> Flow | None:
        receives, key = flow_key(body)
        with self._lock:
            return self._flows[receives].get(key)

    def _placed(self, flow: Flow) -> None:
        """A chunk is in place and more are to come: grant credit, half a window at a time."""
        half = WINDOW // 2
        if flow.chunks % half == 0 and flow.nbytes - flow.moved > half * (flow.moved // flow.chunks):
            self._tell("blocks.credit", {**flow.address(), "chunks": half})

    # -- ending -------------------------------------------------------------------

    def end(self, flow: Flow, error: KVConnectError | None) -> None:
        """End ``flow``; its blocks are free at once, or when the thread that copies them now is done."""
        with self._lock:
            if flow.ended:
                return
            flow.ended, flow.error = True, flow.error or error
            self._flows[flow.receives].pop(flow.key, None)
            if flow.copying:
                return
        self.settle(flow)

    def settle(self, flow: Flow) -> None:
        """Nobody touches the flow's blocks any more: tell whoever asked for it."""
        if flow.transfer is not None:
            flow.transfer.finish(flow.error)
        elif flow.receives or flow.error is not None:
            error = None if flow.error is None else str(flow.error)
            self._tell("blocks.done", {**flow.address(), "error": error})

    def fail(self, error: KVConnectError) -> None:
        """End all transfers, here and at the other end; begin no more."""
        with self._lock:
            first, self._failure = self._failure is None, self._failure or error
            flows = [flow for table in self._flows.values() for flow in table.values()]
        if first:
            # Before the transfers' own ends, so that the other end's fail because of the pipe, too.
            self._tell("blocks.broken", {"error": str(error)})
        for flow in flows:
            self.end(flow, error)

    def close(self) -> None:
        """End all transfers with `ClosedError`. Idempotent; leaves the pipe to its owner."""
        self.fail(ClosedError("the block path was closed"))

    def check_time(self, now: float) -> bool:
        """Fail what rested too long, listen where something rests; return whether anything runs."""
        with self._lock:
            flows = [flow for table in self._flows.values() for flow in table.values()]
        for flow in flows:
            if now - flow.stamp > self._timeout_s:
                self._stop(flow, DeadlineError(f"nothing moved for {self._timeout_s} s"))
        if any(now - flow.stamp > LISTEN_S for flow in flows):
            self._receiver.listen()
        return bool(flows)


def _cancelled() -> KVConnectError:
    return LoadError("the transfer was cancelled")
