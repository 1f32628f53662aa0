"""Each law between two processes catches a pipe that breaks it. The other process imports the pipes from here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace

import pytest

from kvconnect.errors import BrokenError, BusyError, DeadlineError, EndOfPipe, KVConnectError
from kvconnect.pipes.base import Pipe, Reach, Traits, Transfer
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.testing import process_laws
from kvconnect.testing.peers import spawn
from kvconnect.testing.processes import ProcessPeer

pytestmark = pytest.mark.slow  # two minutes: each law waits for a process to start, and some for deadlines

Law = Callable[[ProcessPeer], None]


class LosesTheEndOfLargeOnes(TcpPipe):
    def recv_tensor(self):
        got = super().recv_tensor()
        if got is not None and got.nbytes > 32 << 20:
            got[-1] = -1
        return got


class ReadsTheBlocksAfter(TcpPipe):
    def read_blocks(self, remote, local):
        return super().read_blocks([[(number + 1) % 64 for number in ids] for ids in remote], local)


class SaysTooSoonThatItHasWritten(TcpPipe):
    def write_blocks(self, local, remote):
        transfer = Transfer(0)
        transfer.finish()
        return transfer


class IsReadOrReads(TcpPipe):
    """Only the asking end can read."""

    def __init__(self, spec):
        super().__init__(spec)
        self.side = spec.side

    def read_blocks(self, remote, local):
        if self.side == "serves":
            raise BusyError("the other end reads here")
        return super().read_blocks(remote, local)


class WaitsForEver(TcpPipe):
    def __init__(self, spec):
        super().__init__(replace(spec, timeout_s=1e6))


class GoesOnAfterADeadline(WaitsForEver):
    """Delivers in the end a message that stopped in the middle and was given up."""

    receiving = None

    def recv_tensor(self):
        self.receiving = self.receiving or spawn(super().recv_tensor)
        if not wait([self.receiving], 1.0).done:
            raise DeadlineError("nothing came for a second")
        received, self.receiving = self.receiving, None
        return received.result()


class IsSlowToBegin(TcpPipe):
    """Breaks no law."""

    def send_tensor(self, tensor):
        if tensor is not None and tensor.nbytes > 32 << 20:
            threading.Event().wait(0.6)
        super().send_tensor(tensor)


class TakesDeathForTheEnd(TcpPipe):
    def recv_tensor(self):
        try:
            return super().recv_tensor()
        except BrokenError as error:
            raise EndOfPipe("gone") from error


class SendsToTheDead(TcpPipe):
    def send_tensor(self, tensor):
        try:
            super().send_tensor(tensor)
        except BrokenError:
            return


class SaysNothingOfFailures(TcpPipe):
    """Transfers that fail never end."""

    def read_blocks(self, remote, local):
        inner = super().read_blocks(remote, local)
        outer = Transfer(inner.nbytes, inner.cancel)
        inner.add_done_callback(lambda done: None if done.error else outer.finish())
        return outer


class LeavesFiles(TcpPipe):
    def __init__(self, spec):
        super().__init__(spec)
        self.left = os.pipe()


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


CAUGHT: list[tuple[type[Pipe], Law]] = [
    (LosesTheEndOfLargeOnes, process_laws.tensors_survive_the_way_to_another_process_and_back),
    (ReadsTheBlocksAfter, process_laws.blocks_are_read_from_another_process),
    (SaysTooSoonThatItHasWritten, process_laws.blocks_are_written_to_another_process),
    (IsReadOrReads, process_laws.both_processes_read_at_once),
    (WaitsForEver, process_laws.a_receive_that_stops_in_the_middle_ends_at_its_deadline),
    (GoesOnAfterADeadline, process_laws.a_receive_that_stops_in_the_middle_ends_at_its_deadline),
    (WaitsForEver, process_laws.a_send_to_a_frozen_peer_ends_at_its_deadline),
    (TakesDeathForTheEnd, process_laws.a_killed_peer_breaks_a_blocked_receive),
    (SendsToTheDead, process_laws.a_killed_peer_breaks_a_blocked_send),
    (SaysNothingOfFailures, process_laws.a_killed_peer_ends_block_transfers_with_an_error),
    (LeavesFiles, process_laws.a_killed_peer_leaves_nothing_behind),
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
    peer = ProcessPeer(broken, {})
    try:
        monkeypatch.setattr(process_laws, "LIMIT_S", 8.0)
        monkeypatch.setattr(process_laws, "PROMPT_S", 2.0)
        with pytest.raises((AssertionError, KVConnectError, TimeoutError)):
            law(peer)
    finally:
        peer.close()


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
    traits = {
        process_laws.reads_are_one_sided_exactly_if_declared,
        process_laws.starts_of_transfers_are_immediate_if_declared,
        process_laws.a_pipe_of_one_process_does_not_leave_it,
    }
    assert {law for _, law in CAUGHT} == {*process_laws.LAWS} | traits
