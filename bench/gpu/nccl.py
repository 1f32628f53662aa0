"""Raw NCCL: one contiguous send and receive, P to D, as a ceiling for what is built on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.contender import Contender, Host, Ids
from bench.gpu.memory import BLOCK_BYTES, BLOCKWISE
from kvconnect.cuda import nccl

#: Ways: many in a row, timed on the device; one at a time, P told by a message, timed by the clock.
STREAM, ASKED = "stream", "asked"
_IN_A_ROW = 4
_UINT8 = 1  # ncclUint8
_MOST_CTAS = 64
_LIMIT_S = 20.0


class _Own:
    """Our binding with the interface of CuPy's: no limit that NCCL's default would not have."""

    get_unique_id = staticmethod(nccl.unique_id)

    class NcclCommunicator:
        def __init__(self, _ranks: int, name: bytes, rank: int) -> None:
            import cupy  # type: ignore[import-not-found,unused-ignore]

            self._trial = cupy.empty(nccl.TRIAL_BYTES, cupy.uint8)
            self._made = nccl.Communicator(
                name, sends=rank == 0, max_ctas=_MOST_CTAS, address=self._trial.data.ptr, stream=0
            )
            deadline = time.monotonic() + _LIMIT_S
            while not self._made.settled():
                if time.monotonic() > deadline:
                    raise TimeoutError("NCCL did not settle")

        def send(self, address: int, count: int, _dtype: int, _peer: int, stream: int) -> None:
            self._made.move(address, count, stream)

        recv = send


def _binding() -> Any:
    """Return CuPy's binding, which is nobody's here; ours where CuPy was built without."""
    try:
        from cupy.cuda import nccl as theirs  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return _Own
    return theirs if getattr(theirs, "available", True) else _Own


class RawNccl(Contender):
    """Both processes call NCCL; D times. Moves the start of the block-outermost pools."""

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(host, options)
        import cupy  # type: ignore[import-not-found,unused-ignore]

        self._cupy = cupy
        self._nccl = _binding()
        # Bytes or a tuple of integers, by CuPy's version; made in P.
        self._id: Any = None if host.near else self._nccl.get_unique_id()
        self._rank = 1 if host.near else 0
        self._communicator: Any = None
        with cupy.cuda.Device(host.gpu):
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def describe(self) -> dict[str, Any]:
        """Return NCCL's unique id."""
        return {"id": self._id if self._id is None or isinstance(self._id, bytes) else list(self._id)}

    def meet(self, theirs: dict[str, Any]) -> None:
        """Make the communicator; blocks until the other process does."""
        known = theirs["id"] if self._id is None else self._id
        known = known if isinstance(known, bytes) else tuple(known)
        with self._cupy.cuda.Device(self.host.gpu):
            self._communicator = self._nccl.NcclCommunicator(2, known, self._rank)

    def time(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> list[float]:
        """See `Contender.time`."""
        with self._cupy.cuda.Device(self.host.gpu):
            if way == STREAM:
                return [self._in_a_row(len(ids) * BLOCK_BYTES) for ids in near]
            return [self._asked(len(ids) * BLOCK_BYTES) for ids in near]

    def assist(self, way: str, layout: str, near: Sequence[Ids], far: Sequence[Ids]) -> None:
        """Send what D receives."""
        with self._cupy.cuda.Device(self.host.gpu):
            for ids in near:
                if way == STREAM:
                    self._in_a_row(len(ids) * BLOCK_BYTES)
                else:
                    self.host.peer.recv()
                    self._move(len(ids) * BLOCK_BYTES)
                    self._stream.synchronize()

    def _in_a_row(self, nbytes: int) -> float:
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self._move(nbytes)  # not timed: the two sides meet here
        begin.record(self._stream)
        for _ in range(_IN_A_ROW):
            self._move(nbytes)
        end.record(self._stream)
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / _IN_A_ROW

    def _asked(self, nbytes: int) -> float:
        start = time.perf_counter()
        self.host.peer.send({})
        self._move(nbytes)
        self._stream.synchronize()
        return time.perf_counter() - start

    def _move(self, nbytes: int) -> None:
        call = self._communicator.recv if self.host.near else self._communicator.send
        call(self.host.pools[BLOCKWISE].bases[0], nbytes, _UINT8, 1 - self._rank, self._stream.ptr)
