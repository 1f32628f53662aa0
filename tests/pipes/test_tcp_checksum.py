"""Somebody between the two ends of a TCP pipe flips a byte: it is found, or without checksums goes through."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.errors import BrokenError, ConfigError, IntegrityError, KVConnectError
from kvconnect.paging import PagedMemory
from kvconnect.pipes import tcp_checksum, tcp_messages, tcp_requests
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.tcp import TcpPipe
from kvconnect.pipes.tcp_checksum import SEAL_BYTES
from kvconnect.pipes.tcp_frames import FRAME_BYTES, pack_ids
from kvconnect.pipes.wire import HEADER_BYTES
from kvconnect.testing.channels import memory_channels
from kvconnect.testing.layouts import clone, naive_stream, noisy_memory, separate_layers
from kvconnect.testing.peers import spawn

LIMIT_S = 10.0
CHUNK = 4096
TENSORS, BLOCKS = 0, 1


class Between:
    """A man in the middle, and the two ends that he stands between."""

    def __init__(self, asks: Mapping[str, Any], serves: Mapping[str, Any]) -> None:
        self._open = ExitStack()
        self._server = self._open.enter_context(socket.create_server(("127.0.0.1", 0)))
        #: Bytes that passed and offset to flip, for each connection and direction (towards the serving end or back).
        self._passed: dict[tuple[int, bool], int] = {}
        self._flips: dict[tuple[int, bool], int] = {}
        self.offer: dict[str, Any] = {}
        wish = {"tcp": 2, "checksum": asks.get("checksum", True)}
        self.there = TcpPipe.open(
            PipeSpec("serves", lambda mine: self.offer.update(mine) or wish, timeout_s=LIMIT_S, options=serves)
        )
        self._open.callback(self.there.abort)
        threading.Thread(target=self._accept, daemon=True).start()
        seen = self.offer | {"port": self._server.getsockname()[1]}
        self.here = TcpPipe.open(PipeSpec("asks", lambda _: seen, timeout_s=LIMIT_S, options=asks))
        self._open.callback(self.here.abort)
        self.here.send_tensor(None)
        assert self.there.recv_tensor() is None
        self.memories = [noisy_memory(separate_layers(2, 8, 2, 4096), seed) for seed in (1, 2)]

    def attach(self) -> tuple[PagedMemory, PagedMemory]:
        for pipe, local in zip((self.here, self.there), self.memories, strict=True):
            pipe.attach(local, local.layout, memory_channels()[0])
        self.here.read_blocks([[0]], [[0]]).wait(LIMIT_S)
        return self.memories[0], self.memories[1]

    def flip(self, connection: int, skip: int, *, towards: bool) -> None:
        """Flip the byte that comes ``skip`` bytes after all that has passed."""
        self._flips[connection, towards] = self._passed[connection, towards] + skip

    def _accept(self) -> None:
        for connection in (TENSORS, BLOCKS):
            try:
                near = self._server.accept()[0]
            except OSError:
                return
            far = socket.create_connection((self.offer["host"], self.offer["port"]), LIMIT_S)
            far.settimeout(None)
            self._passed |= {(connection, True): 0, (connection, False): 0}
            for towards, of, to in ((True, near, far), (False, far, near)):
                self._open.callback(to.close)
                threading.Thread(target=self._carry, args=((connection, towards), of, to), daemon=True).start()

    def _carry(self, way: tuple[int, bool], of: socket.socket, to: socket.socket) -> None:
        try:
            while part := bytearray(of.recv(65536)):
                at = self._flips.get(way, -1) - self._passed[way]
                if 0 <= at < len(part):
                    part[at] ^= 0x10
                    del self._flips[way]
                self._passed[way] += len(part)
                to.sendall(part)
            to.shutdown(socket.SHUT_WR)
        except OSError:
            with suppress(OSError):  # the other way did so
                of.shutdown(socket.SHUT_WR)
                # A sender whose window is full would not hear of the end: nothing of it arrives any more.
                while of.recv(65536):
                    pass

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def between() -> Iterator[Callable[..., Between]]:
    with ExitStack() as made:

        def make(asks: bool = True, serves: bool = True) -> Between:
            one = Between(*({"checksum": checksum, "chunk_bytes": CHUNK} for checksum in (asks, serves)))
            made.callback(one.close)
            return one

        yield make


def seal_bytes(checksum: bool) -> int:
    return SEAL_BYTES if checksum else 0


# -- tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [False, True], ids=["recv_tensor", "recv_tensor_into"])
@pytest.mark.parametrize(("nbytes", "at"), [(1, 0), (4096, 4095), (3 << 20, 17), (3 << 20, (3 << 20) - 40)])
def test_a_flipped_byte_of_a_tensor_is_found(between: Callable[..., Between], nbytes: int, at: int, into: bool) -> None:
    sent = torch.from_numpy(np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8))
    out = torch.zeros_like(sent)

    def receive(pipe: TcpPipe) -> torch.Tensor | None:
        if not into:
            return pipe.recv_tensor()
        pipe.recv_tensor_into(out)
        return out

    unchecked = between(False, False)
    unchecked.flip(TENSORS, HEADER_BYTES + at, towards=True)
    sending = spawn(lambda: unchecked.here.send_tensor(sent))
    got = receive(unchecked.there)
    sending.result(LIMIT_S)
    assert got is not None
    assert (got != sent).nonzero().tolist() == [[at]]

    checked = between()
    checked.flip(TENSORS, HEADER_BYTES + SEAL_BYTES + at, towards=True)
    sending = spawn(lambda: checked.here.send_tensor(sent))
    with pytest.raises(IntegrityError, match="damaged"):
        receive(checked.there)
    sending.exception(LIMIT_S)
    with pytest.raises(BrokenError, match="damaged"):
        checked.there.recv_tensor()
    with pytest.raises(BrokenError):  # a message is lost, so both ends are dead
        checked.here.recv_tensor()


@pytest.mark.parametrize("at", [0, 2, 3, 4, 8, 16, 60, HEADER_BYTES, HEADER_BYTES + 8, HEADER_BYTES + 15])
def test_a_flipped_byte_of_a_header_is_found_before_its_numbers_are_used(
    between: Callable[..., Between], at: int
) -> None:
    one = between()
    one.flip(TENSORS, at, towards=False)
    one.there.send_tensor(torch.zeros(7, 9, dtype=torch.float16))
    with pytest.raises(IntegrityError):
        one.here.recv_tensor()


def test_a_flipped_size_of_a_seventh_dimension_is_found(between: Callable[..., Between]) -> None:
    for shape in ((1, 1, 1, 1, 1, 1, 16, 4), (1, 1, 1, 1, 1, 1, 16, 0)):
        one = between()
        one.flip(TENSORS, HEADER_BYTES + SEAL_BYTES + 8, towards=True)
        one.here.send_tensor(torch.zeros(shape))
        with pytest.raises((IntegrityError, BrokenError)):
            one.there.recv_tensor()


def test_a_message_without_a_tensor_does_not_become_another(between: Callable[..., Between]) -> None:
    one = between()
    one.flip(TENSORS, 2, towards=True)
    one.here.send_tensor(None)
    with pytest.raises(IntegrityError):
        one.there.recv_tensor()


@pytest.mark.parametrize(("asks", "serves"), [(True, False), (False, True)])
def test_either_end_gets_the_checksums_that_it_wants(between: Callable[..., Between], asks: bool, serves: bool) -> None:
    one = between(asks, serves)
    one.attach()
    for sender, receiver in ((one.here, one.there), (one.there, one.here)):
        sender.send_tensor(torch.arange(1000))
        assert torch.equal(receiver.recv_tensor(), torch.arange(1000))
    one.flip(TENSORS, HEADER_BYTES + SEAL_BYTES, towards=asks)
    sender, receiver = (one.here, one.there) if asks else (one.there, one.here)
    sender.send_tensor(torch.arange(1000))
    with pytest.raises(IntegrityError):
        receiver.recv_tensor()
    one.flip(BLOCKS, _first_data(True), towards=False)
    with pytest.raises(IntegrityError):
        one.here.read_blocks([[5]], [[1]]).wait(LIMIT_S)


def test_an_option_that_is_neither_true_nor_false_is_named() -> None:
    with pytest.raises(ConfigError, match="checksum"):
        TcpPipe.open(PipeSpec("asks", lambda _: {}, options={"checksum": "yes"}))


@settings(deadline=None, max_examples=20)
@given(nbytes=st.integers(0, 5000), dims=st.sampled_from([1, 7, 9]))
def test_chunks_of_every_size_arrive_whole(nbytes: int, dims: int) -> None:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(tcp_messages, "CHUNK_BYTES", 1024)
        one = Between({}, {})
        stack.callback(one.close)
        sent = torch.arange(nbytes).to(torch.uint8).reshape((1,) * (dims - 1) + (nbytes,))
        one.here.send_tensor(sent)
        assert torch.equal(one.there.recv_tensor(), sent)


# -- blocks ---------------------------------------------------------------------------------

ALL = list(range(8))


def _first_data(checksum: bool) -> int:
    return FRAME_BYTES + seal_bytes(checksum)


@pytest.mark.parametrize("chunk", [0, 3, -1], ids=["first", "middle", "last"])
def test_a_flipped_byte_of_a_read_fails_that_transfer_only(between: Callable[..., Between], chunk: int) -> None:
    for checksum in (False, True):
        one = between(checksum, checksum)
        mine, theirs = one.attach()
        before = naive_stream(theirs, [[5, 6]])
        number = chunk % (len(before) // CHUNK)
        one.flip(BLOCKS, number * (CHUNK + _first_data(checksum)) + _first_data(checksum) + 9, towards=False)
        transfer = one.here.read_blocks([[5, 6]], [[1, 2]])
        if not checksum:
            transfer.wait(LIMIT_S)
            assert (naive_stream(mine, [[1, 2]]) != before).nonzero().tolist() == [[number * CHUNK + 9]]
            continue
        with pytest.raises(IntegrityError, match="damaged"):
            transfer.wait(LIMIT_S)
        _both_ways_work(one)


@pytest.mark.parametrize("chunk", [0, 3, -1], ids=["first", "middle", "last"])
def test_a_flipped_byte_of_a_write_fails_that_transfer_only(between: Callable[..., Between], chunk: int) -> None:
    for checksum in (False, True):
        one = between(checksum, checksum)
        mine, theirs = one.attach()
        source = naive_stream(mine, [[5, 6]])
        number = chunk % (len(source) // CHUNK)
        request = _first_data(checksum) + len(pack_ids([[1, 2]]))
        one.flip(BLOCKS, request + number * (CHUNK + _first_data(checksum)) + _first_data(checksum) + 9, towards=True)
        transfer = one.here.write_blocks([[5, 6]], [[1, 2]])
        if not checksum:
            transfer.wait(LIMIT_S)
            assert (naive_stream(theirs, [[1, 2]]) != source).nonzero().tolist() == [[number * CHUNK + 9]]
            continue
        with pytest.raises(IntegrityError, match="damaged"):
            transfer.wait(LIMIT_S)
        _both_ways_work(one)


def test_other_transfers_go_on_beside_one_that_is_damaged(between: Callable[..., Between]) -> None:
    one = between()
    mine, theirs = one.attach()
    wanted = naive_stream(theirs, [[4, 5, 6, 7]])
    one.flip(BLOCKS, 3 * (CHUNK + _first_data(True)) + _first_data(True), towards=False)
    transfers = [one.here.read_blocks([[4 + i]], [[4 + i]]) for i in range(4)]
    errors = []
    for i, transfer in enumerate(transfers):
        try:
            transfer.wait(LIMIT_S)
        except IntegrityError as error:
            errors.append(error)
        else:
            assert torch.equal(naive_stream(mine, [[4 + i]]), naive_stream(theirs, [[4 + i]]))
    assert len(errors) == 1
    one.here.read_blocks([[4, 5, 6, 7]], [[4, 5, 6, 7]]).wait(LIMIT_S)
    assert torch.equal(naive_stream(mine, [[4, 5, 6, 7]]), wanted)


def test_a_flipped_block_id_of_a_read_fails_that_transfer_only(between: Callable[..., Between]) -> None:
    for checksum in (False, True):
        one = between(checksum, checksum)
        one.attach()
        # The low byte of the id: 0x05 ^ 0x10 is out of range, and is refused without checksums, too.
        one.flip(BLOCKS, _first_data(checksum) + 8, towards=True)
        transfer = one.here.read_blocks([[5]], [[1]])
        with pytest.raises(IntegrityError if checksum else KVConnectError, match="damaged" if checksum else "outside"):
            transfer.wait(LIMIT_S)
        _both_ways_work(one)


@pytest.mark.parametrize("blocks", [1, 7])
def test_a_flipped_block_id_of_a_write_fails_that_transfer_only_and_reaches_no_memory(
    between: Callable[..., Between], blocks: int
) -> None:
    one = between()
    _, theirs = one.attach()
    before = clone(theirs)
    one.flip(BLOCKS, _first_data(True) + 8, towards=True)
    with pytest.raises(IntegrityError, match="damaged"):
        one.here.write_blocks([ALL[:blocks]], [ALL[1 : blocks + 1]]).wait(LIMIT_S)
    assert torch.equal(naive_stream(theirs, [ALL[1:]]), naive_stream(before, [ALL[1:]]))
    _both_ways_work(one)


@pytest.mark.parametrize("at", [0, 2, 3, 4, 8, 16, 24, 32, 39])
def test_a_flipped_byte_of_a_frames_header_ends_the_blocks_before_it_is_used(
    between: Callable[..., Between], at: int
) -> None:
    one = between()
    mine, _ = one.attach()
    before = clone(mine)
    one.flip(BLOCKS, at, towards=False)
    with pytest.raises(IntegrityError, match="header"):
        one.here.read_blocks([[5]], [[1]]).wait(LIMIT_S)
    assert torch.equal(naive_stream(mine, [ALL]), naive_stream(before, [ALL]))
    with pytest.raises(BrokenError, match="header"):  # the wire is what failed, so a new one is needed
        one.here.read_blocks([[5]], [[1]])
    one.here.send_tensor(torch.ones(3))
    assert torch.equal(one.there.recv_tensor(), torch.ones(3))


def test_a_flipped_byte_of_an_answer_fails_the_transfer_that_it_answers(between: Callable[..., Between]) -> None:
    one = between()
    one.attach()
    one.flip(BLOCKS, 4, towards=False)
    with pytest.raises(IntegrityError):
        one.here.write_blocks([[5]], [[1]]).wait(LIMIT_S)


def test_a_wire_that_damages_again_and_again_is_given_up(
    between: Callable[..., Between], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_requests, "MAX_DAMAGES", 2)
    one = between()
    one.attach()
    for _ in range(3):
        one.flip(BLOCKS, _first_data(True), towards=False)
        with pytest.raises(IntegrityError):
            one.here.read_blocks([[5]], [[1]]).wait(LIMIT_S)
        if one.here._blocks._error is None:
            _quiet(one)
    with pytest.raises(BrokenError):
        one.here.read_blocks([[5]], [[1]])


def _quiet(one: Between) -> None:
    """Wait until what a failed transfer left behind has passed."""
    done = one.there.read_blocks([[0]], [[0]])
    done.wait(LIMIT_S)
    one.here.write_blocks([[0]], [[0]]).wait(LIMIT_S)


def _both_ways_work(one: Between) -> None:
    mine, theirs = one.memories
    for reader, local, remote in ((one.here, mine, theirs), (one.there, theirs, mine)):
        reader.read_blocks([[7, 3]], [[1, 2]]).wait(LIMIT_S)
        assert torch.equal(naive_stream(local, [[1, 2]]), naive_stream(remote, [[7, 3]]))
        reader.write_blocks([[7, 3]], [[1, 2]]).wait(LIMIT_S)
        assert torch.equal(naive_stream(remote, [[1, 2]]), naive_stream(local, [[7, 3]]))
    for pipe in (one.here, one.there):
        requests = pipe._blocks._requests
        assert [requests._reading, requests._writing, requests._served, requests._written] == [{}] * 4


# -- sums -----------------------------------------------------------------------------------


def test_a_sum_is_that_of_the_stream_however_it_is_cut() -> None:
    data = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8)
    address = data.ctypes.data
    cuts = [(0, 1), (1, 0), (1, 99_999), (100_000, 200_000)]
    iov = np.array([(address + start, count) for start, count in cuts], dtype=np.uint64)
    assert tcp_checksum.of_pieces(iov) == tcp_checksum.of(data.tobytes())
    assert tcp_checksum.of_pieces(iov[:0]) == tcp_checksum.of(b"")


def test_a_sum_is_xxh3_so_that_releases_understand_each_other() -> None:
    assert tcp_checksum.of(b"kvconnect") == tcp_checksum.of(b"kv", b"connect")
    assert tcp_checksum.of(b"") == 0x2D06800538D394C2
