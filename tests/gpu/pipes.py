"""A small pipe for CUDA memory within one process and on one device: the suite is tried out on it."""

from __future__ import annotations

import itertools
from collections import deque
from typing import ClassVar

import torch
from torch import Tensor

from kvconnect import blocks as paged
from kvconnect.errors import BrokenError, KVConnectError, LoadError, TensorRejectedError
from kvconnect.pipes import turns
from kvconnect.pipes.base import PipeSpec, Reach, Traits, Transfer
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.testing.layouts import regions, spans

#: Cycles that broken pipes take before they copy, so that what is in no order goes wrong every time.
HELD_CYCLES = 50_000_000
#: Pieces copied in one turn.
PIECES = 64

Parcel = tuple[Tensor, torch.cuda.Event]
Pieces = deque[tuple[Tensor, Tensor]]


class CudaPipe(InprocPipe):
    """Copies on a stream of its own, in order with the callers' by events.

    The queue of `InprocPipe` carries numbers of parcels; the parcels lie on a table.
    """

    name = "test-cuda"
    traits = Traits(devices=frozenset({"cuda"}), reach=Reach.PROCESS, one_sided=True, zero_copy=True)
    _parcels: ClassVar[dict[int, Parcel]] = {}
    _numbers = itertools.count()

    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec)
        self._device = torch.device(spec.device)
        self._stream = torch.cuda.Stream(self._device)

    def send_tensor(self, tensor):
        if tensor is None:
            super().send_tensor(None)
            return
        if tensor.layout != torch.strided or tensor.device != self._device:
            raise TensorRejectedError(f"cannot carry a {tensor.layout} tensor on {tensor.device}")
        self._check()
        number = next(self._numbers)
        self._parcels[number] = self.pack(tensor.detach())
        try:
            super().send_tensor(torch.tensor(number))
        except KVConnectError:
            del self._parcels[number]
            raise

    def recv_tensor(self):
        number = super().recv_tensor()
        return None if number is None else self.unpack(*self._parcels.pop(int(number)))

    def _check(self) -> None:
        with self._link.changed:
            self._check_usable()

    # -- what broken pipes do otherwise ---------------------------------------------

    def pack(self, tensor: Tensor) -> Parcel:
        """Copy on the own stream, after what the caller's did so far and before what it does next."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        parcel = self.copied(tensor)
        caller.wait_stream(self._stream)
        return parcel

    def copied(self, tensor: Tensor) -> Parcel:
        with torch.cuda.stream(self._stream):
            plain = tensor.resolve_conj().resolve_neg()
            return plain.clone(memory_format=torch.contiguous_format), self._stream.record_event()

    def unpack(self, parcel: Tensor, ready: torch.cuda.Event) -> Tensor:
        """Copy on the receiver's stream."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        parcel.record_stream(current)
        return parcel.clone()

    def move(self, pieces: Pieces) -> None:
        """Copy some pieces, and wait until they are there."""
        with torch.cuda.stream(self._stream):
            for _ in range(min(PIECES, len(pieces))):
                to, of = pieces.popleft()
                to.copy_(of)
            self._stream.synchronize()

    # -- blocks -----------------------------------------------------------------------

    def _copy_blocks(self, source, ours, theirs):
        with self._link.changed:
            self._check_usable()
            here, there = self._link.memory[self._side], self._link.memory[1 - self._side]
        if here is None or there is None:
            raise BrokenError("an end is not attached")
        transfer = Transfer(paged.check_pair(here.layout, ours, there.layout, theirs))
        local, remote = _pieces(here, ours), _pieces(there, theirs)
        ends = (remote, local) if source == self._side else (local, remote)
        waiting = deque(zip(*ends, strict=True))
        turns.shared().add(lambda: self._step(transfer, waiting))
        return transfer

    def _step(self, transfer: Transfer, waiting: Pieces) -> bool:
        if transfer.cancelled:
            transfer.finish(LoadError("the transfer was cancelled"))
        elif waiting and not self._begin_chunk():
            transfer.finish(BrokenError("the pipe was closed while blocks were moving"))
        elif waiting:
            try:
                self.move(waiting)
            finally:
                self._end_chunk()
        if not waiting:
            transfer.finish()
        return not transfer.done


def _pieces(memory, blocks) -> list[Tensor]:
    found = regions(memory)
    return [found[region][start:stop] for region, start, stop in spans(memory.layout, blocks)]


class SendsAtOnce(CudaPipe):
    """Does not wait for the caller's stream: poison."""

    def pack(self, tensor):
        parcel = self.copied(tensor)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return parcel


class SendsLater(CudaPipe):
    """Does not let the caller's stream wait: a late writer."""

    def pack(self, tensor):
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(HELD_CYCLES)
        return self.copied(tensor)


class HandsOutTooEarly(CudaPipe):
    """Receives on its own stream and does not let the receiver's wait: a late reader."""

    def unpack(self, parcel, ready):
        current = torch.cuda.current_stream(self._device)
        out = torch.empty_like(parcel)
        self._stream.wait_stream(current)
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(HELD_CYCLES)
            out.copy_(parcel)
        for tensor in (parcel, out):
            tensor.record_stream(self._stream)
        return out


class ReceivesOverWhatIsRead(CudaPipe):
    """Writes into ``out`` at once: an early writer."""

    def recv_tensor_into(self, out):
        number = InprocPipe.recv_tensor(self)
        parcel, ready = self._parcels.pop(int(number))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            out.copy_(parcel)
        parcel.record_stream(self._stream)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class StopsTheDevice(CudaPipe):
    """Synchronises the device for each message."""

    def unpack(self, parcel, ready):
        torch.cuda.synchronize(self._device)
        return super().unpack(parcel, ready)


class StopsTheDeviceForBlocks(CudaPipe):
    def move(self, pieces):
        super().move(pieces)
        torch.cuda.synchronize(self._device)


class SaysDoneTooEarly(CudaPipe):
    """A transfer counts as done once its copies are enqueued."""

    def move(self, pieces):
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(HELD_CYCLES // 10)
            while pieces:
                to, of = pieces.popleft()
                to.copy_(of)


class BorrowsABlock(CudaPipe):
    """Stages through the last block of a memory, and puts back what was there."""

    def move(self, pieces):
        memory = self._link.memory[self._side]
        last = [region[-(region.nbytes // memory.layout.layers[0].num_blocks) :] for region in regions(memory)]
        ranges = [range(block.data_ptr(), block.data_ptr() + block.nbytes) for block in last]
        if any(to.data_ptr() in each for to, _ in pieces for each in ranges):
            super().move(pieces)  # it is named itself
            return
        with torch.cuda.stream(self._stream):
            kept = [block.clone() for block in last]
        super().move(pieces)
        with torch.cuda.stream(self._stream):
            for block, was in zip(last, kept, strict=True):
                block.copy_(was)
            self._stream.synchronize()
