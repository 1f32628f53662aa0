"""The laws of the `Pipe` contract as pytest tests: subclass `PipeTests` for a pipe of your own.

    class TestMyPipe(PipeTests):
        pipe_class = MyPipe
        options = {"port": 0}

and `CudaPipeTests` for one that carries CUDA tensors.

Skips follow from the class's declared `kvconnect.pipes.base.Traits` and from
`Pipe.availability`, and from nothing else. This is the only module of
`kvconnect.testing` for pipes that needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from kvconnect.pipes.base import Pipe, Reach
from kvconnect.testing import block_laws, pipe_laws, process_laws, stream_laws
from kvconnect.testing.ends import End, LocalEnd
from kvconnect.testing.peers import PipePair, open_pair
from kvconnect.testing.processes import ProcessPeer

Law = Callable[[PipePair], None]


def _named(laws: Sequence[Callable[..., None]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("law", laws, ids=[law.__name__ for law in laws])


class PipeTests:
    """Every law over ``pipe_class``."""

    pipe_class: ClassVar[type[Pipe]]
    options: ClassVar[Mapping[str, Any]] = {}
    timeout_s: ClassVar[float] = 10.0
    #: Where the tensors and the paged memory of one end are, and of the other one if that is elsewhere.
    #: CUDA devices with their number.
    device: ClassVar[str] = "cpu"
    peer_device: ClassVar[str | None] = None
    #: Whether the peer process sees the CUDA devices in reverse order: other numbers, the same devices.
    renumber: ClassVar[bool] = True
    #: `Traits.one_sided` with these options, where they take another way than the class's usual one.
    one_sided: ClassVar[bool | None] = None
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
        pair = open_pair(self.pipe_class, self.options, self.timeout_s, self.device, self.peer_device)
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
        block_laws.many_pipes_are_served_by_a_fixed_set_of_threads(
            self.pipe_class, self.options, self.many_pipes, self.device, self.peer_device
        )

    @pytest.fixture(scope="class")
    @classmethod
    def peers(cls) -> Iterator[list[ProcessPeer]]:
        """The process with the other ends, shared by the laws until one kills it."""
        started: list[ProcessPeer] = []
        yield started
        for peer in started:
            peer.close()

    @pytest.fixture
    def peer(self, peers: list[ProcessPeer]) -> ProcessPeer:
        """A process with the other ends, alive."""
        if self.pipe_class.traits.reach is Reach.PROCESS:
            pytest.skip(f"{self.pipe_class.__name__}.traits declare that it stays within one process")
        return self._alive(peers)

    def _alive(self, peers: list[ProcessPeer]) -> ProcessPeer:
        if not peers or not peers[-1].alive:
            peers.append(self._start_peer())
        return peers[-1]

    def _start_peer(self) -> ProcessPeer:
        return ProcessPeer(self.pipe_class, self.options, self.device, self.peer_device, renumber=self.renumber)

    @_named(process_laws.LAWS)
    def test_process_law(self, peer: ProcessPeer, law: Callable[[ProcessPeer], None]) -> None:
        """One law between two processes."""
        law(peer)

    def test_reads_are_one_sided_exactly_if_declared(self, peer: ProcessPeer) -> None:
        """A trait that is declared works, and one that is not does not."""
        declared = self.pipe_class.traits.one_sided if self.one_sided is None else self.one_sided
        if declared is None:
            pytest.skip(f"{self.pipe_class.__name__}.traits leave it open")
        process_laws.reads_are_one_sided_exactly_if_declared(peer, declared=declared)

    def test_starts_of_transfers_are_immediate_if_declared(self, peer: ProcessPeer) -> None:
        """No law holds of pipes that do not declare it: nothing else is skipped for it."""
        if not self.pipe_class.traits.immediate:
            pytest.skip(f"{self.pipe_class.__name__}.traits do not declare immediate")
        process_laws.starts_of_transfers_are_immediate_if_declared(peer)

    def test_a_reach_that_is_not_declared_is_absent(self, peers: list[ProcessPeer]) -> None:
        """What works between processes must be declared, or its laws would be skipped for no reason."""
        if self.pipe_class.traits.reach is not Reach.PROCESS:
            pytest.skip(f"{self.pipe_class.__name__}.traits declare that it reaches other processes")
        process_laws.a_pipe_of_one_process_does_not_leave_it(self._alive(peers))


class CudaPipeTests(PipeTests):
    """The same on CUDA devices, and every law about streams."""

    device: ClassVar[str] = "cuda:0"

    @_named(stream_laws.LAWS)
    def test_stream_law(self, pair: PipePair, law: Callable[[End], None]) -> None:
        """One law about streams, between two ends in this process."""
        law(LocalEnd(pair))

    @_named(stream_laws.LAWS)
    def test_stream_law_between_processes(self, peer: ProcessPeer, law: Callable[[End], None]) -> None:
        """The same between two processes."""
        end = peer.open()
        try:
            law(end)
        finally:
            end.pipe.abort()
