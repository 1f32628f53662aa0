"""The two ends of a direction, stepped by hand: order, window, cancellation, failure."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

import msgpack
import pytest

from kvconnect.errors import BrokenError, HandshakeError, LoadError
from kvconnect.pipes.flows import Kind
from kvconnect.pipes.nccl_lines import AT_ONCE, LOOK_S, Arrival, Receiver, Sender
from kvconnect.pipes.nccl_loop import Pace
from kvconnect.pipes.nccl_plan import WINDOW_SLOTS

MB = 1 << 20
SLOT = 24 * MB


class Told:
    """Remembers what a line says; `answer` decides what becomes of it."""

    def __init__(self):
        self.said, self.ended = [], []
        self.refuse = None

    def call(self, op, body):
        self.said.append((op, msgpack.unpackb(msgpack.packb(body))))
        answer = Future()
        if self.refuse:
            answer.set_exception(self.refuse)
        else:
            answer.set_result({})
        return answer

    def end(self, error):
        self.ended.append(error)

    def orders(self):
        return [body for op, body in self.said if op == "nccl.orders"]


class Wire:
    """Notes what it is told; its device is done when the test says so."""

    slot_bytes = SLOT

    def __init__(self):
        self.rests, self.done, self.ready, self.aborted = False, True, True, False
        self.notes = []

    def settled(self):
        return self.ready

    def launch(self, move):
        self.notes.append((move.nbytes // MB, None if move.ids is None else list(move.ids)))
        return lambda: self.done

    def abort(self):
        self.aborted = True

    def at_rest(self):
        return self.rests


@pytest.fixture
def told():
    return Told()


def receiver(told, wire=None):
    met = []
    line = Receiver(told, 10.0, [2 * MB], lambda: met.append(1))
    line.met = met
    if wire is not None:
        line.wired(wire)
    return line


def arrival(number, count, over=None, kind=Kind.READ):
    ask = {"number": number} if kind is Kind.READ else None
    return Arrival((kind, number), [list(range(count))], over or (lambda _: None), ask)


def run(line, steps=200, now=0.0):
    for _ in range(steps):
        if line.step(now) is Pace.IDLE:
            return


def test_nothing_is_ordered_before_the_ends_have_met(told):
    line = receiver(told)
    line.add(arrival(1, 6))
    line.add(arrival(2, 6))
    assert line.met == [1]
    assert line.step(0.0) is Pace.WAITING
    assert not told.said
    wire = Wire()
    wire.ready = False
    line.wired(wire)
    line.step(0.0)
    assert not told.said
    wire.ready = True
    line.step(0.0)
    (order,) = told.orders()
    assert [ask["number"] for ask in order["asks"]] == [1, 2]
    assert [row[1] for row in order["rows"]] == [1, 2, 1, 2]


def test_a_transfer_is_over_once_the_device_has_done_its_last_chunk(told):
    over, wire = [], Wire()
    wire.done = False
    line = receiver(told, wire)
    line.add(arrival(1, 14, over.append))
    run(line)
    # All of it is enqueued ahead.
    assert [size for size, _ in wire.notes] == [8, 16, 4]
    assert not over
    wire.done = True
    assert line.step(0.0) is Pace.MOVED
    assert over == [None]
    assert line.step(0.0) is Pace.IDLE


def test_whoever_brings_work_launches_the_first_of_it_and_ends_nothing(told):
    over, wire = [], Wire()
    line = receiver(told, wire)
    line.add(arrival(1, 14, over.append))
    line.start()
    assert not told.said, "the ends have not met"
    line.step(0.0)
    line.add(arrival(2, 14, over.append))
    line.start()
    assert len(wire.notes) == 1 + AT_ONCE
    assert not over
    run(line)
    assert over == [None, None]
    launched = len(wire.notes)
    line.fail(BrokenError("gone"))
    line.start()
    assert len(wire.notes) == launched


def test_no_more_than_a_window_is_ordered_ahead(told):
    wire = Wire()
    wire.done = False
    line = receiver(told, wire)
    line.add(arrival(1, 1000))
    run(line)
    ordered = sum(row[4] for order in told.orders() for row in order["rows"]) * 2 * MB
    assert WINDOW_SLOTS * SLOT <= ordered < (WINDOW_SLOTS + 1) * SLOT
    wire.done = True
    run(line, 1000)
    assert sum(row[4] for order in told.orders() for row in order["rows"]) == 1000
    firsts = [(order["first"], len(order["rows"])) for order in told.orders()]
    assert all(first + count == following for (first, count), (following, _) in itertools.pairwise(firsts))


def test_a_cancelled_read_is_ordered_no_further_and_leaves_its_blocks_alone(told):
    over, wire = [], Wire()
    wire.done = False
    line = receiver(told, wire)
    line.add(arrival(1, 1000, over.append))
    line.step(0.0)
    ordered = len(told.orders()[0]["rows"])
    assert line.stop((Kind.READ, 1))
    assert not over
    wire.done = True
    run(line, 1000)
    assert isinstance(over[0], LoadError)
    assert told.orders()[1]["drops"] == [[0, 1]]
    assert sum(len(order["rows"]) for order in told.orders()) == ordered
    # What was ordered is received nevertheless: the other end sends it.
    assert [ids for _, ids in wire.notes] == [[0, 1, 2, 3]] + [None] * (ordered - 1)
    assert not line.stop((Kind.READ, 1))


def test_a_read_cancelled_before_it_was_ordered_is_never_heard_of(told):
    over = []
    line = receiver(told)
    line.add(arrival(1, 4, over.append))
    assert line.stop((Kind.READ, 1))
    assert isinstance(over[0], LoadError)
    line.wired(Wire())
    run(line)
    assert not told.said


def test_a_sender_enqueues_what_is_ordered_while_nothing_of_it_is_over(told):
    wire = Wire()
    wire.done = False
    line = Sender(told, 10.0, [2 * MB])
    line.know((Kind.READ, 1), [list(range(6))])
    line.ordered(0, [[0, 1, 0, 0, 2], [0, 1, 0, 2, 4]])
    line.wired(wire)
    run(line)
    assert wire.notes == [(4, [0, 1]), (8, [2, 3, 4, 5])]
    assert line.step(0.0) is Pace.PATIENT, "the other end hears when it has arrived"
    with pytest.raises(HandshakeError, match="transfer 1, which is not running"):
        line.ordered(2, [[0, 1, 0, 0, 1]])  # all of it was ordered


@pytest.mark.parametrize(
    ("first", "row", "message"),
    [
        (1, [0, 1, 0, 0, 2], "orders chunk 1, where 0 is next"),
        (0, [0, 2, 0, 0, 2], "transfer 2, which is not running"),
        (0, [0, 1, 0, 5, 2], "blocks 5 to 7 of group 0"),
        (0, [0, 1, 1, 0, 1], "blocks 0 to 1 of group 1"),
    ],
)
def test_orders_that_cannot_follow_are_refused(told, first, row, message):
    line = Sender(told, 10.0, [2 * MB])
    line.know((Kind.READ, 1), [list(range(6))])
    with pytest.raises(HandshakeError, match=message):
        line.ordered(first, [row])


def test_after_a_failure_waiters_hear_of_it_only_when_the_device_rests(told):
    over, wire = [], Wire()
    wire.done = False
    line = receiver(told, wire)
    line.add(arrival(1, 1000, over.append))
    run(line, 5)
    line.fail(HandshakeError("out of step"))
    assert wire.aborted
    assert isinstance(told.ended[0], BrokenError)
    assert line.step(0.0) is Pace.WAITING
    assert not over
    assert not line.ended.is_set()
    wire.rests = True
    assert line.step(0.0) is Pace.IDLE
    assert isinstance(over[0], BrokenError)
    assert line.ended.is_set()
    line.add(arrival(2, 1, over.append))
    assert isinstance(over[1], BrokenError)


def test_a_wire_that_comes_after_the_end_is_given_up_at_once(told):
    line = receiver(told)
    line.add(arrival(1, 4))
    line.fail(BrokenError("gone"))
    line.step(0.0)
    wire = Wire()
    line.wired(wire)
    assert wire.aborted
    assert line.step(0.0) is Pace.WAITING
    wire.rests = True
    assert line.step(0.0) is Pace.IDLE


def test_where_nothing_moves_the_other_end_is_asked_and_then_given_up(told):
    wire = Wire()
    wire.done = False
    line = receiver(told, wire)
    line.add(arrival(1, 2))
    run(line, 5, now=100.0)
    told.said.clear()
    line.step(100.0 + LOOK_S / 2)
    assert not told.said
    line.step(100.1 + LOOK_S)
    assert told.said == [("nccl.alive", {})]
    with pytest.raises(BrokenError, match=r"nothing moved for 10\.0 s"):
        line.step(110.5)


def test_an_end_that_cannot_be_told_is_given_up(told):
    told.refuse = BrokenError("connection refused")
    line = receiver(told, Wire())
    line.add(arrival(1, 2))
    line.step(0.0)
    assert "the other end cannot go on: connection refused" in str(told.ended[0])
