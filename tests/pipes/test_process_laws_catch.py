"""Each law between two processes catches a pipe that breaks it. The other process imports the pipes from here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from functools import partial

import pytest
import torch

from kvconnect.errors import BrokenError, BusyError, DeadlineError, EndOfPipe, KVConnectError
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.base import Pipe, Reach, Traits, Transfer
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.testing import process_laws
from kvconnect.testing.peers import spawn
from kvconnect.testing.processes import ProcessPeer

pytestmark = pytest.mark.slow  # two minutes: each law waits for a process to start, and some for deadlines

Law = Callable[[ProcessPeer], None]


class FarPipe(TcpPipe):
    """Knows whether its other end is in another process: what is broken below is broken only then."""

    def __init__(self, spec):
        self.asks, self.closed, self.late = spec.side == "asks", False, False

        def exchange(mine):
            theirs = spec.exchange({**mine, "pid": os.getpid()})
            self.far = theirs["pid"] != os.getpid()
            return theirs

        super().__init__(replace(spec, exchange=exchange))


class LosesTheEndOfLargeOnes(FarPipe):
    def recv_tensor(self):
        got = super().recv_tensor()
        if self.far and got is not None and got.dtype is torch.int64 and got.nbytes > 32 << 20:
            got[-1] = -1
        return got


class ReadsManyInAscendingOrder(FarPipe):
    def read_blocks(self, remote, local):
        many = self.far and len(remote[0]) > 32
        return super().read_blocks([sorted(ids) for ids in remote] if many else remote, local)


class SaysTooSoonThatItHasWritten(FarPipe):
    def write_blocks(self, local, remote):
        if not self.far:
            return super().write_blocks(local, remote)
        transfer = Transfer(0)
        transfer.finish()
        return transfer


class IsReadOrReads(FarPipe):
    """Only the asking end can read."""

    def read_blocks(self, remote, local):
        if self.far and not self.asks:
            raise BusyError("the other end reads here")
        return super().read_blocks(remote, local)


class WaitsForEver(TcpPipe):
    def __init__(self, spec):
        super().__init__(replace(spec, timeout_s=1e6))


class GoesOnAfterADeadline(FarPipe):
    """Delivers in the end a message that stopped in the middle and was given up."""

    receiving = None

    def __init__(self, spec):
        self.patience_s, self.alone = spec.timeout_s, Alone("receive")
        super().__init__(replace(spec, timeout_s=20.0))

    def recv_tensor(self):
        with self.alone:
            self.receiving = self.receiving or spawn(super().recv_tensor)
            if not wait([self.receiving], self.patience_s).done:
                raise DeadlineError("nothing came")
            received, self.receiving = self.receiving, None
            return received.result()

    def send_tensor(self, tensor):
        sending = spawn(partial(super().send_tensor, tensor))
        if not wait([sending], self.patience_s if self.asks else None).done:
            self.late = True
            super().abort()
            raise DeadlineError("nobody receives")
        if self.late:
            raise BrokenError("nobody received")
        sending.result()


class AbortsWithItsPeer(FarPipe):
    """Takes its time where a send stopped."""

    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except DeadlineError:
            self.late = True
            raise

    def abort(self):
        if self.late and self.far:
            threading.Event().wait(6)
        super().abort()


class IsSlowToBegin(TcpPipe):
    """Breaks no law."""

    def send_tensor(self, tensor):
        if tensor is not None and tensor.nbytes > 32 << 20:
            threading.Event().wait(0.6)
        super().send_tensor(tensor)


class TakesDeathForTheEnd(FarPipe):
    def recv_tensor(self):
        try:
            return super().recv_tensor()
        except DeadlineError:
            self.late = True
            raise
        except BrokenError as error:
            if self.late or not self.far:
                raise
            raise EndOfPipe("gone") from error


class SendsToTheDead(FarPipe):
    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except BrokenError:
            if not self.far:
                raise


class SaysNothingOfFailures(FarPipe):
    """Transfers that fail never end."""

    def read_blocks(self, remote, local):
        inner = super().read_blocks(remote, local)
        outer = Transfer(inner.nbytes, inner.cancel)
        inner.add_done_callback(lambda done: None if done.error and self.far else outer.finish(done.error))
        return outer


class LeavesFilesIfAborted(FarPipe):
    def close(self):
        self.closed = True
        super().close()

    def abort(self):
        self.left = None if self.closed else os.pipe()
        super().abort()


class SaysThatItIsOneSided(TcpPipe):
    traits = Traits(one_sided=True)


class DoesNotSayThatItIsOneSided(ShmPipe):
    traits = Traits(reach=Reach.HOST)


class Waits:
    def read_blocks(self, remote, local):
        transfer = super().read_blocks(remote, local)
        wait([spawn(transfer.wait)], 10)
        return transfer


class WaitsForItsPeer(Waits, TcpPipe):
    traits = Traits(immediate=True)


class CopiesBeforeItReturns(Waits, ShmPipe):
    traits = Traits(reach=Reach.HOST, one_sided=True, immediate=True)


class OnlyEnqueues(ShmPipe):
    """Breaks no law."""

    traits = Traits(reach=Reach.HOST, one_sided=True, immediate=True)


class DoesNotSayHowFarItReaches(TcpPipe):
    traits = Traits(reach=Reach.PROCESS)


#: Hold of every pipe that reaches another process.
OF_TRAITS = (
    process_laws.reads_are_one_sided_exactly_if_declared,
    process_laws.starts_of_transfers_are_immediate_if_declared,
)
CAUGHT: list[tuple[type[Pipe], Law]] = [
    (LosesTheEndOfLargeOnes, process_laws.tensors_survive_the_way_to_another_process_and_back),
    (ReadsManyInAscendingOrder, process_laws.blocks_are_read_from_another_process),
    (SaysTooSoonThatItHasWritten, process_laws.blocks_are_written_to_another_process),
    (IsReadOrReads, process_laws.both_processes_read_at_once),
    (WaitsForEver, process_laws.a_receive_that_stops_in_the_middle_ends_at_its_deadline),
    (GoesOnAfterADeadline, process_laws.a_receive_that_stops_in_the_middle_ends_at_its_deadline),
    (AbortsWithItsPeer, process_laws.a_send_to_a_frozen_peer_ends_at_its_deadline),
    (TakesDeathForTheEnd, process_laws.a_killed_peer_breaks_a_blocked_receive),
    (SendsToTheDead, process_laws.a_killed_peer_breaks_a_blocked_send),
    (SaysNothingOfFailures, process_laws.a_killed_peer_ends_block_transfers_with_an_error),
    (LeavesFilesIfAborted, process_laws.a_killed_peer_leaves_nothing_behind),
    (SaysThatItIsOneSided, process_laws.reads_are_one_sided_exactly_if_declared),
    (DoesNotSayThatItIsOneSided, process_laws.reads_are_one_sided_exactly_if_declared),
    (WaitsForItsPeer, process_laws.starts_of_transfers_are_immediate_if_declared),
    (CopiesBeforeItReturns, process_laws.starts_of_transfers_are_immediate_if_declared),
    (DoesNotSayHowFarItReaches, process_laws.a_pipe_of_one_process_does_not_leave_it),
]


@pytest.mark.parametrize(
    ("broken", "law"), [pytest.param(*case, id=f"{case[0].__name__}-{case[1].__name__}") for case in CAUGHT]
)
def test_a_law_catches_the_pipe_that_breaks_it(broken: type[Pipe], law: Law, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    assert catches(law, broken)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have laws wait for less long."""
    monkeypatch.setattr(process_laws, "LIMIT_S", 8.0)
    monkeypatch.setattr(process_laws, "PROMPT_S", 2.0)


def catches(law: Law, broken: type[Pipe]) -> bool:
    """Try a law once."""
    peer = ProcessPeer(broken, {})
    try:
        law(peer)
    except (AssertionError, KVConnectError, TimeoutError):
        return True
    finally:
        peer.close()
    return False


def test_a_peer_that_is_frozen_before_its_first_byte_is_given_longer() -> None:
    peer = ProcessPeer(IsSlowToBegin, {})
    try:
        process_laws.a_receive_that_stops_in_the_middle_ends_at_its_deadline(peer)
    finally:
        peer.close()


def test_a_pipe_that_only_enqueues_is_immediate() -> None:
    peer = ProcessPeer(OnlyEnqueues, {})
    try:
        process_laws.starts_of_transfers_are_immediate_if_declared(peer)
    finally:
        peer.close()


def test_a_pipe_that_another_process_cannot_import_is_told_so() -> None:
    class Local(TcpPipe):
        pass

    with pytest.raises(BrokenError, match=r"has to be able to import tests\.pipes\..*<locals>\.Local"):
        ProcessPeer(Local)


def test_every_law_between_processes_has_a_pipe_that_it_catches() -> None:
    assert {law for _, law in CAUGHT} == {
        *process_laws.LAWS,
        *OF_TRAITS,
        process_laws.a_pipe_of_one_process_does_not_leave_it,
    }
