"""Pipes that damage what they carry, and do not say so."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, ClassVar

from kvconnect.pipes.base import Channel, Pipe, Transfer

if TYPE_CHECKING:
    from kvconnect.paging import BlockIds, PagedLayout, PagedMemory


class Damage:
    """What a `corrupting` pipe does: flip a bit of the byte at ``offset`` of each of the next ``reads`` reads."""

    def __init__(self, reads: int = 1, offset: int = 0) -> None:
        self.reads, self.offset = reads, offset

    def inflict(self, memory: PagedMemory, blocks: BlockIds) -> None:
        """Damage blocks in CPU memory, if it is time."""
        if self.reads <= 0 or not memory.layout.nbytes(blocks):
            return
        self.reads -= 1
        left = self.offset % memory.layout.nbytes(blocks)
        for address, nbytes in memory.iovec(blocks).tolist():
            if left < nbytes:
                ctypes.c_ubyte.from_address(address + left).value ^= 0x04
                return
            left -= nbytes


def corrupting(pipe_class: type[Pipe], damage: Damage) -> type[Pipe]:
    """Return ``pipe_class``, with ``damage`` to the blocks that it reads into CPU memory, after they have arrived."""

    class Corrupting(pipe_class):  # type: ignore[misc, valid-type]
        """Damages what it has read."""

        inner: ClassVar[type[Pipe]] = pipe_class

        def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
            super().attach(local, remote, channel)
            self._damaged = local

        def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
            inner = super().read_blocks(remote, local)
            outer = Transfer(inner.nbytes, inner.cancel)

            def over(_: Any) -> None:
                if inner.error is None:
                    damage.inflict(self._damaged, local)
                outer.finish(inner.error)

            inner.add_done_callback(over)
            return outer

    return Corrupting
