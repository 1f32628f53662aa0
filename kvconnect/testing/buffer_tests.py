"""The laws of the `LookupBuffer` contract as pytest tests: subclass `BufferTests` for a buffer of your own.

class TestMyBuffer(BufferTests):
    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = MyBuffer(capacity_bytes=ROOM_BYTES, policy=policy, ttl_s=ttl_s, wait_s=wait_s)
        return Ends(put=buffer, take=buffer)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvconnect.testing.buffer_laws import LAWS, Ends, Law, Open
from kvconnect.testing.peers import LIMIT_S


class BufferTests:
    """Every law over the table that `open_ends` opens."""

    def open_ends(self, *, policy: str, ttl_s: float, wait_s: float) -> Ends:
        """Open a table of `kvconnect.testing.buffer_laws.ROOM_BYTES` bytes."""
        raise NotImplementedError

    @pytest.fixture
    def open_(self) -> Iterator[Open]:
        """Open tables, and close them afterwards."""
        opened: list[Ends] = []

        def open_one(*, policy: str = "wait", ttl_s: float = 600.0, wait_s: float = LIMIT_S) -> Ends:
            opened.append(self.open_ends(policy=policy, ttl_s=ttl_s, wait_s=wait_s))
            return opened[-1]

        yield open_one
        for ends in opened:
            ends.take.close()
            ends.put.close()

    @pytest.mark.parametrize("law", LAWS, ids=[law.__name__ for law in LAWS])
    def test_law(self, open_: Open, law: Law) -> None:
        """One law of the contract."""
        law(open_)
