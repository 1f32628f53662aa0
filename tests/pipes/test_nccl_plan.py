"""The order of chunks: pure logic."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.errors import HandshakeError
from kvconnect.pipes.flows import Kind, pack
from kvconnect.pipes.nccl_plan import FIRST_BYTES, Plan, cut, read_row, read_selection, slot_bytes
from kvconnect.testing.layouts import separate_layers

MB = 1 << 20
KEY = (Kind.READ, 1)


def test_chunks_begin_small_and_double_up_to_a_slot():
    chunks = list(cut(KEY, [128], [2 * MB], 24 * MB))
    assert [chunk.nbytes // MB for chunk in chunks] == [8, 16, *[24] * 9, 16]
    assert chunks[0].nbytes == FIRST_BYTES


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5) | st.integers(1, 40).map(lambda n: n * MB)), max_size=4),
    st.integers(1, 64).map(lambda n: n * MB),
)
def test_every_block_is_in_one_chunk_and_no_chunk_in_two_groups(groups, slot):
    counts, sizes = [count for count, _ in groups], [size for _, size in groups]
    slot = max(slot, *sizes, 1) if sizes else slot
    seen = [0] * len(groups)
    for chunk in cut(KEY, counts, sizes, slot):
        assert chunk.start == seen[chunk.group]
        assert chunk.nbytes == chunk.count * sizes[chunk.group] <= slot
        seen[chunk.group] += chunk.count
    assert seen == [count if size else 0 for count, size in groups]


def test_a_small_transfer_waits_for_one_chunk_of_a_large_one():
    plan = Plan()
    plan.add(cut((Kind.READ, 1), [1000], [2 * MB], 24 * MB))
    first = plan.next()
    plan.add(cut((Kind.READ, 2), [1], [2 * MB], 24 * MB))
    assert first is not None
    assert [chunk.key[1] for chunk in (plan.next(), plan.next(), plan.next()) if chunk] == [1, 2, 1]
    assert (Kind.READ, 2) not in plan


def test_what_is_dropped_is_not_planned_any_more():
    plan = Plan()
    for number in (1, 2):
        plan.add(cut((Kind.READ, number), [8], [2 * MB], 4 * MB))
    assert plan.drop((Kind.READ, 1))
    assert not plan.drop((Kind.READ, 1))
    assert {chunk.key[1] for chunk in iter(plan.next, None)} == {2}
    assert not plan


def test_a_chunk_survives_the_way_to_the_other_end():
    chunk = next(cut((Kind.WRITE, 7), [0, 5], [2 * MB, MB], 4 * MB))
    row = msgpack.unpackb(msgpack.packb(chunk.row()))
    assert read_row(row) == ((Kind.WRITE, 7), 1, 0, 4)


@pytest.mark.parametrize("row", [None, [], [0, 1, 0, 0], [0, 1, 0, -1, 1], [2, 1, 0, 0, 1], [0, 1, 0, 0, 0], ["0"] * 5])
def test_a_chunk_that_makes_no_sense_is_refused(row):
    with pytest.raises(HandshakeError, match="malformed"):
        read_row(row)


def test_a_slot_holds_a_block_and_is_no_larger_than_either_end_wishes():
    layout = separate_layers(2, 8, 2, 100)
    assert layout.block_bytes == (400,)
    assert slot_bytes(layout, 5000, 3000) == 3000
    assert slot_bytes(layout, 100, 3000) == 400


def request(ids, nbytes, number=7):
    return msgpack.unpackb(msgpack.packb({"number": number, "groups": pack(ids), "nbytes": nbytes}))


def test_what_a_peer_selects_is_checked_against_this_memory():
    layout = separate_layers(2, 8, 2, 100)
    assert read_selection(layout, request([[5, 0, 7]], 1200)) == (7, [[5, 0, 7]])
    for ids, nbytes, message in [
        ([[8]], 400, "block 8 of group 0"),
        ([[1] * 9], 3600, "9 blocks of group 0 asked for, this memory has 8"),
        ([[1], [1]], 400, "2 block groups"),
        ([[1, 2]], 400, "800 bytes here, 400 at the other end"),
        ([[]], 0, "0 bytes here"),
    ]:
        with pytest.raises(HandshakeError, match=message):
            read_selection(layout, request(ids, nbytes))
    for body in (None, {"number": 1}, request([[1]], 400, number=-1), request([[1]], None)):
        with pytest.raises(HandshakeError):
            read_selection(layout, body)
