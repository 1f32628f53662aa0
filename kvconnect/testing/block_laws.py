"""The clauses of the block path, each a plain function over an opened `PipePair`.

A law raises `AssertionError` when the pipe breaks it. Both ends hold memories of the
same shape and of different strides; what arrives is compared with a naive copy,
including the bytes that had to stay as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from kvconnect.errors import HandshakeError, KVConnectError
from kvconnect.paging import BlockIds, PagedLayout, PagedMemory
from kvconnect.pipes.base import Pipe, Transfer
from kvconnect.testing.devices import complete, fitting
from kvconnect.testing.layouts import (
    clone,
    differences,
    naive_copy,
    naive_stream,
    noisy_memory,
    random_ids,
    regions,
    separate_layers,
    shared_region,
)
from kvconnect.testing.peers import LIMIT_S, PipePair, open_pair

#: A transfer that another one must not wait for, in bytes: long enough on its device. Within one GPU
#: a gibibyte may be there before anybody asks for more; pipes between hosts need long for four.
LARGE_BYTES = {"cpu": (128 << 20,), "cuda": (1 << 30, 4 << 30)}
LARGE_BLOCKS = 2048
#: One that is cut short.
CUT_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}
#: What may move of it while a small transfer comes and goes. Requests take milliseconds on a
#: busy machine, in which gigabytes a second go on; a transfer that waits its turn sees all of it move.
LARGE_SHARE = 0.5
#: Long enough for bytes under way to show up.
SETTLE_S = 0.2
_SMALL_BYTES = 2 << 20
_BLOCK = 1 << 16


@dataclass
class Attached:
    """A pair whose ends are attached to memories of their own."""

    here: Pipe
    there: Pipe
    mine: PagedMemory
    theirs: PagedMemory


def attach(pair: PipePair, mine: PagedMemory, theirs: PagedMemory) -> Attached:
    """Attach both ends of ``pair``."""
    pair.there.attach(theirs, mine.layout, pair.channels[1])
    pair.here.attach(mine, theirs.layout, pair.channels[0])
    return Attached(pair.here, pair.there, mine, theirs)


def reading_copies_exactly_the_blocks_asked_for(pair: PipePair) -> None:
    """Random ids, other strides on each side; bytes around the blocks stay as they are."""
    ends = _noisy(pair)
    for seed, counts in enumerate(([0], [1], [3], [40])):
        _verify(ends, "read", [*random_ids(seed, 64, counts)], [*random_ids(seed + 9, 64, counts)])


def writing_copies_exactly_the_blocks_given(pair: PipePair) -> None:
    """The same for `write_blocks`; done means that the other end's memory has them."""
    ends = _noisy(pair)
    for seed, counts in enumerate(([0], [1], [3], [40])):
        _verify(ends, "write", [*random_ids(seed, 64, counts)], [*random_ids(seed + 9, 64, counts)])


def groups_have_block_ids_of_their_own(pair: PipePair) -> None:
    """Two groups of layers, with other ids and other counts each; trailing empty groups may be left out."""
    ends = _noisy(pair, groups=2)
    _verify(ends, "read", random_ids(1, 64, [5, 9]), random_ids(2, 64, [5, 9]))
    _verify(ends, "write", random_ids(3, 64, [0, 7]), random_ids(4, 64, [0, 7]))
    _verify(ends, "read", [[3, 1]], [[4, 2], []])


def many_transfers_run_both_ways_at_once(pair: PipePair) -> None:
    """Eight transfers of several chunks, from both ends, over disjoint blocks."""
    ends = _noisy(pair, blocks=128, piece=8 << 10)
    wanted_mine, wanted_theirs = clone(ends.mine), clone(ends.theirs)
    running: list[Transfer] = []
    for i in range(4):
        left, right = [list(range(i * 32, i * 32 + 16))], [list(range(i * 32 + 16, i * 32 + 32))]
        naive_copy(wanted_mine, left, ends.theirs, left)
        naive_copy(wanted_theirs, right, ends.mine, right)
        if i % 2:
            running += [ends.here.read_blocks(left, left), ends.there.read_blocks(right, right)]
        else:
            running += [ends.there.write_blocks(left, left), ends.here.write_blocks(right, right)]
    for transfer in running:
        transfer.wait(LIMIT_S)
    _equal(ends.mine, wanted_mine)
    _equal(ends.theirs, wanted_theirs)


def a_small_transfer_does_not_wait_behind_a_large_one(pair: PipePair) -> None:
    """Counted in bytes: most of the large one is still to come when the small one is done.

    The best of a few attempts counts, since the request itself may be held up on a
    busy machine; behind a pipe that serves one after the other no attempt is good.
    """
    share = 1.0
    for nbytes in LARGE_BYTES[torch.device(pair.device).type]:
        block = _sized(pair, nbytes) // LARGE_BLOCKS
        small = max(1, _SMALL_BYTES // block)
        ends = _attached(pair.another(), separate_layers(1, LARGE_BLOCKS + small, 1, block))
        for _ in range(3):
            share = min(share, _moved_meanwhile(ends, block) / LARGE_BLOCKS)
            if share <= LARGE_SHARE:
                return
    raise AssertionError(f"{share:.0%} of the large transfer moved before the small one was done")


def block_ids_out_of_range_fail_that_transfer_only(pair: PipePair) -> None:
    """`HandshakeError` for ids that are not there or do not pair up; others go on."""
    ends = _noisy(pair)
    bad = (([[64]], [[0]]), ([[0]], [[64]]), ([[-1]], [[0]]), ([[0, 1]], [[0]]), ([[0], [0]], [[0], [0]]))
    for remote, local in bad:
        running = ends.here.read_blocks([[5]], [[6]])
        for start, ids in ((ends.here.read_blocks, (remote, local)), (ends.here.write_blocks, (local, remote))):
            error = _outcome(partial(start, *ids))
            assert isinstance(error, HandshakeError), f"remote {remote}, local {local}: got {error!r}"
        running.wait(LIMIT_S)
    _verify(ends, "read", [[1, 2]], [[3, 4]])


def a_cancelled_transfer_ends_and_the_pipe_goes_on(pair: PipePair) -> None:
    """Once done, its blocks are never touched again; later transfers arrive whole."""
    for kind in ("read", "write"):
        ends = _large(pair.another())
        count = ends.mine.layout.layers[0].num_blocks
        everything = [range(count)]
        move = ends.here.read_blocks if kind == "read" else ends.here.write_blocks
        transfer = move(everything, everything)
        transfer.cancel()
        _ended(transfer)
        target, source = (ends.mine, ends.theirs) if kind == "read" else (ends.theirs, ends.mine)
        # What would be written last is what a transfer that only says it is over still writes.
        last = regions(target)[0][-4 * _BLOCK :]
        last.zero_()
        complete(target.device)
        move([[0, 1]], [[2, 3]]).wait(LIMIT_S)
        assert naive_stream(target, [[2, 3]]).equal(naive_stream(source, [[0, 1]]))
        threading.Event().wait(SETTLE_S)
        assert not last.any(), f"blocks were written after the cancelled {kind} was done"


def ending_a_pipe_ends_its_transfers(pair: PipePair) -> None:
    """Close or abort, at either end: transfers end, whole or with an error, and new ones are refused."""
    for end_pipe in ("close", "abort"):
        for side in ("here", "there"):
            each = pair.another()
            ends = _large(each)
            everything = [range(ends.mine.layout.layers[0].num_blocks)]
            transfers = [ends.here.read_blocks(everything, everything), ends.here.write_blocks([[1]], [[2]])]
            getattr(getattr(each, side), end_pipe)()
            for transfer in transfers:
                _ended(transfer)
            later = _outcome(partial(ends.here.read_blocks, [[0]], [[0]]))
            assert isinstance(later, KVConnectError), f"a read after {side}.{end_pipe}(): got {later!r}"


def layouts_of_another_shape_are_refused(pair: PipePair) -> None:
    """`HandshakeError` when attaching, or for the first transfer; nothing is written."""
    mine = noisy_memory(separate_layers(2, 8, 2, 64), 1, pair.device)
    theirs = noisy_memory(separate_layers(2, 8, 2, 128), 2, pair.peer_device)
    unchanged = clone(mine)

    def use() -> Transfer:
        return attach(pair, mine, theirs).here.read_blocks([[0]], [[0]])

    error = _outcome(use)
    assert isinstance(error, HandshakeError), f"got {error!r}"
    _equal(mine, unchanged)


def many_pipes_are_served_by_a_fixed_set_of_threads(
    pipe_class: type[Pipe],
    options: Mapping[str, object] | None = None,
    pipes: int = 1000,
    device: str = "cpu",
    peer_device: str | None = None,
) -> None:
    """Opens ``pipes`` pairs, moves blocks over each and over all at once; threads do not grow with their number."""
    layout = separate_layers(2, 4, 1, 256)
    source, target = noisy_memory(layout, 1, peer_device or device), noisy_memory(layout, 2, device)
    pairs: list[PipePair] = []
    try:
        warm = 8
        pairs.extend(_served(pipe_class, options, target, source) for _ in range(warm))
        few = set(threading.enumerate())
        pairs.extend(_served(pipe_class, options, target, source) for _ in range(pipes - warm))
        transfers = [pair.here.read_blocks([[0, 1]], [[2, 3]]) for pair in pairs]
        for transfer in transfers:
            transfer.wait(LIMIT_S)
        many = _settled_threads(len(few))
        more = sorted(thread.name for thread in set(threading.enumerate()) - few)
        assert many <= len(few), f"{len(few)} threads for {warm} pipes, {many} for {pipes}; new ones: {more}"
        assert naive_stream(target, [[2, 3]]).equal(naive_stream(source, [[0, 1]]))
    finally:
        for pair in pairs:
            pair.close()


#: Every law of the block path over one pair.
LAWS: tuple[Callable[[PipePair], None], ...] = (
    reading_copies_exactly_the_blocks_asked_for,
    writing_copies_exactly_the_blocks_given,
    groups_have_block_ids_of_their_own,
    many_transfers_run_both_ways_at_once,
    a_small_transfer_does_not_wait_behind_a_large_one,
    block_ids_out_of_range_fail_that_transfer_only,
    a_cancelled_transfer_ends_and_the_pipe_goes_on,
    ending_a_pipe_ends_its_transfers,
    layouts_of_another_shape_are_refused,
)


# -- what laws are made of ------------------------------------------------------


def _moved_meanwhile(ends: Attached, block: int) -> int:
    """Return how many blocks of a large transfer moved between the start and the end of a small one."""
    memory, everything = regions(ends.mine)[0], range(ends.mine.layout.layers[0].num_blocks)
    memory.zero_()
    complete(ends.mine.device)
    firsts = memory[::block][:LARGE_BLOCKS]
    moved, over = [0, 0], threading.Event()
    large = ends.here.read_blocks([everything[:LARGE_BLOCKS]], [everything[:LARGE_BLOCKS]])

    def note(_: Transfer) -> None:
        moved[1] = int((firsts != 0).sum())
        over.set()

    moved[0] = int((firsts != 0).sum())
    rest = [everything[LARGE_BLOCKS:]]
    ends.here.read_blocks(rest, rest).add_done_callback(note)
    assert over.wait(LIMIT_S), "the small transfer never ended"
    large.wait(LIMIT_S)
    _equal(ends.mine, ends.theirs)
    return moved[1] - moved[0]


def _noisy(pair: PipePair, groups: int = 1, blocks: int = 64, piece: int = 1000) -> Attached:
    mine = noisy_memory(separate_layers(4, blocks, 3, piece, groups), 1, pair.device)
    theirs = noisy_memory(shared_region(4, blocks, 3, piece, groups), 2, pair.peer_device)
    return attach(pair, mine, theirs)


def _large(pair: PipePair) -> Attached:
    nbytes = CUT_BYTES[torch.device(pair.device).type]
    return _attached(pair, separate_layers(1, _sized(pair, nbytes) // _BLOCK, 1, _BLOCK))


def _attached(pair: PipePair, layout: PagedLayout) -> Attached:
    return attach(pair, noisy_memory(layout, 1, pair.device), noisy_memory(layout, 2, pair.peer_device))


def _sized(pair: PipePair, nbytes: int) -> int:
    """Return ``nbytes``, or fewer where these devices have no room for as many."""
    return min(fitting(device, nbytes) for device in (pair.device, pair.peer_device))


def _verify(ends: Attached, kind: str, remote: BlockIds, local: BlockIds) -> None:
    wanted_mine, wanted_theirs = clone(ends.mine), clone(ends.theirs)
    if kind == "read":
        naive_copy(wanted_mine, local, ends.theirs, remote)
        transfer = ends.here.read_blocks(remote, local)
    else:
        naive_copy(wanted_theirs, remote, ends.mine, local)
        transfer = ends.here.write_blocks(local, remote)
    assert transfer.nbytes == ends.mine.layout.nbytes(local)
    transfer.wait(LIMIT_S)
    _equal(ends.mine, wanted_mine)
    _equal(ends.theirs, wanted_theirs)


def _equal(got: PagedMemory, wanted: PagedMemory) -> None:
    found = differences(got, wanted)
    assert not found, f"not as a naive copy: {'; '.join(found)}"


def _outcome(start: Callable[[], Transfer]) -> BaseException | None:
    """Return the error of a transfer, raised at once or later; ``None`` if it worked."""
    try:
        return _ended(start())
    except KVConnectError as error:
        return error


def _ended(transfer: Transfer) -> KVConnectError | None:
    over = threading.Event()
    transfer.add_done_callback(lambda _: over.set())
    assert over.wait(LIMIT_S), "the transfer never ended"
    return transfer.error


def _served(
    pipe_class: type[Pipe], options: Mapping[str, object] | None, target: PagedMemory, source: PagedMemory
) -> PipePair:
    pair = open_pair(pipe_class, options, device=target.device, peer_device=source.device)
    attach(pair, target, source).here.read_blocks([[0]], [[1]]).wait(LIMIT_S)
    return pair


def _settled_threads(goal: int) -> int:
    """Threads alive, once those that opened the pairs are gone."""
    pause = threading.Event()
    for _ in range(50):
        if threading.active_count() <= goal:
            break
        pause.wait(0.05)
    return threading.active_count()
