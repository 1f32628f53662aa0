"""The reference pipe: both ends in one process, messages in a bounded queue.

The shortest statement of the contract in `kvconnect.pipes.base`. The serving
end puts a link on a table and sends its number through `PipeSpec.exchange`; the
asking end picks it up there. A send copies the tensor, a receive hands the copy
over. Blocks are copied straight from one paged memory to the other.
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.config import parse_options
from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    ConfigError,
    DeadlineError,
    EndOfPipe,
    HandshakeError,
    LoadError,
    TensorRejectedError,
)
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory, Pieces, spans
from kvconnect.pipes import turns, vectored
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.base import Channel, Pipe, PipeSpec, Reach, Traits, Transfer
from kvconnect.pipes.turns import CHUNK_BYTES as CHUNK


@dataclass(frozen=True)
class InprocOptions:
    """Options of this pipe.

    Args:
        depth: messages that may wait in one direction before a send blocks.

    """

    depth: int = 16


class _Link:
    """What the two ends share. Side 0 serves, side 1 asks; all fields under ``changed``."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        #: Messages on their way *to* each side.
        self.waiting: tuple[deque[Tensor | None], deque[Tensor | None]] = (deque(), deque())
        self.closed = [False, False]
        self.broken = False
        self.memory: list[PagedMemory | None] = [None, None]
        #: Chunks being copied by threads right now, between the two memories.
        self.copying = 0


_links: dict[int, _Link] = {}


class InprocPipe(Pipe):
    """One end of a pipe inside one process."""

    name: ClassVar[str] = "inproc"
    traits: ClassVar[Traits] = Traits(reach=Reach.PROCESS, one_sided=True, zero_copy=True)

    def __init__(self, spec: PipeSpec) -> None:
        """Meet the other end.

        Raises:
            ConfigError: a wrong option.
            HandshakeError: the other end is in another process, or already gone.

        """
        options = parse_options(InprocOptions, spec.options, "pipe")
        if options.depth < 1:
            raise ConfigError(f"pipe.depth must be at least 1, got {options.depth}")
        self._depth, self._timeout_s = options.depth, spec.timeout_s
        self._side = 0 if spec.side == "serves" else 1
        self._sending, self._receiving = Alone("send"), Alone("receive")
        self._token = 0
        self._link = self._offer(spec) if spec.side == "serves" else self._meet(spec)

    def _offer(self, spec: PipeSpec) -> _Link:
        self._token = secrets.randbits(63)  # not to be guessed by whoever else asks this process
        link = _links[self._token] = _Link()
        try:
            spec.exchange({"pid": os.getpid(), "token": self._token})
        except BaseException:
            _links.pop(self._token, None)
            raise
        return link

    @staticmethod
    def _meet(spec: PipeSpec) -> _Link:
        theirs = spec.exchange({"pid": os.getpid()})
        here, token = theirs.get("pid") == os.getpid(), theirs.get("token")
        link = _links.pop(token, None) if here and isinstance(token, int) else None
        if link is None:
            raise HandshakeError(f"inproc joins ends of one process: ours is {os.getpid()}, theirs {theirs.get('pid')}")
        return link

    # -- tensors ------------------------------------------------------------------

    def send_tensor(self, tensor: Tensor | None) -> None:
        """Queue a copy of ``tensor`` for the other end."""
        copy = None if tensor is None else _copy(tensor)
        queue, link = self._link.waiting[1 - self._side], self._link
        with self._sending, link.changed:
            self._await(lambda: len(queue) < self._depth or link.closed[1 - self._side], "room for the message")
            if link.closed[1 - self._side]:
                raise BrokenError("the other end was closed and receives no more")
            queue.append(copy)
            link.changed.notify_all()

    def recv_tensor(self) -> Tensor | None:
        """Take the next message; the tensor is this end's own."""
        queue, link = self._link.waiting[self._side], self._link
        with self._receiving, link.changed:
            self._await(lambda: bool(queue) or link.closed[1 - self._side], "a message")
            if not queue:
                raise EndOfPipe("the other end was closed")
            link.changed.notify_all()
            return queue.popleft()

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        link = self._link
        in_time = link.changed.wait_for(lambda: self._over() or ready(), self._timeout_s)
        self._check_usable()
        if not in_time:
            # Nothing of a message has moved, so the pipe stays usable.
            raise DeadlineError(f"no {what} within {self._timeout_s} s")

    def _over(self) -> bool:
        return self._link.closed[self._side] or self._link.broken

    def _check_usable(self) -> None:
        if self._link.closed[self._side]:
            raise ClosedError("this end was closed")
        if self._link.broken:
            raise BrokenError("the other end was aborted")

    def close(self) -> None:
        """End in order: what was sent stays queued for the other end."""
        self._end(flush=True)

    def abort(self) -> None:
        """End at once: what was sent and not yet received is lost."""
        self._end(flush=False)

    def _end(self, *, flush: bool) -> None:
        _links.pop(self._token, None)
        link = self._link
        with link.changed:
            if not flush and not link.closed[self._side]:
                link.broken = True
                link.waiting[0].clear()
                link.waiting[1].clear()
            link.closed[self._side] = True
            link.memory[self._side] = None
            link.waiting[self._side].clear()
            link.changed.notify_all()
            if flush:
                # Chunks end by themselves; afterwards nobody touches this end's blocks.
                link.changed.wait_for(lambda: link.copying == 0, self._timeout_s)

    # -- blocks -------------------------------------------------------------------

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """Show this end's memory to the other end."""
        paged.check_shapes(local.layout, remote)
        with self._link.changed:
            self._check_usable()
            if self._link.memory[self._side] is not None:
                raise BusyError("this pipe is attached to paged memory already")
            self._link.memory[self._side] = local

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Copy the other end's blocks into this end's, a chunk at a time."""
        return self._copy_blocks(source=1 - self._side, ours=local, theirs=remote)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Copy this end's blocks into the other end's, a chunk at a time."""
        return self._copy_blocks(source=self._side, ours=local, theirs=remote)

    def _copy_blocks(self, source: int, ours: BlockIds, theirs: BlockIds) -> Transfer:
        with self._link.changed:
            self._check_usable()
            here, there = self._link.memory[self._side], self._link.memory[1 - self._side]
        if here is None:
            raise ClosedError("attach() this pipe to paged memory before moving blocks")
        if there is None:
            raise BrokenError("the other end is not attached to paged memory, or no longer")
        transfer = Transfer(paged.check_pair(here.layout, ours, there.layout, theirs))
        here_pieces, there_pieces = Pieces(here.iovec(ours)), Pieces(there.iovec(theirs))
        ends = (there_pieces, here_pieces) if source == self._side else (here_pieces, there_pieces)
        waiting = deque(spans(transfer.nbytes, CHUNK))
        # The pieces are bare addresses: the step keeps the memories behind them alive.
        turns.shared().add(functools.partial(self._copy_chunk, transfer, waiting, ends, (here, there)))
        return transfer

    def _copy_chunk(
        self,
        transfer: Transfer,
        waiting: deque[tuple[int, int]],
        ends: tuple[Pieces, Pieces],
        memories: tuple[PagedMemory, PagedMemory],
    ) -> bool:
        """Copy the next chunk to the first of ``ends``, both in ``memories``; return whether more remain."""
        if transfer.cancelled:
            transfer.finish(LoadError("the transfer was cancelled"))
        elif waiting and not self._begin_chunk():
            transfer.finish(BrokenError("the pipe was closed while blocks were moving"))
        elif waiting:
            try:
                to, of = ends
                span = waiting.popleft()
                vectored.copy(to.cut(*span), of.cut(*span))
            finally:
                self._end_chunk()
        if not waiting:
            transfer.finish()
        return not transfer.done

    def _begin_chunk(self) -> bool:
        with self._link.changed:
            if self._link.broken or any(self._link.closed):
                return False
            self._link.copying += 1
            return True

    def _end_chunk(self) -> None:
        with self._link.changed:
            self._link.copying -= 1
            self._link.changed.notify_all()


def _copy(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TensorRejectedError(f"a message is a tensor or None, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise TensorRejectedError(f"cannot carry a {tensor.layout} {tensor.dtype} tensor on {tensor.device}")
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format)
