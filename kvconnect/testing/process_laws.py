"""The clauses that show only between two processes, each a plain function over a `ProcessPeer`.

A law may kill the process; whoever runs the laws starts another one then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait

import torch

from kvconnect.errors import BrokenError, DeadlineError, KVConnectError
from kvconnect.pipes.base import Transfer
from kvconnect.testing.block_laws import CUT_BYTES
from kvconnect.testing.ends import End, checksum
from kvconnect.testing.layouts import (
    clone,
    differences,
    naive_copy,
    naive_stream,
    noisy_memory,
    random_ids,
    separate_layers,
    shared_region,
)
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from kvconnect.testing.peers import LIMIT_S, spawn
from kvconnect.testing.pipe_laws import MANY, PROMPT_S
from kvconnect.testing.processes import ProcessPeer
from kvconnect.testing.samples import fidelity_samples, same

_BIG = 64 << 20
_SETTLE_S = 0.3
_SHORT_S = 1.5
_BLOCK = 1 << 16


def tensors_survive_the_way_to_another_process_and_back(peer: ProcessPeer) -> None:
    """Clauses 1 and 3."""
    end = peer.open()
    sent = [*fidelity_samples(end.device), None, torch.arange(_BIG // 8, device=end.device)]
    echo = end.tell("echo", count=len(sent))
    for tensor in sent:
        spawn(lambda tensor=tensor: end.pipe.send_tensor(tensor)).result(LIMIT_S)  # type: ignore[misc]
        got = spawn(end.pipe.recv_tensor).result(LIMIT_S)
        same(tensor, got)
    echo.result(LIMIT_S)
    end.pipe.abort()


def a_killed_peer_breaks_a_blocked_receive(peer: ProcessPeer) -> None:
    """Clause 6: `BrokenError`, not the orderly `EndOfPipe`."""
    end = peer.open()
    _warm(end)
    receiving = spawn(end.pipe.recv_tensor)
    threading.Event().wait(_SETTLE_S)
    peer.kill()
    error = receiving.exception(LIMIT_S)
    assert isinstance(error, BrokenError), f"got {error!r}"
    end.pipe.abort()


def a_killed_peer_breaks_a_blocked_send(peer: ProcessPeer) -> None:
    """Clause 6."""
    end = peer.open(timeout_s=LIMIT_S)
    _warm(end)
    sending = spawn(lambda: _send_until_error(end))
    threading.Event().wait(_SETTLE_S)
    peer.kill()
    error = sending.result(LIMIT_S)
    assert isinstance(error, BrokenError), f"got {error!r}"
    end.pipe.abort()


def a_receive_that_stops_in_the_middle_ends_at_its_deadline(peer: ProcessPeer) -> None:
    """Clauses 6 and 7: either the whole message came, or `DeadlineError` and a dead pipe.

    A peer that is slow to begin was frozen before the first byte: no harm done, and another attempt waits longer.
    """
    too_late = (_comes_after_its_deadline(peer, settle_s) for settle_s in (_SETTLE_S, 4 * _SETTLE_S, 16 * _SETTLE_S))
    assert not all(too_late), "a message went on after the deadline that it had stopped at"


def a_send_to_a_frozen_peer_ends_at_its_deadline(peer: ProcessPeer) -> None:
    """Clauses 6 and 7."""
    end = peer.open(timeout_s=1.0)
    _warm(end)
    peer.freeze()
    error = spawn(lambda: _send_until_error(end)).result(LIMIT_S)
    assert isinstance(error, (DeadlineError, BrokenError)), f"got {error!r}"
    began = spawn(end.pipe.abort)
    assert began.exception(5.0) is None, "abort waits for a frozen peer"
    peer.thaw()


def blocks_are_read_from_another_process(peer: ProcessPeer) -> None:
    """Random ids, other strides on each side, compared with a naive copy."""
    end = peer.open()
    mine = noisy_memory(separate_layers(4, 64, 3, 3000), 1, end.device)
    theirs = end.attach(mine, shared_region(4, 64, 3, 3000), 2)
    for seed, count in enumerate((1, 7, 60)):
        remote, local = random_ids(seed, 64, [count]), random_ids(seed + 5, 64, [count])
        wanted = clone(mine)
        naive_copy(wanted, local, theirs, remote)
        end.pipe.read_blocks(remote, local).wait(LIMIT_S)
        assert not differences(mine, wanted)
    end.pipe.abort()


def blocks_are_written_to_another_process(peer: ProcessPeer) -> None:
    """Done means that they are there."""
    end = peer.open()
    mine = noisy_memory(separate_layers(4, 64, 3, 3000), 1, end.device)
    end.attach(mine, shared_region(4, 64, 3, 3000), 2)
    for seed, count in enumerate((1, 7, 60)):
        local, remote = random_ids(seed, 64, [count]), random_ids(seed + 5, 64, [count])
        end.pipe.write_blocks(local, remote).wait(LIMIT_S)
        got = end.tell("stream", blocks=remote).result(LIMIT_S)
        assert got["crc"] == checksum(naive_stream(mine, local))
    end.pipe.abort()


def both_processes_read_at_once(peer: ProcessPeer) -> None:
    """Each end reads from the other while being read from."""
    end = peer.open()
    count = (16 << 20) // _BLOCK
    layout = separate_layers(1, count, 1, _BLOCK)
    mine = noisy_memory(layout, 1, end.device)
    theirs = end.attach(mine, layout, 2)
    low, high = [list(range(count // 2))], [list(range(count // 2, count))]
    kept = checksum(naive_stream(mine, low))
    reading = end.tell("read", remote=low, local=low)
    end.pipe.read_blocks(high, high).wait(LIMIT_S)
    reading.result(LIMIT_S)
    assert end.tell("stream", blocks=low).result(LIMIT_S)["crc"] == kept
    assert naive_stream(mine, high).equal(naive_stream(theirs, high))
    end.pipe.abort()


def a_killed_peer_ends_block_transfers_with_an_error(peer: ProcessPeer) -> None:
    """All that run end, and new ones fail; none hangs."""
    end = peer.open(timeout_s=2.0)
    count = (64 << 20) // _BLOCK
    layout = separate_layers(1, count, 1, _BLOCK)
    mine = noisy_memory(layout, 1, end.device)
    end.attach(mine, layout, 2)
    everything = [list(range(count))]
    transfers = [end.pipe.read_blocks(everything, everything), end.pipe.write_blocks([[1]], [[2]])]
    peer.kill()
    for transfer in transfers:
        _ended(transfer)
    try:
        error: KVConnectError | None = _ended(end.pipe.read_blocks([[0]], [[0]]))
    except KVConnectError as raised:
        error = raised
    assert error is not None, "blocks were read from a process that is gone"
    end.pipe.abort()


def a_killed_peer_leaves_nothing_behind(peer: ProcessPeer) -> None:
    """No open file here, and no file in ``/dev/shm``."""
    _warm_up_and_end(peer)
    before = Holdings.now()
    end = peer.open()
    _warm(end)
    end.tell("send", count=3, nbytes=_BIG)
    threading.Event().wait(_SETTLE_S)
    peer.kill()
    end.pipe.abort()
    assert_nothing_left(before)


# -- what traits say ------------------------------------------------------------


def a_pipe_of_one_process_does_not_leave_it(peer: ProcessPeer) -> None:
    """`Traits.reach` is `Reach.PROCESS`: what reaches another process has to say so, lest its laws are skipped."""

    def try_it() -> None:
        end = peer.open(timeout_s=_SHORT_S)
        try:
            end.tell("echo", count=1)
            end.pipe.send_tensor(torch.ones(1, device=end.device))
            end.pipe.recv_tensor()
        finally:
            end.pipe.abort()

    error = spawn(try_it).exception(LIMIT_S)
    assert error is not None, "traits.reach is Reach.PROCESS, and a message came back from another process"


def reads_are_one_sided_exactly_if_declared(peer: ProcessPeer, *, declared: bool | None = None) -> None:
    """`Traits.one_sided`: blocks are read while no thread of the other process runs; without it they are not.

    ``declared`` is what holds with the peer's options, where that is not what the class says; a class that
    leaves it open keeps the law either way.
    """
    declared = peer.pipe_class.traits.one_sided if declared is None else declared
    if declared is None:
        return
    end = peer.open()
    layout = separate_layers(2, 16, 2, 3000)
    mine = noisy_memory(layout, 1, end.device)
    theirs = end.attach(mine, layout, 2)
    end.pipe.read_blocks([[0]], [[0]]).wait(LIMIT_S)
    peer.freeze()
    try:
        transfer = end.pipe.read_blocks([range(1, 16)], [range(1, 16)])
        if not declared:
            threading.Event().wait(_SHORT_S)
            arrived = transfer.done and transfer.error is None
            assert not arrived, "blocks of a frozen process were read, and traits.one_sided is not declared"
            return
        transfer.wait(LIMIT_S)
        assert naive_stream(mine, [range(1, 16)]).equal(naive_stream(theirs, [range(1, 16)]))
    finally:
        peer.thaw()
        end.pipe.abort()


def starts_of_transfers_are_immediate_if_declared(peer: ProcessPeer) -> None:
    """`Traits.immediate`: starts return at once while the other process stands still, the very first ones, too.

    And they leave the copying to others: a large transfer is not over when its start returns (counted by the
    best of a few attempts, since on a busy machine whoever starts one may be held up until it is).
    """
    if not peer.pipe_class.traits.immediate:
        return
    end = peer.open()
    layout = separate_layers(1, CUT_BYTES[torch.device(end.device).type] // _BLOCK, 1, _BLOCK)
    end.attach(noisy_memory(layout, 1, end.device), layout, 2)
    everything = [range(layout.layers[0].num_blocks)]
    running = {end.pipe.read_blocks: False, end.pipe.write_blocks: False}

    def start() -> list[Transfer]:
        started = []
        for move in running:
            started.append(move(everything, everything))
            running[move] |= not started[-1].done
        return started

    for _ in range(5):
        peer.freeze()
        starting = spawn(start)
        wait([starting], PROMPT_S)
        returned = starting.done()
        peer.thaw()
        assert returned, "traits.immediate is declared, and a start waits for the other process"
        for transfer in starting.result():
            _ended(transfer)
    end.pipe.abort()
    assert all(running.values()), "traits.immediate is declared, and a transfer is over before its start returns"


#: Every law between two processes; those that kill come last.
LAWS: tuple[Callable[[ProcessPeer], None], ...] = (
    tensors_survive_the_way_to_another_process_and_back,
    blocks_are_read_from_another_process,
    blocks_are_written_to_another_process,
    both_processes_read_at_once,
    a_receive_that_stops_in_the_middle_ends_at_its_deadline,
    a_send_to_a_frozen_peer_ends_at_its_deadline,
    a_killed_peer_breaks_a_blocked_receive,
    a_killed_peer_breaks_a_blocked_send,
    a_killed_peer_ends_block_transfers_with_an_error,
    a_killed_peer_leaves_nothing_behind,
)


# -- what laws are made of ------------------------------------------------------


def _warm(end: End) -> None:
    """Send one message there and back, so that both ends are joined for certain."""
    echo = end.tell("echo", count=1)
    spawn(lambda: end.pipe.send_tensor(torch.ones(1, device=end.device))).result(LIMIT_S)
    assert spawn(end.pipe.recv_tensor).result(LIMIT_S) is not None
    echo.result(LIMIT_S)


def _comes_after_its_deadline(peer: ProcessPeer, settle_s: float) -> bool:
    """Freeze the peer while it sends, until a receive fails; return whether the message came when it went on."""
    end = peer.open(timeout_s=1.0)
    _warm(end)
    end.tell("send", count=1, nbytes=_BIG)
    threading.Event().wait(settle_s)  # the sender waits for us, with part of the message on its way
    peer.freeze()
    for failures in range(3):
        receiving = spawn(end.pipe.recv_tensor)
        error = receiving.exception(LIMIT_S)
        peer.thaw()
        if error is None:  # the first time: the message did not need its sender any more
            got = receiving.result()
            assert got is not None
            assert got.nbytes == _BIG
            assert not got.any()
            end.pipe.abort()
            return failures > 0
        assert isinstance(error, (DeadlineError, BrokenError)), f"got {error!r}"
    end.pipe.abort()
    return False


def _warm_up_and_end(peer: ProcessPeer) -> None:
    end = peer.open()
    _warm(end)
    end.tell("close").result(LIMIT_S)
    end.pipe.close()


def _send_until_error(end: End) -> Exception | None:
    tensor = torch.zeros(4 << 20, dtype=torch.uint8, device=end.device)
    for _ in range(MANY):
        try:
            end.pipe.send_tensor(tensor)
        except KVConnectError as error:
            return error
    return None


def _ended(transfer: Transfer) -> KVConnectError | None:
    over = threading.Event()
    transfer.add_done_callback(lambda _: over.set())
    assert over.wait(LIMIT_S), "the transfer never ended"
    return transfer.error
