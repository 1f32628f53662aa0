"""The clauses about CUDA streams, each a plain function over an `End` on a CUDA device.

A law raises `AssertionError` when the pipe breaks it. They hold for a pair in one process and for
two processes alike. Every call is made with a non-default stream as the current one; streams are
none of torch's pool, which pipes use. A wrong order of two streams is a race, so that each law
holds one of them up, by a kernel that takes long or by bytes that do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kvconnect.paging import PagedMemory
from kvconnect.pipes.base import Transfer
from kvconnect.testing.devices import complete, on_stream, own_stream
from kvconnect.testing.ends import End, checksum
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
from kvconnect.testing.peers import LIMIT_S, spawn

T = TypeVar("T")

#: Clock cycles of a kernel that holds a stream up: 0.1 to 0.3 s.
SLOW_CYCLES = 300_000_000
#: Of one that a small message must not wait for: about a second.
LONG_CYCLES = 2_000_000_000
#: Small and large messages; the large ones take their time on the device.
SIZES = (4 << 10, 64 << 20)
#: Transfers whose end is looked at.
REPEATS = 200
#: Long enough for a send that does not wait for its receiver to return.
SETTLE_S = 0.2
_BLOCKS, _PIECE = 64, 32 << 10
_OLD, _NEW = 3, 7
# Numbers of streams; 0 is the other end's.
_CALLER, _OTHER, _FRESH = 1, 2, 3


def what_is_sent_is_what_the_callers_stream_will_have_written(end: End) -> None:
    """Clause 2, poison: a tensor may be sent while the kernel that produces it is yet to run."""
    _warm(end)
    for nbytes in SIZES:
        tensor = _full(end, nbytes, _OLD)
        receiving = end.tell("receive", count=1)

        def send(tensor: Tensor = tensor) -> None:
            _hold_up()
            tensor.fill_(_NEW)
            end.pipe.send_tensor(tensor)

        _as_caller(end, send).result(LIMIT_S)
        _check_received(receiving, nbytes, _NEW, "sent before its producer had run")


def what_is_written_after_a_send_is_not_sent(end: End) -> None:
    """Clause 2, late writer: once a send returned, kernels on the caller's stream may overwrite the tensor."""
    _warm(end)
    for nbytes in SIZES:
        tensor, returned = _full(end, nbytes, _OLD), threading.Event()

        def send(tensor: Tensor = tensor, returned: threading.Event = returned) -> None:
            _hold_up()  # so that sending and overwriting begin at the same time
            end.pipe.send_tensor(tensor)
            tensor.fill_(_NEW)
            returned.set()

        sending = _as_caller(end, send)
        returned.wait(SETTLE_S)
        _check_received(end.tell("receive", count=1), nbytes, _OLD, "overwritten after it was sent")
        sending.result(LIMIT_S)


def what_was_received_can_be_read_at_once(end: End) -> None:
    """Clause 2, late reader: a kernel launched right after a receive, on the receiver's stream, finds the message."""
    _warm(end)
    for nbytes in SIZES:
        count = 4
        sending = end.tell("send", count=count, nbytes=nbytes)

        for number in range(count):
            out = _full(end, nbytes, _OLD) if number % 2 else None
            got = _as_caller(end, partial(_receive_and_copy, end, out)).result(LIMIT_S)
            assert bool((got == number).all()), f"message {number} of {nbytes} bytes was read before it was there"
        sending.result(LIMIT_S)


def memory_is_not_received_into_before_its_stream_is_done_with_it(end: End) -> None:
    """Clause 2, early writer: kernels launched before a receive still find what was in ``out``.

    Memory that was freed on the caller's stream, and that a new message is given, is the same case.
    """
    _warm(end)
    for receive in (_receive_into, _receive_anew):
        for nbytes in SIZES:
            boxes, kept = [_full(end, nbytes, _OLD)], _full(end, nbytes, 0)
            sending = end.tell("send", count=1, nbytes=nbytes)
            threading.Event().wait(SETTLE_S)  # the message is there, or its sender waits for us
            _as_caller(end, partial(receive, end, boxes, kept)).result(LIMIT_S)
            assert bool((kept == _OLD).all()), f"a message of {nbytes} bytes came over what was still being read"
            sending.result(LIMIT_S)


def messages_do_not_wait_for_other_streams(end: End) -> None:
    """Clause 2: a long kernel on another stream, the default one included, is still running afterwards."""
    _warm(end)

    tensor = _full(end, SIZES[0], _NEW)

    def there_and_back() -> None:
        echo = end.tell("echo", count=1)
        end.pipe.send_tensor(tensor)
        got = end.pipe.recv_tensor()
        assert got is not None
        got.cpu()  # it can be read, too
        echo.result(LIMIT_S)

    _outlasted(end, there_and_back, "a small message")


def transfers_do_not_wait_for_other_streams(end: End) -> None:
    """The same for blocks, read and written."""
    layout = separate_layers(2, _BLOCKS, 2, _PIECE)
    end.attach(noisy_memory(layout, 1, end.device), layout, 2)

    def transfer() -> None:
        end.pipe.read_blocks([[1, 5]], [[2, 9]]).wait(LIMIT_S)
        end.pipe.write_blocks([[3, 7]], [[4, 8]]).wait(LIMIT_S)

    _as_caller(end, transfer).result(LIMIT_S)
    _outlasted(end, transfer, "a small transfer")


def a_transfer_that_is_done_can_be_read_on_any_stream(end: End) -> None:
    """Done means there: a kernel on a stream that has waited for nothing finds the bytes, in the callback already."""
    mine = noisy_memory(separate_layers(4, _BLOCKS, 2, _PIECE), 1, end.device)
    theirs = end.attach(mine, shared_region(4, _BLOCKS, 2, _PIECE, gap_bytes=0), 2)
    for number in range(REPEATS):
        count = [1 + number % 48]
        remote, local = random_ids(number, _BLOCKS, count), random_ids(number + 1000, _BLOCKS, count)
        transfer, looked = end.pipe.read_blocks(remote, local), Future[PagedMemory]()
        look = partial(_look, mine, _FRESH + number % 4, looked)
        if number % 2:
            transfer.add_done_callback(look)
            transfer.wait(LIMIT_S)
        else:
            transfer.wait(LIMIT_S)
            look(transfer)
        seen = looked.result(LIMIT_S)
        complete(end.device)
        wrong = int((naive_stream(clone(seen), local) != naive_stream(theirs, remote)).sum())
        assert wrong == 0, f"transfer {number} was done and {wrong} of its {transfer.nbytes} bytes were not there"


def an_engine_can_compute_in_other_blocks_meanwhile(end: End) -> None:
    """Blocks that no transfer names are the engine's: what its kernels write there stays, and nothing else moves."""
    used = _BLOCKS - 8
    mine = noisy_memory(separate_layers(4, _BLOCKS, 3, 1000), 1, end.device)
    theirs = end.attach(mine, shared_region(4, _BLOCKS, 3, 1000), 2)
    wanted = clone(mine)
    blocks = [region.view(_BLOCKS, -1)[used:] for region in regions(mine)]
    with _computing(end, blocks) as steps:
        for number in range(40):
            count = [1 + number]
            remote, local = random_ids(number, _BLOCKS, count), random_ids(number + 1000, used, count)
            end.pipe.read_blocks(remote, local).wait(LIMIT_S)
            naive_copy(wanted, local, theirs, remote)
            local, remote = random_ids(number + 2000, used, count), random_ids(number + 3000, _BLOCKS, count)
            end.pipe.write_blocks(local, remote).wait(LIMIT_S)
            naive_copy(theirs, remote, wanted, local)
    complete(end.device)
    for region in regions(wanted):
        region.view(_BLOCKS, -1)[used:] += steps[0] % 256
    assert steps[0] > 0, "nothing was computed meanwhile"
    assert not differences(mine, wanted), "; ".join(differences(mine, wanted))
    everything = [list(range(_BLOCKS))]
    there = end.tell("stream", blocks=everything).result(LIMIT_S)["crc"]
    assert there == checksum(naive_stream(theirs, everything)), "the other end's blocks are not as a naive copy"


#: Every law about streams.
LAWS: tuple[Callable[[End], None], ...] = (
    what_is_sent_is_what_the_callers_stream_will_have_written,
    what_is_written_after_a_send_is_not_sent,
    what_was_received_can_be_read_at_once,
    memory_is_not_received_into_before_its_stream_is_done_with_it,
    messages_do_not_wait_for_other_streams,
    transfers_do_not_wait_for_other_streams,
    a_transfer_that_is_done_can_be_read_on_any_stream,
    an_engine_can_compute_in_other_blocks_meanwhile,
)


# -- what laws are made of ------------------------------------------------------


def _as_caller(end: End, call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a thread whose current stream is its own; over once that stream has done all of it."""

    def run() -> T:
        with on_stream(end.device, _CALLER):
            outcome = call()
            torch.cuda.current_stream(end.device).synchronize()
            return outcome

    return spawn(run)


def _hold_up(cycles: int | None = None) -> None:
    """Launch a kernel that does nothing for a while on the current stream."""
    # Not public, but what torch's own tests of streams use.
    torch.cuda._sleep(SLOW_CYCLES if cycles is None else cycles)  # type: ignore[no-untyped-call] # noqa: SLF001


def _full(end: End, nbytes: int, value: int) -> Tensor:
    """Return a complete tensor that belongs to the caller's stream."""
    return _as_caller(end, lambda: torch.full((nbytes,), value, dtype=torch.uint8, device=end.device)).result(LIMIT_S)


def _receive_and_copy(end: End, out: Tensor | None) -> Tensor:
    """Receive, into ``out`` if there is one, and launch a copy of the message at once."""
    if out is None:
        out = end.pipe.recv_tensor()
        assert out is not None
    else:
        end.pipe.recv_tensor_into(out)
    return out.clone()


def _receive_into(end: End, boxes: list[Tensor], kept: Tensor) -> Tensor:
    """Receive into a tensor that a kernel is yet to copy to ``kept``."""
    _hold_up()
    kept.copy_(boxes[0])
    end.pipe.recv_tensor_into(boxes[0])
    return boxes[0]


def _receive_anew(end: End, boxes: list[Tensor], kept: Tensor) -> Tensor | None:
    """The same with a tensor that is freed, for the allocator to hand out again."""
    _hold_up()
    kept.copy_(boxes.pop())
    return end.pipe.recv_tensor()


def _warm(end: End) -> None:
    """Have both ends do everything once: allocators, modules and connections take their time at first."""
    for nbytes in SIZES:
        tensor = _full(end, nbytes, 1)
        echo = end.tell("echo", count=1)
        _as_caller(end, partial(end.pipe.send_tensor, tensor)).result(LIMIT_S)
        assert _as_caller(end, end.pipe.recv_tensor).result(LIMIT_S) is not None
        echo.result(LIMIT_S)


def _check_received(receiving: Future[dict[str, object]], nbytes: int, value: int, what: str) -> None:
    wanted = checksum(torch.full((nbytes,), value, dtype=torch.uint8))
    assert receiving.result(LIMIT_S)["crc"] == [wanted], f"a tensor of {nbytes} bytes was {what}"


def _outlasted(end: End, call: Callable[[], None], what: str) -> None:
    """Check that ``call`` is over before long kernels are, on a stream of the law's and on the default one.

    The best of a few attempts counts: a busy machine may hold any one up.
    """
    for streams in (partial(own_stream, number=_OTHER), torch.cuda.default_stream):
        assert any(_ends_first(end, call, streams) for _ in range(3)), f"{what} waited for a kernel of another stream"


def _ends_first(end: End, call: Callable[[], None], streams: Callable[[str], torch.cuda.Stream]) -> bool:
    running = []
    for device in sorted(end.devices):
        with torch.cuda.stream(streams(device)):
            _hold_up(LONG_CYCLES)
            running.append(torch.cuda.current_stream(device).record_event())
    try:
        _as_caller(end, call).result(LIMIT_S)
        return not any(event.query() for event in running)
    finally:
        for event in running:
            event.synchronize()


def _look(memory: PagedMemory, stream: int, looked: Future[PagedMemory], _: Transfer) -> None:
    """Copy ``memory`` by kernels on a stream that has waited for nothing; does not wait for them."""
    try:
        with on_stream(memory.device, stream):
            looked.set_result(clone(memory, memory.device))
    except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the copy
        looked.set_exception(error)


@contextmanager
def _computing(end: End, blocks: list[Tensor]) -> Iterator[list[int]]:
    """Add 1 to all of ``blocks`` time and again, in a thread with a stream of its own; say how often, at the end."""
    stop, first, steps = threading.Event(), threading.Event(), [0]

    def compute() -> None:
        with on_stream(end.device, _OTHER):
            while not stop.is_set():
                for block in blocks:
                    block.add_(1)
                steps[0] += 1
                first.set()
                torch.cuda.current_stream(end.device).synchronize()

    computing = spawn(compute)
    first.wait(LIMIT_S)
    try:
        yield steps
    finally:
        stop.set()
        computing.result(LIMIT_S)
