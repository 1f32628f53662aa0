"""The laws are laws: for each one a pipe that breaks it, and is caught."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvconnect import errors
from kvconnect.paging import BlockIds
from kvconnect.pipes.base import Pipe, PipeSpec, Reach, Traits, Transfer
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.testing import block_laws, pipe_laws
from kvconnect.testing.peers import PipePair, open_pair
from kvconnect.testing.processes import seen_there

Law = Callable[[PipePair], None]


def many_pipes(pair: PipePair) -> None:
    """As many as show that threads grow with them."""
    block_laws.many_pipes_are_served_by_a_fixed_set_of_threads(pair.pipe_class, pipes=12)


many_pipes.__name__ = block_laws.many_pipes_are_served_by_a_fixed_set_of_threads.__name__


class OvertakesMiddlingOnes(InprocPipe):
    """Messages of one to two MiB go another way, where the next one overtakes them."""

    held: Tensor | None = None

    def send_tensor(self, tensor):
        held, self.held = self.held, None
        if held is None and tensor is not None and not tensor.is_sparse and 1 << 20 <= tensor.nbytes <= 2 << 20:
            self.held = tensor.clone()
            return
        super().send_tensor(tensor)
        if held is not None:
            super().send_tensor(held)


class TakesNoneTwiceForTheEnd(InprocPipe):
    last: Tensor | None = torch.empty(0)

    def recv_tensor(self):
        before, self.last = self.last, super().recv_tensor()
        if before is None and self.last is None:
            raise errors.EndOfPipe("None")
        return self.last


class EndsSeveralWithAnEmptyOneForNone(InprocPipe):
    def send_tensors(self, tensors):
        super().send_tensors([*tensors[:-1], torch.empty(0)] if tensors[-1] is None else tensors)


class KeepsLargeMemoryOfTheSenders(InprocPipe):
    """What is large is copied when it is received."""

    def send_tensor(self, tensor):
        with self._link.changed:
            super().send_tensor(tensor)
            if tensor is not None and tensor.nbytes >= 1 << 20:
                self._link.waiting[1 - self._side][-1] = tensor

    def recv_tensor(self):
        got = super().recv_tensor()
        return None if got is None else got.clone()


class ReceivesIntoOnePage(InprocPipe):
    """What fills most of a page is received into the same one time and again."""

    page: Tensor | None = None

    def recv_tensor(self):
        got = super().recv_tensor()
        if got is None or not 2048 < got.nbytes < 4096:
            return got
        self.page = got if self.page is None else self.page.copy_(got)
        return self.page


class FlattensScalars(InprocPipe):
    def recv_tensor(self):
        got = super().recv_tensor()
        return got if got is None or got.dim() else got.reshape(1)


class WidensBfloat16(InprocPipe):
    def recv_tensor(self):
        got = super().recv_tensor()
        return got.float() if got is not None and got.dtype is torch.bfloat16 else got


class SendsBeforeItLooks(InprocPipe):
    """Refuses too late: a trace of the message is in the stream."""

    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except errors.TensorRejectedError:
            super().send_tensor(torch.empty(0))
            raise


class DoesNotSayWhatItCarries(InprocPipe):
    traits = Traits(devices=frozenset({"cuda"}), reach=Reach.PROCESS)


class ReceivesIntoWithoutLooking(InprocPipe):
    def recv_tensor_into(self, out):
        got = self.recv_tensor()
        if got is not None:
            out.flatten()[: got.numel()] = got.flatten()[: out.numel()]


class LetsTwoReceive(InprocPipe):
    def recv_tensor(self):
        self._receiving = threading.Lock()
        return super().recv_tensor()


class LetsTwoSend(InprocPipe):
    def send_tensor(self, tensor):
        self._sending = threading.Lock()
        super().send_tensor(tensor)


class OneDirectionAtATime(InprocPipe):
    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec)
        self._sending = self._receiving


class SaysEndOfPipeWhereItsOwnEndCloses(InprocPipe):
    def recv_tensor(self):
        open_ = not self._over()
        try:
            return super().recv_tensor()
        except errors.ClosedError as error:
            if open_:
                raise errors.EndOfPipe("closed") from error
            raise


class SaysBrokenWhereItsOwnEndAborts(InprocPipe):
    def send_tensor(self, tensor):
        open_ = not self._over()
        try:
            super().send_tensor(tensor)
        except errors.ClosedError as error:
            if open_:
                raise errors.BrokenError("aborted") from error
            raise


class SendsAfterItsClose(InprocPipe):
    ended = False

    def send_tensor(self, tensor):
        if not self.ended:
            super().send_tensor(tensor)

    def close(self) -> None:
        super().close()
        self.ended = True


class ForgetsWhatItSentIfItHasReadAll(InprocPipe):
    def close(self) -> None:
        if not self._link.waiting[self._side]:
            self.abort()
        super().close()


class ForgetsWhatItSentIfItHasNotReadAll(InprocPipe):
    """As a socket does that resets."""

    def close(self) -> None:
        if self._link.waiting[self._side]:
            self.abort()
        super().close()


class AbortsAfterItsSend(InprocPipe):
    """Gives a send that is stuck another moment."""

    def abort(self) -> None:
        with self._link.changed:
            self._link.changed.wait_for(lambda: not self._sending.lock.locked(), 1.5)
        super().abort()


class SendsOverABrokenWire(InprocPipe):
    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except errors.BrokenError:
            if not self._link.broken:
                raise


class SendsIntoTheVoid(InprocPipe):
    """Says nothing where the other end was closed in order."""

    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except errors.BrokenError:
            if self._link.broken:
                raise


class DiesOfSilence(InprocPipe):
    def recv_tensor(self):
        try:
            return super().recv_tensor()
        except errors.DeadlineError:
            self._link.broken = True
            raise


class HasNoDeadline(InprocPipe):
    """Says so when nobody receives, and delivers the message all the same."""

    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except errors.DeadlineError:
            self._link.waiting[1 - self._side].append(torch.zeros(1))
            raise


class LeavesAFile(InprocPipe):
    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec)
        self.left = os.open(os.devnull, os.O_RDONLY)


CAUGHT: list[tuple[type[Pipe], Law]] = [
    (OvertakesMiddlingOnes, pipe_laws.messages_arrive_in_the_order_sent),
    (TakesNoneTwiceForTheEnd, pipe_laws.none_is_a_message_not_an_end),
    (EndsSeveralWithAnEmptyOneForNone, pipe_laws.several_tensors_at_once_arrive_in_order),
    (KeepsLargeMemoryOfTheSenders, pipe_laws.memory_is_the_callers_again_when_a_send_returns),
    (ReceivesIntoOnePage, pipe_laws.what_was_received_is_the_receivers_own),
    (FlattensScalars, pipe_laws.shape_dtype_and_values_survive),
    (WidensBfloat16, pipe_laws.shape_dtype_and_values_survive),
    (SendsBeforeItLooks, pipe_laws.what_cannot_be_carried_is_refused_before_a_byte_moves),
    (DoesNotSayWhatItCarries, pipe_laws.tensors_on_devices_that_are_not_declared_are_refused),
    (ReceivesIntoWithoutLooking, pipe_laws.a_tensor_can_be_received_into_its_final_memory),
    (LetsTwoReceive, pipe_laws.a_second_receiver_is_busy_and_the_first_goes_on),
    (LetsTwoSend, pipe_laws.a_second_sender_is_busy_and_the_first_goes_on),
    (OneDirectionAtATime, pipe_laws.both_directions_work_at_once),
    (SaysEndOfPipeWhereItsOwnEndCloses, pipe_laws.close_wakes_a_blocked_receiver),
    (SaysBrokenWhereItsOwnEndAborts, pipe_laws.abort_wakes_a_blocked_sender),
    (SendsAfterItsClose, pipe_laws.a_closed_end_says_so),
    (ForgetsWhatItSentIfItHasReadAll, pipe_laws.all_that_was_sent_before_a_close_arrives_then_the_end),
    (ForgetsWhatItSentIfItHasNotReadAll, pipe_laws.a_close_with_messages_unread_loses_none_that_were_sent),
    (AbortsAfterItsSend, pipe_laws.abort_never_blocks_and_ends_the_other_side),
    (SendsOverABrokenWire, pipe_laws.after_a_broken_wire_only_closing_remains),
    (SendsIntoTheVoid, pipe_laws.sends_to_a_closed_peer_fail),
    (DiesOfSilence, pipe_laws.a_silent_peer_is_a_deadline_and_no_harm),
    (HasNoDeadline, pipe_laws.a_peer_that_does_not_receive_is_a_deadline),
    (LeavesAFile, pipe_laws.opening_and_closing_leaves_nothing_behind),
]


class ReadsManyInAscendingOrder(InprocPipe):
    """Sorts what it asks for where that is worth it, and not where it goes."""

    def read_blocks(self, remote, local):
        return super().read_blocks([sorted(ids) if len(ids) > 32 else ids for ids in remote], local)


class WritesScatteredOnesBackwards(InprocPipe):
    def write_blocks(self, local, remote):
        scattered = len(local) == 1 and sorted(local[0]) != [*local[0]]
        return super().write_blocks([[*reversed(local[0])]] if scattered else local, remote)


class KnowsOneGroup(InprocPipe):
    def read_blocks(self, remote, local):
        memory = self._link.memory[self._side]
        known = 1 if memory is not None and memory.layout.num_groups > 1 else len(local)
        return super().read_blocks(remote[:known], local[:known])


class MovesOneTransferAtATime(InprocPipe):
    """A new transfer waits for the one before."""

    last: Transfer | None = None

    def read_blocks(self, remote, local):
        if self.last is not None:
            with contextlib.suppress(errors.KVConnectError):
                self.last.wait(20)
        self.last = super().read_blocks(remote, local)
        return self.last


class SkipsBadIds(InprocPipe):
    def read_blocks(self, remote, local):
        try:
            return super().read_blocks(remote, local)
        except errors.HandshakeError:
            transfer = Transfer(0)
            transfer.finish()
            return transfer


class CancelsTooSoon(InprocPipe):
    """Says that it is done while it goes on writing."""

    def read_blocks(self, remote, local):
        inner = super().read_blocks(remote, local)
        outer = Transfer(inner.nbytes, on_cancel=lambda: outer.finish(errors.LoadError("cancelled")))
        inner.add_done_callback(lambda done: outer.finish(done.error))
        return outer


class ReadsAfterItsClose(InprocPipe):
    kept: PipeSpec | None = None

    def read_blocks(self, remote, local):
        try:
            return super().read_blocks(remote, local)
        except (errors.ClosedError, errors.BrokenError):
            transfer = Transfer(0)
            transfer.finish()
            return transfer


class AttachesAnything(InprocPipe):
    def attach(self, local, remote, channel):
        super().attach(local, local.layout, channel)


class MixesUpWrites(InprocPipe):
    """A write that begins before the last one is over, which is said late, brings what that one was given."""

    last: tuple[Transfer, BlockIds] | None = None

    def write_blocks(self, local, remote):
        if self.last is not None and not self.last[0].done:
            local = self.last[1]
        inner = super().write_blocks(local, remote)
        outer = Transfer(inner.nbytes, inner.cancel)
        inner.add_done_callback(lambda over: threading.Timer(0.05, outer.finish, [over.error]).start())
        self.last = outer, local
        return outer


class HasAThread(InprocPipe):
    """And ends it in order."""

    def __init__(self, spec: PipeSpec) -> None:
        super().__init__(spec)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.over.wait, args=(20,), daemon=True, name="of-one-pipe")
        self.thread.start()

    def _end(self, *, flush: bool) -> None:
        super()._end(flush=flush)
        self.over.set()
        self.thread.join(5)


CAUGHT_BLOCKS: list[tuple[type[Pipe], Law]] = [
    (ReadsManyInAscendingOrder, block_laws.reading_copies_exactly_the_blocks_asked_for),
    (WritesScatteredOnesBackwards, block_laws.writing_copies_exactly_the_blocks_given),
    (KnowsOneGroup, block_laws.groups_have_block_ids_of_their_own),
    (MixesUpWrites, block_laws.many_transfers_run_both_ways_at_once),
    (MovesOneTransferAtATime, block_laws.a_small_transfer_does_not_wait_behind_a_large_one),
    (SkipsBadIds, block_laws.block_ids_out_of_range_fail_that_transfer_only),
    (CancelsTooSoon, block_laws.a_cancelled_transfer_ends_and_the_pipe_goes_on),
    (ReadsAfterItsClose, block_laws.ending_a_pipe_ends_its_transfers),
    (AttachesAnything, block_laws.layouts_of_another_shape_are_refused),
    (HasAThread, many_pipes),
]


@pytest.mark.parametrize(
    ("broken", "law"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1].__name__}") for case in CAUGHT + CAUGHT_BLOCKS],
)
def test_a_law_catches_the_pipe_that_breaks_it(broken: type[Pipe], law: Law, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    # What a pipe breaks by a race shows sooner or later, not every time.
    assert any(catches(law, broken) for _ in range(10))


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have laws wait for less long."""
    monkeypatch.setattr(pipe_laws, "LIMIT_S", 3.0)
    monkeypatch.setattr(pipe_laws, "PROMPT_S", 2.0)
    monkeypatch.setattr(pipe_laws, "SETTLE_S", 0.1)


def catches(law: Law, broken: type[Pipe]) -> bool:
    """Try a law once: it fails by its own assertion, by the pipe's error or by a wait that ran out."""
    pair = open_pair(broken, timeout_s=6.0)
    try:
        law(pair)
    except (AssertionError, errors.KVConnectError, TimeoutError):
        return True
    finally:
        pair.close()
    return False


@pytest.mark.parametrize(
    ("visible", "device", "there", "turned"),
    [(None, "cuda:0", "cuda:2", "2,1,0"), ("5,GPU-1,7", "cuda:2", "cuda:0", "7,GPU-1,5"), ("", "cpu", "cpu", None)],
)
def test_a_peer_process_numbers_cuda_devices_the_other_way_round(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, there: str, turned: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert seen_there(device, renumber=True) == (there, {} if turned is None else {"CUDA_VISIBLE_DEVICES": turned})
    assert seen_there(device, renumber=False) == (device, {})


def test_every_law_has_a_pipe_that_it_catches() -> None:
    assert {law for _, law in CAUGHT} == set(pipe_laws.LAWS)
    assert {law for _, law in CAUGHT_BLOCKS} == {*block_laws.LAWS, many_pipes}
