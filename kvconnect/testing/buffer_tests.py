"""The laws of the `LookupBuffer` contract as pytest tests: subclass `BufferTests` for a buffer of your own.

class TestMyBuffer(BufferTests):
    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = MyBuffer(capacity_bytes=ROOM_BYTES, policy=policy, ttl_s=ttl_s, wait_s=wait_s)
        return Ends(put=buffer, take=buffer)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from kvconnect.testing import shared_laws
from kvconnect.testing.buffer_laws import ABSENT, LAWS, Ends, Law, Open, lacks
from kvconnect.testing.peers import LIMIT_S


class BufferTests:
    """Every law over the table that `open_ends` opens, less those about traits that the class does not declare."""

    def open_ends(self, *, policy: str, ttl_s: float, wait_s: float) -> Ends:
        """Open a table of `kvconnect.testing.buffer_laws.ROOM_BYTES` bytes."""
        raise NotImplementedError

    def shared_options(self) -> Mapping[str, Any]:
        """Name a fresh table: keyword arguments with which each process opens it. For `BufferTraits.shared`."""
        return {}

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
        buffer = type(open_().take)
        if missing := lacks(law, buffer.traits):
            pytest.skip(f"{buffer.__name__}.traits do not declare {' and '.join(missing)}")
        law(open_)

    @pytest.mark.parametrize("trait", ABSENT)
    def test_a_trait_that_is_not_declared_is_absent(self, open_: Open, trait: str) -> None:
        """What works must be declared, or its laws would be skipped for no reason."""
        buffer = type(open_().take)
        if getattr(buffer.traits, trait):
            pytest.skip(f"{buffer.__name__}.traits declare {trait}")
        ABSENT[trait](open_)

    @pytest.mark.parametrize("law", shared_laws.LAWS, ids=[law.__name__ for law in shared_laws.LAWS])
    def test_shared_law(self, open_: Open, law: shared_laws.Law) -> None:
        """One law between processes."""
        buffer = type(open_().take)
        if not buffer.traits.shared:
            pytest.skip(f"{buffer.__name__}.traits do not declare shared")
        law(buffer, self.shared_options())

    def test_a_table_that_is_not_declared_to_be_shared_is_not(self, open_: Open) -> None:
        """Likewise between processes."""
        buffer = type(open_().take)
        if buffer.traits.shared:
            pytest.skip(f"{buffer.__name__}.traits declare shared")
        shared_laws.what_is_not_shared_stays_in_its_process(buffer, self.shared_options())
