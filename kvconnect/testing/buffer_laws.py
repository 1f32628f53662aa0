"""The clauses of `kvconnect.buffers.base.LookupBuffer` as plain functions.

Each law gets a way to open a table: `Ends` with two ends, ``put`` to insert at and
``take`` to take from, which may be one object, two, or two processes. A law raises
`AssertionError` when the buffer breaks the contract.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kvconnect.buffers.base import BufferTraits, Grant, LookupBuffer, LookupKey
from kvconnect.errors import BufferFullError, ClosedError, KVConnectError, LoadError
from kvconnect.testing.peers import LIMIT_S, spawn
from kvconnect.testing.samples import fidelity_samples

T = TypeVar("T")

#: Short enough to wait for, long enough for a busy machine to do something before it is over.
TTL_S = 1.0
ROOM_BYTES = 1 << 20


@dataclass
class Ends:
    """Both ends of one table. Whoever opened it closes it."""

    put: LookupBuffer
    take: LookupBuffer


class Open(Protocol):
    """Opens a table; what is not named is ample."""

    def __call__(self, *, policy: str = "wait", ttl_s: float = 600.0, wait_s: float = LIMIT_S) -> Ends:
        """Open a table of `ROOM_BYTES` bytes."""
        ...


Law = Callable[[Open], None]


def key(number: int, length: int = 16) -> LookupKey:
    """Return one key of many."""
    return LookupKey("laws", number.to_bytes(16, "big"), length)


def tensor(number: int, nbytes: int = 1000) -> Tensor:
    """Return recognisable content."""
    return torch.full((nbytes,), number % 251, dtype=torch.uint8)


# -- 1. take-once ---------------------------------------------------------------------


def an_entry_is_taken_once(open_: Open) -> None:
    """The second taker finds nothing."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    _same([tensor(1)], ends.take.drop_select(key(1)))
    assert ends.take.drop_select(key(1)) is None, "an entry was handed out twice"


def racing_takers_share_nothing(open_: Open) -> None:
    """Of many takers at once, exactly one gets the entry."""
    ends = open_()
    for number in range(5):
        ends.put.insert(key(number), [tensor(number)])
        start = threading.Barrier(6)

        def take(number: int = number, start: threading.Barrier = start) -> list[Tensor] | None:
            start.wait(LIMIT_S)
            return ends.take.drop_select(key(number))

        got = [taken for taken in _all([spawn(take) for _ in range(6)]) if taken is not None]
        assert len(got) == 1, f"{len(got)} of 6 racing takers got the entry"
        _same([tensor(number)], got[0])


def a_claimed_entry_is_nobody_elses(open_: Open) -> None:
    """While one taker has claimed an entry, others find nothing."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    grant = _claim(ends.take, key(1), "a")
    assert ends.take.claim(key(1), "b") is None, "two takers claimed one entry"
    assert ends.take.drop_select(key(1)) is None, "a claimed entry was taken"
    _same([tensor(1)], grant.tensors())
    grant.release()
    assert ends.take.drop_select(key(1)) is None, "an entry was left after its release"


def a_taker_may_claim_its_entry_again(open_: Open) -> None:
    """`BufferTraits.joins`: both grants read, and the entry is gone when both have ended."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    for grant in (_claim(ends.take, key(1), "a"), _claim(ends.take, key(1), "a")):
        _same([tensor(1)], grant.tensors())
        grant.release()
    assert ends.take.drop_select(key(1)) is None, "an entry was left after its release"


# -- 2. miss --------------------------------------------------------------------------


def a_miss_is_a_value(open_: Open) -> None:
    """What is not there is ``None``; another namespace or length is another key."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    for other in (key(2), key(1, length=17), LookupKey("others", key(1).digest, 16)):
        assert ends.take.drop_select(other) is None, f"{other} matched {key(1)}"
        assert ends.take.claim(other, "a") is None, f"{other} matched {key(1)}"
    assert ends.take.drop_select(key(1)) is not None, "a miss took an entry"


def matching_takes_nothing(open_: Open) -> None:
    """`match` counts the leading keys that are there, and leaves them."""
    ends = open_()
    for number in (1, 2, 4):
        ends.put.insert(key(number), [tensor(number)])
    assert ends.take.match([key(1), key(2), key(3), key(4)]) == 2, "not the number of leading keys present"
    assert ends.take.match([]) == 0, "an empty list matched"
    _eventually(lambda: ends.take.drop_select(key(1)) is not None, "a match took the entry")


# -- 3. ownership ---------------------------------------------------------------------


def tensors_are_the_callers_again_after_an_insert(open_: Open) -> None:
    """Writing to an inserted tensor does not reach the buffer."""
    ends = open_()
    mine = tensor(1)
    ends.put.insert(key(1), [mine])
    mine.fill_(99)
    _same([tensor(1)], ends.take.drop_select(key(1)))


def what_a_grant_reads_is_the_takers_own(open_: Open) -> None:
    """Writing to what was read does not reach the entry."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    grant = _claim(ends.take, key(1), "a")
    grant.tensors()[0].fill_(99)
    _same([tensor(1)], grant.tensors())
    grant.release()


# -- 4. replace -----------------------------------------------------------------------


def inserting_a_key_again_replaces_the_entry(open_: Open) -> None:
    """There is one entry under a key, the last one."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    ends.put.insert(key(1), [tensor(2), tensor(3)])
    _same([tensor(2), tensor(3)], ends.take.drop_select(key(1)))
    assert ends.take.drop_select(key(1)) is None, "the replaced entry is still there"


def a_taker_sees_one_entry_or_the_other_whole(open_: Open) -> None:
    """Parts of two entries under one key never mix."""
    ends = open_()
    rounds = 120
    taken: list[list[Tensor]] = []
    over = threading.Event()

    def take() -> None:
        while not over.wait(0.003):  # so that most entries are replaced, and some taken
            got = ends.take.drop_select(key(1))
            if got is not None:
                taken.append([part.clone() for part in got])

    taker = spawn(take)
    for number in range(1, rounds):
        ends.put.insert(key(1), [tensor(number, 5000), tensor(number, 3000)])
        over.wait(0.001)
    _eventually(lambda: bool(taken), "a taker never saw an entry that was always there")
    over.set()
    taker.result(LIMIT_S)
    for first, second in taken:
        assert set(first.tolist()) == set(second.tolist()), "a taker saw parts of two entries"
    values = [int(first[0]) for first, _ in taken]
    assert len(set(values)) == len(values), "one entry was handed out twice"


# -- 5. capacity ----------------------------------------------------------------------


def a_full_buffer_raises_if_told_to(open_: Open) -> None:
    """`BufferFullError`, and the buffer goes on."""
    ends = open_(policy="raise")
    number = _fill(ends.put)
    assert ends.take.drop_select(key(0)) is not None, "a full buffer lost its oldest entry"
    _eventually(lambda: _inserted(ends.put, number), "room was freed and not used")


def a_full_buffer_evicts_the_oldest_if_told_to(open_: Open) -> None:
    """The newest entries survive."""
    ends = open_(policy="evict")
    for number in range(12):
        ends.put.insert(key(number), [_quarter(number)])
    assert ends.take.drop_select(key(0)) is None, "the oldest entry was kept beyond the capacity"
    _same([_quarter(11)], ends.take.drop_select(key(11)))


def a_full_buffer_waits_for_takers_if_told_to(open_: Open) -> None:
    """An insert waits until a taker has made room."""
    ends = open_(policy="wait")
    number, waiting = _fill_and_wait(ends.put)
    _eventually(lambda: ends.take.drop_select(key(0)) is not None, "the oldest entry is not there")
    waiting.result(LIMIT_S)
    _same([_quarter(number)], ends.take.drop_select(key(number)))


def waiting_for_room_has_an_end(open_: Open) -> None:
    """Nobody takes: `BufferFullError` after ``wait_s``."""
    ends = open_(policy="wait", wait_s=0.2)
    spawn(lambda: _fill(ends.put)).result(LIMIT_S)


def what_never_fits_is_refused_at_once(open_: Open) -> None:
    """An entry larger than the buffer raises under every policy, and evicts nothing."""
    for policy in ("wait", "raise", "evict"):
        ends = open_(policy=policy)
        ends.put.insert(key(1), [tensor(1)])
        error = _error(lambda ends=ends: ends.put.insert(key(2), [tensor(2, 2 * ROOM_BYTES)]))  # type: ignore[misc]
        assert isinstance(error, BufferFullError), f"{policy}: an entry larger than the buffer gave {error!r}"
        assert ends.take.drop_select(key(1)) is not None, f"{policy}: an entry that never fits evicted another"


# -- 6. expiry ------------------------------------------------------------------------


def entries_expire(open_: Open) -> None:
    """`BufferTraits.expires`: an entry that nobody takes goes."""
    ends = open_(ttl_s=TTL_S)
    ends.put.insert(key(1), [tensor(1)])
    threading.Event().wait(1.7 * TTL_S)
    assert ends.take.drop_select(key(1)) is None, "an entry outlived its time"


def what_has_expired_makes_room(open_: Open) -> None:
    """An insert that waits gets the room of an entry whose time is over."""
    _, waiting = _fill_and_wait(open_(policy="wait", ttl_s=TTL_S).put)
    waiting.result(LIMIT_S)


def a_live_grant_keeps_its_entry(open_: Open) -> None:
    """A claim outlives the entry's time."""
    ends = open_(ttl_s=TTL_S)
    ends.put.insert(key(1), [tensor(1)])
    grant = _claim(ends.take, key(1), "a")
    threading.Event().wait(1.7 * TTL_S)
    _same([tensor(1)], grant.tensors())
    grant.release()


# -- 7. fidelity ----------------------------------------------------------------------


def shapes_dtypes_and_values_survive(open_: Open) -> None:
    """Zero-size, zero-dim, strided, half-precision: all come out as they went in."""
    ends = open_()
    samples = [sample for sample in fidelity_samples() if sample.nbytes < ROOM_BYTES // 4]
    ends.put.insert(key(1), samples)
    _same(samples, ends.take.drop_select(key(1)))
    ends.put.insert(key(2), [])
    _same([], ends.take.drop_select(key(2)))


# -- 8. end ---------------------------------------------------------------------------


def close_wakes_who_waits_for_room(open_: Open) -> None:
    """`ClosedError` for the waiting insert."""
    ends = open_(policy="wait")
    _, waiting = _fill_and_wait(ends.put)
    ends.put.close()
    error = waiting.exception(LIMIT_S)
    assert isinstance(error, ClosedError), f"an insert that waited for room got {error!r}"


def after_close_everything_says_so(open_: Open) -> None:
    """`ClosedError` from then on; closing again does nothing."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    ends.take.close()
    ends.take.close()
    calls: list[Callable[[], object]] = [
        lambda: ends.take.insert(key(2), [tensor(2)]),
        lambda: ends.take.drop_select(key(1)),
        lambda: ends.take.claim(key(1), "a"),
        lambda: ends.take.match([key(1)]),
    ]
    for number, call in enumerate(calls):
        error = _error(call)
        assert isinstance(error, ClosedError), f"call {number} after close gave {error!r}"


# -- 9. failure -----------------------------------------------------------------------


def an_abandoned_entry_is_offered_again_whole(open_: Open) -> None:
    """Reading and giving back leaves the entry as it was."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1), tensor(2)])
    grant = _claim(ends.take, key(1), "a")
    grant.tensors()
    grant.abandon()
    grant.abandon()
    _same([tensor(1), tensor(2)], _eventually(lambda: ends.take.drop_select(key(1)), "an abandoned entry is lost"))


def a_grant_ends_once(open_: Open) -> None:
    """After the release, `abandon` does not bring the entry back."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    grant = _claim(ends.take, key(1), "a")
    grant.tensors()
    grant.release()
    grant.abandon()
    grant.release()
    assert ends.take.drop_select(key(1)) is None, "a released entry came back"


def an_entry_that_is_gone_is_reported_never_halved(open_: Open) -> None:
    """The owner closes while a taker reads: all of it, or an error."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1), tensor(2)])
    grant = _claim(ends.take, key(1), "a")
    ends.put.close()
    got: list[list[Tensor]] = []
    error = _error(lambda: got.append(grant.tensors()))
    if error is None:
        _same([tensor(1), tensor(2)], got[0])
    else:
        assert isinstance(error, (LoadError, ClosedError)), f"reading an entry that is gone gave {error!r}"
        error = _error(grant.release)
        assert isinstance(error, (LoadError, ClosedError)), f"releasing an entry that is gone gave {error!r}"


# -- what a buffer says that it cannot do ---------------------------------------------


def what_is_not_bounded_holds_everything(open_: Open) -> None:
    """Not `BufferTraits.bounded`: nothing is refused or evicted."""
    ends = open_(policy="raise")
    for number in range(6):
        error = _error(lambda number=number: ends.put.insert(key(number), [_quarter(number)]))  # type: ignore[misc]
        assert error is None, f"it declares no bound and raises {error!r}"
    for number in range(6):
        assert ends.take.drop_select(key(number)) is not None, "it declares no bound and lost an entry"


def what_does_not_expire_stays(open_: Open) -> None:
    """Not `BufferTraits.expires`: an entry is there after its time."""
    ends = open_(ttl_s=TTL_S)
    ends.put.insert(key(1), [tensor(1)])
    threading.Event().wait(1.7 * TTL_S)
    assert ends.take.drop_select(key(1)) is not None, "it declares that entries do not expire, and they do"


def what_cannot_be_joined_is_claimed_once(open_: Open) -> None:
    """Not `BufferTraits.joins`: a second claim of the same taker finds nothing."""
    ends = open_()
    ends.put.insert(key(1), [tensor(1)])
    _claim(ends.take, key(1), "a").tensors()
    assert ends.take.claim(key(1), "a") is None, "it declares that takers cannot join, and they can"


LAWS: tuple[Law, ...] = (
    an_entry_is_taken_once,
    racing_takers_share_nothing,
    a_claimed_entry_is_nobody_elses,
    a_taker_may_claim_its_entry_again,
    a_miss_is_a_value,
    matching_takes_nothing,
    tensors_are_the_callers_again_after_an_insert,
    what_a_grant_reads_is_the_takers_own,
    inserting_a_key_again_replaces_the_entry,
    a_taker_sees_one_entry_or_the_other_whole,
    a_full_buffer_raises_if_told_to,
    a_full_buffer_evicts_the_oldest_if_told_to,
    a_full_buffer_waits_for_takers_if_told_to,
    waiting_for_room_has_an_end,
    what_never_fits_is_refused_at_once,
    entries_expire,
    what_has_expired_makes_room,
    a_live_grant_keeps_its_entry,
    shapes_dtypes_and_values_survive,
    close_wakes_who_waits_for_room,
    after_close_everything_says_so,
    an_abandoned_entry_is_offered_again_whole,
    a_grant_ends_once,
    an_entry_that_is_gone_is_reported_never_halved,
)

#: The traits that a law is about: it holds for buffers that declare them.
NEEDS: dict[Law, frozenset[str]] = {
    a_taker_may_claim_its_entry_again: frozenset({"joins"}),
    a_full_buffer_raises_if_told_to: frozenset({"bounded"}),
    a_full_buffer_evicts_the_oldest_if_told_to: frozenset({"bounded"}),
    a_full_buffer_waits_for_takers_if_told_to: frozenset({"bounded"}),
    waiting_for_room_has_an_end: frozenset({"bounded"}),
    what_never_fits_is_refused_at_once: frozenset({"bounded"}),
    close_wakes_who_waits_for_room: frozenset({"bounded"}),
    entries_expire: frozenset({"expires"}),
    what_has_expired_makes_room: frozenset({"bounded", "expires"}),
}
#: And what holds for those that do not declare one: a trait that is there must be declared.
ABSENT: dict[str, Law] = {
    "bounded": what_is_not_bounded_holds_everything,
    "expires": what_does_not_expire_stays,
    "joins": what_cannot_be_joined_is_claimed_once,
}


def lacks(law: Law, traits: BufferTraits) -> list[str]:
    """Return the traits that ``law`` is about and ``traits`` do not declare."""
    return sorted(name for name in NEEDS.get(law, ()) if not getattr(traits, name))


# -- tools ----------------------------------------------------------------------------


def _quarter(number: int) -> Tensor:
    """Return content of which three fit the table and five do not, whatever is added to each."""
    return tensor(number, ROOM_BYTES // 4)


def _fill(buffer: LookupBuffer) -> int:
    """Insert until the buffer says that it is full; return how many fitted."""
    for number in range(6):
        error = _error(lambda number=number: buffer.insert(key(number), [_quarter(number)]))  # type: ignore[misc]
        if error is not None:
            assert isinstance(error, BufferFullError), f"a full buffer gave {error!r}"
            assert number >= 3, f"only {number} quarters fit"
            return number
    raise AssertionError("six quarters fit: there is no capacity")


def _fill_and_wait(buffer: LookupBuffer) -> tuple[int, Future[None]]:
    """Insert until an insert waits; return its number and outcome."""
    for number in range(6):
        call = spawn(lambda number=number: buffer.insert(key(number), [_quarter(number)]))  # type: ignore[misc]
        try:
            call.result(0.4)
        except TimeoutError:
            return number, call
    raise AssertionError("six quarters fit: there is no capacity")


def _inserted(buffer: LookupBuffer, number: int) -> bool:
    return _error(lambda: buffer.insert(key(number), [_quarter(number)])) is None


def _claim(buffer: LookupBuffer, wanted: LookupKey, taker: str) -> Grant:
    grant = buffer.claim(wanted, taker)
    assert grant is not None, f"taker {taker} could not claim an entry that is there"
    return grant


def _all(calls: Sequence[Future[list[Tensor] | None]]) -> list[list[Tensor] | None]:
    return [call.result(LIMIT_S) for call in calls]


def _eventually(call: Callable[[], T], complaint: str) -> T:
    """Wait for a true answer: what one end is told reaches the other a little later."""
    deadline = time.monotonic() + 5.0
    while not (answer := call()):
        assert time.monotonic() < deadline, complaint
        threading.Event().wait(0.01)
    return answer


def _error(call: Callable[[], object]) -> KVConnectError | None:
    try:
        call()
    except KVConnectError as error:
        return error
    return None


def _same(expected: Sequence[Tensor], got: Sequence[Tensor] | None) -> None:
    assert got is not None, "an entry that is there was not found"
    assert len(got) == len(expected), f"{len(expected)} tensors went in, {len(got)} came out"
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape, f"shape {tuple(a.shape)} became {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{a.dtype} became {b.dtype}"
        assert torch.equal(_bytes(a), _bytes(b)), f"values of a {a.dtype} tensor changed"


def _bytes(value: Tensor) -> Tensor:
    return value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
