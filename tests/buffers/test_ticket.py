import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.buffers.base import LookupKey
from kvconnect.buffers.ticket import Ticket, pack_ids, unpack_ids
from kvconnect.errors import HandshakeError

TICKET = Ticket("127.0.0.1:5", "P", "abc", "e1", 7, LookupKey("ns", b"\x01" * 16, 33), ((3, 4, 5), (), (9, 1)))
BLOCKS = st.lists(st.lists(st.integers(0, 1 << 30), max_size=50).map(tuple), max_size=4).map(tuple)


@settings(deadline=None)  # the machine may be busy
@given(BLOCKS, st.binary(min_size=1, max_size=32), st.integers(0, 1 << 30))
def test_a_ticket_survives_json(blocks, digest, length):
    ticket = Ticket("h:1", "P", "i", "e", 0, LookupKey("ns", digest, length), blocks)
    assert Ticket.from_wire(json.loads(json.dumps(ticket.to_wire()))) == ticket


def test_a_ticket_holds_strings_and_whole_numbers_only():
    for name, value in TICKET.to_wire().items():
        assert type(value) in (str, int, list), name
    assert all(type(item) is str for item in TICKET.to_wire()["blocks"])


def test_block_ids_that_follow_each_other_cost_a_byte_each():
    assert len(pack_ids(tuple(range(1000, 2000)))) < 1400


def test_unknown_fields_are_ignored():
    assert Ticket.from_wire({**TICKET.to_wire(), "later": 1}) == TICKET


@pytest.mark.parametrize("name", TICKET.to_wire())
def test_a_missing_field_is_named(name):
    data = TICKET.to_wire()
    del data[name]
    with pytest.raises(HandshakeError, match=f"'{name}'"):
        Ticket.from_wire(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("v", 2),
        ("v", True),
        ("at", 5),
        ("at", "x" * 5000),
        ("generation", -1),
        ("generation", 1.5),
        ("length", 1 << 50),
        ("digest", "zz"),
        ("blocks", "AA=="),
        ("blocks", ["!"]),
        ("blocks", ["é"]),
        ("blocks", [3]),
        ("blocks", ["gA=="]),  # a number that is cut off
        ("blocks", ["AQ=="]),  # block -1
        ("blocks", ["////////////////////"]),
        ("blocks", ["AA=="] * 1000),
    ],
)
def test_a_wrong_field_is_named(name, value):
    with pytest.raises(HandshakeError, match=f"'{name}'"):
        Ticket.from_wire({**TICKET.to_wire(), name: value})


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=60))
def test_no_bytes_make_reading_ids_fail_otherwise(data):
    import base64

    try:
        ids = unpack_ids(base64.b64encode(data).decode())
    except HandshakeError:
        return
    assert unpack_ids(pack_ids(ids)) == ids
