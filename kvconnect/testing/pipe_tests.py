"""The laws of the `Pipe` contract as pytest tests: subclass `PipeTests` for a pipe of your own.

    class TestMyPipe(PipeTests):
        pipe_class = MyPipe
        options = {"port": 0}

Skips follow from the class's declared `kvconnect.pipes.base.Traits` and from
`Pipe.availability`, and from nothing else. This is the only module of
`kvconnect.testing` for pipes that needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from kvconnect.pipes.base import Pipe
from kvconnect.testing import block_laws, pipe_laws
from kvconnect.testing.peers import PipePair, open_pair

Law = Callable[[PipePair], None]


def _named(laws: tuple[Law, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("law", laws, ids=[law.__name__ for law in laws])


class PipeTests:
    """Every law over ``pipe_class``."""

    pipe_class: ClassVar[type[Pipe]]
    options: ClassVar[Mapping[str, Any]] = {}
    timeout_s: ClassVar[float] = 10.0
    #: How many pipes `test_many_pipes` opens at once (mind the limit of open files).
    many_pipes: ClassVar[int] = 64

    @pytest.fixture(autouse=True)
    def available(self) -> None:
        """Skip where the class says that it cannot run."""
        verdict = self.pipe_class.availability()
        if not verdict:
            pytest.skip(f"{self.pipe_class.name}: {verdict.reason}")

    @pytest.fixture
    def pair(self) -> Iterator[PipePair]:
        """Two open ends in this process."""
        pair = open_pair(self.pipe_class, self.options, self.timeout_s)
        yield pair
        pair.close()

    @_named(pipe_laws.LAWS)
    def test_tensor_law(self, pair: PipePair, law: Law) -> None:
        """One law of the tensor path."""
        law(pair)

    @_named(block_laws.LAWS)
    def test_block_law(self, pair: PipePair, law: Law) -> None:
        """One law of the block path."""
        law(pair)

    def test_many_pipes_are_served_by_a_fixed_set_of_threads(self) -> None:
        """The number of threads does not grow with the number of pipes."""
        block_laws.many_pipes_are_served_by_a_fixed_set_of_threads(self.pipe_class, self.options, self.many_pipes)
