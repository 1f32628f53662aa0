"""The clauses of the tensor path, each a plain function over an opened `PipePair`.

A law raises `AssertionError` when the pipe breaks it. Every wait is bounded. No
law relies on how much a pipe buffers: a send and its receive run in two threads.
Tensors are sent from the device of their end; what arrives is compared on the CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    DeadlineError,
    EndOfPipe,
    KVConnectError,
    TensorRejectedError,
)
from kvconnect.pipes.base import Pipe
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from kvconnect.testing.peers import LIMIT_S, PipePair, spawn
from kvconnect.testing.samples import fidelity_samples, same

#: A send of these many bytes, time and again, ends up waiting for the receiver.
BIG_BYTES = 4 << 20
#: After this many without a receiver, a pipe that still takes more has no bound.
MANY = 200
#: Long enough for a thread to block where it is going to.
SETTLE_S = 0.2
#: What must not block may take this long on a busy machine.
PROMPT_S = 5.0


def messages_arrive_in_the_order_sent(pair: PipePair) -> None:
    """Clause 1, both directions, small and large mixed."""
    for sender, receiver in ((pair.here, pair.there), (pair.there, pair.here)):
        device = pair.device_of(sender)
        sent = [torch.full((1 << (i % 20),), i, dtype=torch.int32, device=device) for i in range(40)]
        for expected, got in zip(sent, _carry(sender, receiver, sent), strict=True):
            same(expected, got)


def none_is_a_message_not_an_end(pair: PipePair) -> None:
    """Clause 1: ``None`` arrives in its place, and what follows it arrives, too."""
    sent = [torch.ones(3, device=pair.device), None, None, torch.zeros(2, device=pair.device)]
    for expected, got in zip(sent, _carry(pair.here, pair.there, sent), strict=True):
        same(expected, got)


def several_tensors_at_once_arrive_in_order(pair: PipePair) -> None:
    """`send_tensors` is as many sends."""
    sent: list[Tensor | None] = [torch.arange(i, device=pair.device) for i in range(5)] + [None]
    sending = spawn(lambda: pair.here.send_tensors(sent))
    for expected in sent:
        same(expected, _receive(pair.there))
    sending.result(LIMIT_S)


def memory_is_the_callers_again_when_a_send_returns(pair: PipePair) -> None:
    """Clause 2: what the sender writes afterwards does not change the message."""
    for count in (16, BIG_BYTES // 4):
        tensor, returned = torch.ones(count, device=pair.device), threading.Event()

        def send(tensor: Tensor = tensor, returned: threading.Event = returned) -> None:
            pair.here.send_tensor(tensor)
            tensor.fill_(7)
            returned.set()

        sending = spawn(send)
        returned.wait(SETTLE_S)  # a pipe that does not buffer returns only once it is received
        same(torch.ones(count), _receive(pair.there))
        sending.result(LIMIT_S)


def what_was_received_is_the_receivers_own(pair: PipePair) -> None:
    """Clause 2: messages share memory neither with each other nor with the sender's tensor."""
    original = torch.ones(1000, device=pair.device)
    first, second = _carry(pair.here, pair.there, [original, original])
    assert first is not None
    assert second is not None
    first.fill_(3)
    same(torch.ones(1000), second)
    same(torch.ones(1000), original)
    later = _carry(pair.here, pair.there, [torch.full((1000,), 9.0, device=pair.device)])
    same(torch.full((1000,), 9.0), later[0])
    same(torch.full((1000,), 3.0), first)


def shape_dtype_and_values_survive(pair: PipePair) -> None:
    """Clause 3: every dtype; zero-size, zero-dim, strided, expanded, with a gradient.

    Results are contiguous, and on the receiver's device.
    """
    sent = fidelity_samples(pair.device)
    for expected, got in zip(sent, _carry(pair.here, pair.there, sent), strict=True):
        same(expected, got)
        assert got is not None
        assert got.is_contiguous()
        assert got.device == torch.device(pair.peer_device), f"received on {got.device}"
        assert not got.requires_grad


def what_cannot_be_carried_is_refused_before_a_byte_moves(pair: PipePair) -> None:
    """Clause 3: a refused tensor leaves no trace in the stream."""
    for unfit in (torch.eye(3, device=pair.device).to_sparse(), torch.empty(2, device="meta")):
        error = _error(lambda unfit=unfit: pair.here.send_tensor(unfit))  # type: ignore[misc]
        assert isinstance(error, TensorRejectedError), f"{unfit.layout} on {unfit.device}: got {error!r}"
    same(torch.ones(2), _carry(pair.here, pair.there, [torch.ones(2, device=pair.device)])[0])


def tensors_on_devices_that_are_not_declared_are_refused(pair: PipePair) -> None:
    """`Traits.devices`: what is carried all the same has to be declared; devices that are not here count as refused."""
    for kind in {"cpu", "cuda"} - pair.pipe_class.traits.devices:
        if kind == "cpu" or torch.cuda.is_available():
            error = _error(lambda kind=kind: pair.here.send_tensor(torch.ones(2, device=kind)))  # type: ignore[misc]
            assert isinstance(error, TensorRejectedError), f"{kind} is not in traits.devices; sending got {error!r}"


def a_tensor_can_be_received_into_its_final_memory(pair: PipePair) -> None:
    """`recv_tensor_into` fills ``out``; a message that does not fit is consumed and refused."""
    sent = [None if x is None else x.to(pair.device) for x in (torch.arange(6.0), torch.ones(3), None, torch.zeros(6))]
    sending = spawn(lambda: pair.here.send_tensors(sent))
    out = torch.empty(6, device=pair.peer_device)
    _within(lambda: pair.there.recv_tensor_into(out))
    same(torch.arange(6.0), out)
    for _ in range(2):
        error = _error(lambda: pair.there.recv_tensor_into(out))
        assert isinstance(error, TensorRejectedError), f"a message that does not fit: got {error!r}"
    _within(lambda: pair.there.recv_tensor_into(out))
    same(torch.zeros(6), out)
    sending.result(LIMIT_S)


def a_second_receiver_is_busy_and_the_first_goes_on(pair: PipePair) -> None:
    """Clause 4: of two receivers one gets `BusyError` at once, the other the message."""
    receiving = [spawn(pair.there.recv_tensor) for _ in range(2)]
    busy = _first_failed(receiving)
    assert isinstance(busy.exception(), BusyError), f"got {busy.exception()!r}"
    other = receiving[1 - receiving.index(busy)]
    pair.here.send_tensor(torch.ones(2, device=pair.device))
    same(torch.ones(2), other.result(LIMIT_S))


def a_second_sender_is_busy_and_the_first_goes_on(pair: PipePair) -> None:
    """Clause 4: while a send waits for the receiver, another one gets `BusyError`; nothing is lost or mixed."""
    number, sending = _fill(pair)
    error = _error(lambda: pair.here.send_tensor(torch.zeros(1, device=pair.device)))
    assert isinstance(error, BusyError), f"a second sender: got {error!r}"
    _within(lambda: _expect_numbered(pair.there, number + 1))
    sending.result(LIMIT_S)
    same(torch.ones(1), _carry(pair.here, pair.there, [torch.ones(1, device=pair.device)])[0])


def both_directions_work_at_once(pair: PipePair) -> None:
    """Clause 4: each end sends and receives at the same time, more than any buffer holds."""
    count = 12
    work: list[Future[None]] = []
    for end in (pair.here, pair.there):
        sent = [_numbered(i, pair.device_of(end)) for i in range(count)]
        work.append(spawn(lambda end=end, sent=sent: end.send_tensors(sent)))  # type: ignore[misc]
        work.append(spawn(lambda end=end: _expect_numbered(end, count)))  # type: ignore[misc]
    for each in work:
        each.result(LIMIT_S)


def close_wakes_a_blocked_receiver(pair: PipePair) -> None:
    """Clauses 4 and 5, for `close` and `abort`."""
    for pipe, end in _both_ways_to_end(pair):
        receiving = spawn(pipe.recv_tensor)
        threading.Event().wait(SETTLE_S)
        _within(end)
        error = receiving.exception(PROMPT_S)
        assert isinstance(error, ClosedError), f"a receiver blocked when its end closes: got {error!r}"


def abort_wakes_a_blocked_sender(pair: PipePair) -> None:
    """Clauses 4 and 5."""
    _, sending = _fill(pair)
    _within(pair.here.abort)
    error = sending.exception(PROMPT_S)
    assert isinstance(error, ClosedError), f"a sender blocked when its end aborts: got {error!r}"


def a_closed_end_says_so(pair: PipePair) -> None:
    """Clause 5: after the own `close` every call raises `ClosedError`; closing again is nothing."""
    for pipe, end in _both_ways_to_end(pair):
        end()
        errors = [_error(lambda pipe=pipe: pipe.send_tensor(torch.ones(1, device=pair.device)))]  # type: ignore[misc]
        errors += [_error(lambda pipe=pipe: pipe.send_tensor(None)), _error(pipe.recv_tensor)]  # type: ignore[misc]
        for error in errors:
            assert isinstance(error, ClosedError), f"a call on a closed end: got {error!r}"
        pipe.close()
        pipe.abort()


def all_that_was_sent_before_a_close_arrives_then_the_end(pair: PipePair) -> None:
    """Clause 5: `close` flushes, and the end is not mistaken for a failure."""
    _expect_all_then_the_end(pair)


def a_close_with_messages_unread_loses_none_that_were_sent(pair: PipePair) -> None:
    """Clause 5: the same where the end that closes never received what was sent to it."""
    unread = spawn(lambda: pair.there.send_tensor(torch.ones(1, device=pair.peer_device)))
    threading.Event().wait(SETTLE_S)
    _expect_all_then_the_end(pair)
    error = unread.exception(LIMIT_S)
    assert error is None or isinstance(error, KVConnectError), f"a send that nobody received: got {error!r}"


def abort_never_blocks_and_ends_the_other_side(pair: PipePair) -> None:
    """Clause 5: even while a send is stuck; the other end gets whole messages, then an error."""
    _, sending = _fill(pair)
    began = time.monotonic()
    _within(pair.here.abort)
    assert time.monotonic() - began < PROMPT_S / 2, "abort blocked"
    sending.exception(PROMPT_S)
    error = _drain_numbered(pair.there)
    assert isinstance(error, (BrokenError, EndOfPipe)), f"after the other end aborted: got {error!r}"


def after_a_broken_wire_only_closing_remains(pair: PipePair) -> None:
    """Clause 6: every later call fails at once, `close` and `abort` do not."""
    pair.there.send_tensor(torch.ones(1, device=pair.peer_device))
    pair.there.abort()
    _drain(pair.here)
    for _ in range(2):
        error = _error(pair.here.recv_tensor)
        assert isinstance(error, (BrokenError, EndOfPipe)), f"a receive from an aborted peer: got {error!r}"
    _, error = _send_until_error(pair)
    assert isinstance(error, BrokenError), f"sends to an aborted peer: got {error!r}"
    _within(pair.here.close)
    _within(pair.here.abort)


def sends_to_a_closed_peer_fail(pair: PipePair) -> None:
    """Clause 6: the failure reaches the caller, after a bounded number of sends."""
    pair.there.close()
    _, error = _send_until_error(pair)
    assert isinstance(error, (BrokenError, EndOfPipe)), f"sends to a closed peer: got {error!r}"


def a_silent_peer_is_a_deadline_and_no_harm(pair: PipePair) -> None:
    """Clause 7: between messages a deadline leaves the pipe as it was."""
    short = pair.another(timeout_s=SETTLE_S)
    error = _error(short.here.recv_tensor)
    assert isinstance(error, DeadlineError), f"nothing to receive: got {error!r}"
    same(torch.ones(4), _carry(short.there, short.here, [torch.ones(4, device=pair.peer_device)])[0])


def a_peer_that_does_not_receive_is_a_deadline(pair: PipePair) -> None:
    """Clauses 6 and 7: the receiver sees what was sent, whole, and then either an error or the next message."""
    short = pair.another(timeout_s=2 * SETTLE_S)
    sent, error = _send_until_error(short)
    assert isinstance(error, DeadlineError), f"{sent} messages that nobody received: got {error!r}"
    again = spawn(lambda: short.here.send_tensor(torch.full((1,), -1.0, device=pair.device)))
    for number in range(sent):
        got = _receive_or_error(short.there)
        if isinstance(got, Exception):
            break  # the failed send took the pipe with it
        same(_numbered(number), got)
    if again.exception(LIMIT_S) is None:
        same(torch.full((1,), -1.0), _receive(short.there))
    else:
        assert isinstance(again.exception(), (BrokenError, DeadlineError)), f"got {again.exception()!r}"
        assert isinstance(_drain(short.there), KVConnectError)


def opening_and_closing_leaves_nothing_behind(pair: PipePair) -> None:
    """Threads, open files and shared memory are the same after pairs came and went."""
    before: Holdings | None = None
    for _ in range(4):
        each = pair.opened_anew(pair.timeout_s)
        same(torch.ones(5), _carry(each.here, each.there, [torch.ones(5, device=pair.device)])[0])
        each.here.close()
        each.there.close()
        each.close()
        if before is None:  # the first may start what the whole process shares
            before = Holdings.now()
        assert_nothing_left(before)


#: Every law of the tensor path.
LAWS: tuple[Callable[[PipePair], None], ...] = (
    messages_arrive_in_the_order_sent,
    none_is_a_message_not_an_end,
    several_tensors_at_once_arrive_in_order,
    memory_is_the_callers_again_when_a_send_returns,
    what_was_received_is_the_receivers_own,
    shape_dtype_and_values_survive,
    what_cannot_be_carried_is_refused_before_a_byte_moves,
    tensors_on_devices_that_are_not_declared_are_refused,
    a_tensor_can_be_received_into_its_final_memory,
    a_second_receiver_is_busy_and_the_first_goes_on,
    a_second_sender_is_busy_and_the_first_goes_on,
    both_directions_work_at_once,
    close_wakes_a_blocked_receiver,
    abort_wakes_a_blocked_sender,
    a_closed_end_says_so,
    all_that_was_sent_before_a_close_arrives_then_the_end,
    a_close_with_messages_unread_loses_none_that_were_sent,
    abort_never_blocks_and_ends_the_other_side,
    after_a_broken_wire_only_closing_remains,
    sends_to_a_closed_peer_fail,
    a_silent_peer_is_a_deadline_and_no_harm,
    a_peer_that_does_not_receive_is_a_deadline,
    opening_and_closing_leaves_nothing_behind,
)

#: Those that also a pipe keeps which has words for messages only, and none for ends, deadlines and failures.
CORE: tuple[Callable[[PipePair], None], ...] = (
    messages_arrive_in_the_order_sent,
    none_is_a_message_not_an_end,
    several_tensors_at_once_arrive_in_order,
    memory_is_the_callers_again_when_a_send_returns,
    what_was_received_is_the_receivers_own,
    shape_dtype_and_values_survive,
    a_tensor_can_be_received_into_its_final_memory,
    a_second_receiver_is_busy_and_the_first_goes_on,
    a_second_sender_is_busy_and_the_first_goes_on,
    both_directions_work_at_once,
    close_wakes_a_blocked_receiver,
    a_closed_end_says_so,
)


# -- what laws are made of ------------------------------------------------------


def _both_ways_to_end(pair: PipePair) -> list[tuple[Pipe, Callable[[], None]]]:
    one, other = pair.here, pair.another().here
    return [(one, one.close), (other, other.abort)]


def _carry(sender: Pipe, receiver: Pipe, messages: Sequence[Tensor | None]) -> list[Tensor | None]:
    def send() -> None:
        for message in messages:
            sender.send_tensor(message)

    sending = spawn(send)
    got = [_receive(receiver) for _ in messages]
    sending.result(LIMIT_S)
    return got


def _expect_all_then_the_end(pair: PipePair) -> None:
    """Send from `here`, close it, and receive everything `there`."""
    sent = [torch.ones(3), None, torch.arange(BIG_BYTES // 8), torch.zeros(5)]
    sent = [None if message is None else message.to(pair.device) for message in sent]

    def send() -> None:
        pair.here.send_tensors(sent)
        pair.here.close()

    sending = spawn(send)
    threading.Event().wait(SETTLE_S)
    for expected in sent:
        same(expected, _receive(pair.there))
    for _ in range(2):
        error = _error(pair.there.recv_tensor)
        assert isinstance(error, EndOfPipe), f"after the last message: got {error!r}"
    sending.result(LIMIT_S)


def _receive(pipe: Pipe) -> Tensor | None:
    return spawn(pipe.recv_tensor).result(LIMIT_S)


def _within(call: Callable[[], None]) -> None:
    spawn(call).result(LIMIT_S)


def _error(call: Callable[[], object]) -> BaseException | None:
    """Return what ``call`` raised; a call that hangs fails the law with `TimeoutError`."""
    return spawn(call).exception(LIMIT_S)


def _receive_or_error(pipe: Pipe) -> Tensor | Exception | None:
    receiving = spawn(pipe.recv_tensor)
    error = receiving.exception(LIMIT_S)
    return error if isinstance(error, Exception) else receiving.result()


def _drain(pipe: Pipe) -> Exception | None:
    """Receive until an error, and return it."""
    for _ in range(MANY + 1):
        got = _receive_or_error(pipe)
        if isinstance(got, Exception):
            return got
    return None


def _numbered(i: int, device: str = "cpu") -> Tensor:
    return torch.full((BIG_BYTES // 4,), float(i), device=device)


def _expect_numbered(pipe: Pipe, count: int) -> None:
    for i in range(count):
        same(_numbered(i), pipe.recv_tensor())


def _drain_numbered(pipe: Pipe) -> Exception | None:
    for i in range(MANY + 1):
        got = _receive_or_error(pipe)
        if isinstance(got, Exception):
            return got
        same(_numbered(i), got)
    return None


def _send_until_error(pair: PipePair) -> tuple[int, BaseException | None]:
    """Send big numbered messages from `here` until one fails; return how many went, and the error."""
    for number in range(MANY):
        message = _numbered(number, pair.device)
        error = _error(lambda message=message: pair.here.send_tensor(message))  # type: ignore[misc]
        if error is not None:
            return number, error
    return MANY, None


def _fill(pair: PipePair) -> tuple[int, Future[None]]:
    """Send big numbered messages from `here` until a send waits; return how many went before, and that send."""
    for number in range(MANY):
        message = _numbered(number, pair.device)
        sending = spawn(lambda message=message: pair.here.send_tensor(message))  # type: ignore[misc]
        try:
            sending.result(SETTLE_S)
        except TimeoutError:
            return number, sending
    raise AssertionError(f"{MANY} messages of {BIG_BYTES} bytes went out and nobody received: no bound")


def _first_failed(calls: Sequence[Future[Tensor | None]]) -> Future[Tensor | None]:
    over = threading.Event()
    for call in calls:
        call.add_done_callback(lambda _: over.set())
    assert over.wait(PROMPT_S), "both calls wait: the second was not told that it is busy"
    return next(call for call in calls if call.done())
