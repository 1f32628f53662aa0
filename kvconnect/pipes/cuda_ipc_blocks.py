"""The block path over CUDA IPC: the peer's pool is mapped once, and one launch copies from pool to pool.

One-sided: the peer's part ends with the handles of its memory, which it gives once,
when the first transfer asks for them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from kvconnect.blocks import check_pair, check_shapes
from kvconnect.cuda import driver, ipc
from kvconnect.cuda.copier import Copier, Part, Table, copier
from kvconnect.cuda.costs import Costs, measure, run_bytes, runs
from kvconnect.cuda.lanes import lanes
from kvconnect.cuda.tiles import FROM, NBYTES, TO, Paged, UInt64Array
from kvconnect.errors import BrokenError, ClosedError, KVConnectError, LoadError
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes.base import Channel, Transfer
from kvconnect.pipes.peer_process import PeerProcess

log = logging.getLogger(__name__)

_MEMORY, _END = "cuda_ipc.memory", "cuda_ipc.end"

#: Multiprocessors that saturate NVLink (`docs/benchmarks.md`).
FEW = 16


@dataclass(frozen=True)
class _Copy:
    """One transfer: which blocks go where; a pull reads the peer's memory."""

    transfer: Transfer
    from_ids: BlockIds
    to_ids: BlockIds
    pull: bool


@dataclass(frozen=True)
class Direction:
    """Copies one way: the tables of both pools, by group what a copy engine does faster, and what copies cost."""

    table: Table
    by_engine: tuple[UInt64Array | None, ...]
    costs: Costs

    @classmethod
    def of(cls, table: Table, costs: Costs) -> Direction:
        """Decide for each group by the length of what is contiguous within a block."""
        found = [runs(t) if len(t) and costs.engine_is_faster(run_bytes(t)) else None for t in table.tiles]
        return cls(table, tuple(found), costs)


class CudaIpcBlocks:
    """The block path of one end.

    Args:
        local: this end's paged memory, on a CUDA device.
        remote: the other end's layout.
        channel: messages to the other end.
        multiprocessors: how many a copy may use, or ``None``: few between GPUs, all of them within one.
        peer_uuid: of the GPU at the other end.
        peer: the process at the other end; what is read after its end is nobody's word.

    Raises:
        HandshakeError: the layouts' shapes differ, or ``local`` cannot be exported.

    """

    def __init__(
        self,
        local: PagedMemory,
        remote: PagedLayout,
        channel: Channel,
        multiprocessors: int | None,
        *,
        peer_uuid: str,
        peer: PeerProcess,
    ) -> None:
        check_shapes(local.layout, remote)
        self._local, self._remote, self._channel = local, remote, channel
        self._peer, self._device = peer, driver.index(local.device)
        self._copier, self._lanes = copier(self._device), lanes(self._device)
        own = driver.uuid(self._device) == peer_uuid
        self.multiprocessors = multiprocessors or (self._copier.multiprocessors if own else FEW)
        self._lock = threading.Lock()
        self._mapped: ipc.Mapped | None = None
        self._pull: Direction | None = None
        self._push: Direction | None = None
        self._waiting: list[_Copy] | None = None
        self._running = 0
        self._ended: KVConnectError | None = None
        exported = ipc.export(local)
        channel.handle(_MEMORY, lambda _: exported)
        channel.handle(_END, self._peer_ended)

    # -- asking -------------------------------------------------------------------

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Start to copy the peer's blocks ``remote`` into ``local``; as `Pipe.read_blocks`."""
        nbytes = check_pair(self._local.layout, local, self._remote, remote)
        return self._start(_Copy(Transfer(nbytes), remote, local, pull=True))

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Start to copy ``local`` into the peer's blocks ``remote``; as `Pipe.write_blocks`."""
        nbytes = check_pair(self._local.layout, local, self._remote, remote)
        return self._start(_Copy(Transfer(nbytes), local, remote, pull=False))

    def close(self, error: KVConnectError) -> None:
        """Refuse new transfers with ``error``, end those that wait, and unmap the peer's memory after the rest."""
        if self._end(error):
            with contextlib.suppress(KVConnectError):  # whether the peer hears it or has gone, too, is all the same
                self._channel.call(_END, {})

    #: Nothing of it waits.
    end = close

    def _peer_ended(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self._end(BrokenError("the other end was closed"))
        return {}

    def _end(self, error: KVConnectError) -> bool:
        with self._lock:
            if self._ended is not None:
                return False
            self._ended = error
            waiting, self._waiting = self._waiting or [], None
        for copy in waiting:
            copy.transfer.finish(error)
        self._unmap_if_idle()
        return True

    def _start(self, copy: _Copy) -> Transfer:
        with self._lock:
            if self._ended is not None:
                raise self._ended
            if self._pull is not None:
                self._running += 1
                ask = None
            else:
                ask = self._waiting is None
                self._waiting = [*(self._waiting or []), copy]
        if ask is None:
            self._launch(copy)
        elif ask:
            self._channel.call(_MEMORY, {}).add_done_callback(self._answered)
        return copy.transfer

    # -- meeting the peer's memory ------------------------------------------------------

    def _answered(self, answer: Future[dict[str, Any]]) -> None:
        try:
            exported = answer.result()
        except KVConnectError as error:
            self._opened(error)
        else:
            # Mapping it takes too long for the channel's thread.
            self._lanes.chore(lambda stream: self._open(exported, stream), self._opened)

    def _open(self, exported: Mapping[str, Any], stream: Any) -> None:
        """Map the peer's memory, lay out the copies, and measure; on a thread that may block."""
        mapped = ipc.Mapped(exported, self._remote.region_bytes, self._device)
        try:
            theirs, ours = Paged(self._remote, mapped.bases), Paged.of(self._local)
            largest = max(range(len(mapped.bases)), key=self._remote.region_bytes.__getitem__)
            span = self._remote.region_bytes[largest]
            costs = measure(self._copier, mapped.bases[largest], span, stream, self.multiprocessors)
            pull = Direction.of(self._copier.table(theirs, ours), costs)
            push = Direction.of(self._copier.table(ours, theirs), costs)
        except BaseException:
            mapped.close()
            raise
        log.debug("mapped %d regions of the peer's memory: %s", len(mapped.bases), costs)
        with self._lock:
            self._mapped, self._pull, self._push = mapped, pull, push

    def _opened(self, error: KVConnectError | None) -> None:
        """Start what waited for the peer's memory, or fail it."""
        with self._lock:
            waiting, self._waiting = self._waiting or [], None
            if error is None and self._ended is None:
                self._running += len(waiting)
            else:
                error = error or self._ended
        for copy in waiting:
            if error is None:
                self._launch(copy)
            else:
                copy.transfer.finish(error)
        self._unmap_if_idle()

    # -- copying ----------------------------------------------------------------------

    def _launch(self, copy: _Copy) -> None:
        """Start a copy on the device, now; `_Copy.transfer` ends when the device is done."""

        def over(error: KVConnectError | None) -> None:
            try:
                # Its memory stays mapped when the peer is gone, but nobody vouches for it.
                self._peer.check()
            except KVConnectError as gone:
                error = error or gone
            if error is None and copy.transfer.cancelled:
                error = LoadError("the transfer was cancelled")
            copy.transfer.finish(error)
            with self._lock:
                self._running -= 1
            self._unmap_if_idle()

        direction = self._direction(copy)
        expected_s = direction.costs.kernel_s(copy.transfer.nbytes) if direction else 0.0
        self._lanes.start(lambda stream: self._enqueue(copy, stream), over, expected_s)

    def _direction(self, copy: _Copy) -> Direction | None:
        return self._pull if copy.pull else self._push

    def _enqueue(self, copy: _Copy, stream: Any) -> object:
        direction = self._direction(copy)
        if direction is None:
            raise ClosedError("the peer's memory is not mapped")
        kept = []
        # Empty groups may be left out at the end.
        for group, (sources, targets) in enumerate(zip(copy.from_ids, copy.to_ids, strict=False)):
            if not len(sources) or group >= len(direction.by_engine):
                continue
            part, by_engine = Part(group, sources, targets), direction.by_engine[group]
            if by_engine is None:
                kept.append(self._copier.launch(direction.table, part, stream, self.multiprocessors))
            else:
                _copy_runs(self._copier, by_engine, part, stream)
        return kept

    def _unmap_if_idle(self) -> None:
        with self._lock:
            if self._ended is None or self._running:
                return
            mapped, self._mapped = self._mapped, None
        self._peer.close()
        if mapped is not None:
            self._lanes.chore(lambda _: mapped.close(), _unmapped)


def _unmapped(error: KVConnectError | None) -> None:
    if error is not None:
        log.warning("could not unmap a peer's memory: %s", error)


def _copy_runs(copier: Copier, runs: UInt64Array, part: Part, stream: Any) -> None:
    """Have a copy engine move each run of each block."""
    runtime = driver.cupy().cuda.runtime
    rows = runs.astype(int).tolist()
    with driver.errors("copy"), driver.use(copier.device):
        for source, target in zip(part.from_ids, part.to_ids, strict=True):
            for row in rows:
                start = row[FROM] + source * row[FROM + 1]
                end = row[TO] + target * row[TO + 1]
                runtime.memcpyAsync(end, start, row[NBYTES], 4, stream.ptr)
