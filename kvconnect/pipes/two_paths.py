"""What device pipes have in common: a path for tensors from the start, and one for blocks once they are attached.

A medium makes the two; this is the pipe around them, with its ends.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from kvconnect.errors import BusyError, ClosedError, KVConnectError
from kvconnect.pipes.base import Channel, Pipe, Transfer

if TYPE_CHECKING:
    from torch import Tensor

    from kvconnect.paging import BlockIds, PagedLayout, PagedMemory


class TensorPath(Protocol):
    """The tensor path of one end; every method is the contract's."""

    def send(self, tensor: Tensor | None) -> None:
        """As `Pipe.send_tensor`."""
        ...

    def receive(self) -> Tensor | None:
        """As `Pipe.recv_tensor`."""
        ...

    def receive_into(self, out: Tensor) -> None:
        """As `Pipe.recv_tensor_into`."""
        ...

    def close(self) -> None:
        """As `Pipe.close`."""
        ...

    def abort(self) -> None:
        """As `Pipe.abort`."""
        ...


class BlockPath(Protocol):
    """The block path of one end."""

    def read(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """As `Pipe.read_blocks`."""
        ...

    def write(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """As `Pipe.write_blocks`."""
        ...

    def close(self, error: KVConnectError) -> None:
        """Refuse new transfers with ``error`` and end the others. Idempotent; may wait for the device."""
        ...

    def end(self, error: KVConnectError) -> None:
        """As `close`, without waiting for anything."""
        ...


class TwoPathPipe(Pipe):
    """A pipe that forwards to its two paths.

    Args:
        tensors: the tensor path, open; the pipe's to close from now on.
        timeout_s: the pipe's deadline.

    """

    def __init__(self, tensors: TensorPath, timeout_s: float) -> None:
        self._tensors, self.timeout_s = tensors, timeout_s
        self._blocks: BlockPath | None = None
        self._lock = threading.Lock()
        self._ended: ClosedError | None = None

    @abstractmethod
    def make_blocks(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> BlockPath:
        """Make the block path of this end; called once at most. Raises as `Pipe.attach`."""

    def let_go(self) -> None:
        """Give back what a block path would have: the pipe ended before there was one."""

    # -- tensors ----------------------------------------------------------------------

    def send_tensor(self, tensor: Tensor | None) -> None:
        """See `Pipe.send_tensor`."""
        self._tensors.send(tensor)

    def recv_tensor(self) -> Tensor | None:
        """See `Pipe.recv_tensor`."""
        return self._tensors.receive()

    def recv_tensor_into(self, out: Tensor) -> None:
        """See `Pipe.recv_tensor_into`."""
        self._tensors.receive_into(out)

    # -- blocks -----------------------------------------------------------------------

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """See `Pipe.attach`."""
        with self._lock:
            self._check_open()
            if self._blocks is not None:
                raise BusyError("this pipe is attached to paged memory already")
            self._blocks = self.make_blocks(local, remote, channel)

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """See `Pipe.read_blocks`."""
        return self._block_path().read(remote, local)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """See `Pipe.write_blocks`."""
        return self._block_path().write(local, remote)

    def _block_path(self) -> BlockPath:
        self._check_open()
        if self._blocks is None:
            raise ClosedError("attach() this pipe to paged memory before moving blocks")
        return self._blocks

    def _check_open(self) -> None:
        if self._ended is not None:
            raise ClosedError(str(self._ended)) from self._ended

    # -- the end ----------------------------------------------------------------------

    def close(self) -> None:
        """See `Pipe.close`."""
        error, blocks = self._begin_end()
        if blocks is not None:
            blocks.close(error)
        self._tensors.close()

    def abort(self) -> None:
        """See `Pipe.abort`."""
        error, blocks = self._begin_end()
        if blocks is not None:
            blocks.end(error)
        self._tensors.abort()

    def _begin_end(self) -> tuple[ClosedError, BlockPath | None]:
        with self._lock:
            self._ended = self._ended or ClosedError("this end was closed")
            if self._blocks is None:
                self.let_go()
            return self._ended, self._blocks
