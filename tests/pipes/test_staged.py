"""The tensor path of device pipes: the laws, over a medium that is a copy within this process."""

import ctypes
from typing import ClassVar

import pytest
import torch

from kvconnect.config import parse_backend
from kvconnect.errors import BrokenError, ClosedError, DeadlineError, TensorRejectedError
from kvconnect.pipes.base import Pipe, Reach, Traits
from kvconnect.pipes.companion import join
from kvconnect.pipes.staged import INLINE_BYTES, StagedTensors
from kvconnect.testing import pipe_laws
from kvconnect.testing.peers import LIMIT_S, open_pair, spawn

SLOT = 128 << 10


class _Heap:
    def __init__(self, nbytes):
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.address, self.card, self.freed = self.memory.data_ptr(), b"heap", []

    def free(self, *, read_until_s):
        self.freed.append(read_until_s)


class _Copies:
    """Fetches with memmove; remembers what was allocated and met."""

    device = "cpu"

    def __init__(self):
        self.areas, self.cards, self.ended = [], [], 0

    def allocate(self, nbytes):
        self.areas.append(_Heap(nbytes))
        return self.areas[-1]

    def stage(self, source, address):
        ctypes.memmove(address, source.data_ptr(), source.nbytes)

    def meet(self, card):
        self.cards.append(card)

    def fetch(self, address, out):
        ctypes.memmove(out.data_ptr(), address, out.nbytes)

    def end(self):
        self.ended += 1


class StagedPipe(Pipe):
    """What a device pipe is made of, without a device."""

    name = "staged"
    traits = Traits(reach=Reach.PROCESS)

    def __init__(self, spec):
        wanted = parse_backend("companion", spec.options.get("companion", "auto"))
        self.companion = join(spec, {}, wanted)
        self.medium = _Copies()
        self.tensors = StagedTensors(
            self.companion, self.medium, slots=4, slot_bytes=spec.options.get("slot", SLOT), timeout_s=spec.timeout_s
        )

    def send_tensor(self, tensor):
        self.tensors.send(tensor)

    def recv_tensor(self):
        return self.tensors.receive()

    def recv_tensor_into(self, out):
        self.tensors.receive_into(out)

    def close(self):
        self.tensors.close()

    def abort(self):
        self.tensors.abort()


class TestLaws:
    """Over each companion, with slots that a tensor of the laws fits in, and with smaller ones."""

    OPTIONS: ClassVar = {
        "shm": {"companion": "shm"},
        "tcp": {"companion": "tcp"},
        "large slots": {"slot": 4 << 20},
    }

    @pytest.fixture(params=sorted(OPTIONS))
    def pair(self, request):
        pair = open_pair(StagedPipe, self.OPTIONS[request.param])
        yield pair
        pair.close()

    @pytest.mark.parametrize("law", pipe_laws.LAWS, ids=[law.__name__ for law in pipe_laws.LAWS])
    def test_law(self, pair, law):
        law(pair)


@pytest.fixture
def pair():
    pair = open_pair(StagedPipe, timeout_s=1.0)
    yield pair
    pair.close()


def _bytes(count, seed=1):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "nbytes", [INLINE_BYTES, INLINE_BYTES + 1, SLOT - 1, SLOT, SLOT + 1, 4 * SLOT, 4 * SLOT + 1, 40 * SLOT + 3]
)
def test_tensors_around_each_limit_arrive_whole(pair, nbytes):
    sent = _bytes(nbytes)
    for _ in range(3):
        sending = spawn(lambda: pair.here.send_tensor(sent))
        assert torch.equal(spawn(pair.there.recv_tensor).result(LIMIT_S), sent)
        sending.result(LIMIT_S)


def test_small_tensors_need_no_staging_memory(pair):
    pair.here.send_tensor(_bytes(INLINE_BYTES))
    assert not pair.here.medium.areas
    pair.here.send_tensor(_bytes(SLOT))
    pair.here.send_tensor(_bytes(SLOT))
    assert len(pair.here.medium.areas) == 1
    for _ in range(3):
        pair.there.recv_tensor()
    assert pair.there.medium.cards == [b"heap"]


def test_a_send_that_finds_no_slot_in_time_leaves_the_pipe_as_it_was(pair):
    for seed in range(4):
        pair.here.send_tensor(_bytes(SLOT, seed))
    with pytest.raises(DeadlineError):
        pair.here.send_tensor(_bytes(SLOT, 4))
    for seed in range(4):
        assert torch.equal(pair.there.recv_tensor(), _bytes(SLOT, seed))
    pair.here.send_tensor(_bytes(SLOT, 5))
    assert torch.equal(pair.there.recv_tensor(), _bytes(SLOT, 5))


def test_a_send_that_runs_out_of_slots_in_the_middle_is_the_end_of_both_ends(pair):
    with pytest.raises(DeadlineError):
        pair.here.send_tensor(_bytes(5 * SLOT))
    with pytest.raises(BrokenError):
        pair.here.send_tensor(None)
    with pytest.raises(BrokenError):
        pair.there.recv_tensor()


def test_memory_that_the_other_end_may_still_read_is_not_reused_at_once(pair):
    pair.here.send_tensor(_bytes(SLOT))
    pair.there.recv_tensor()
    pair.here.close()
    assert pair.here.medium.areas[0].freed == [0.0]
    other = pair.another(timeout_s=1.0)
    other.here.send_tensor(_bytes(SLOT))
    other.here.abort()
    assert other.here.medium.areas[0].freed == [1.0]
    assert other.here.medium.ended


def test_close_waits_for_what_was_not_fetched_no_longer_than_the_deadline(pair):
    pair.here.send_tensor(_bytes(SLOT))
    closing = spawn(pair.here.close)
    assert closing.exception(LIMIT_S) is None
    with pytest.raises(BrokenError):
        pair.there.recv_tensor() and pair.there.recv_tensor()
    with pytest.raises(ClosedError):
        pair.here.send_tensor(None)


def test_a_fetch_that_fails_ends_the_pipe_with_its_error(pair, monkeypatch):
    def refuse(*_):
        raise BrokenError("the link went down")

    monkeypatch.setattr(pair.there.medium, "fetch", refuse)
    pair.here.send_tensor(_bytes(SLOT))
    for _ in range(2):
        with pytest.raises(BrokenError, match="the link went down"):
            pair.there.recv_tensor()
    with pytest.raises(BrokenError):
        pair.here.tensors._await_acknowledgement()


def test_a_tensor_beyond_the_limit_is_refused_before_a_byte_moves(pair):
    pair.here.tensors._max_bytes = SLOT
    with pytest.raises(TensorRejectedError, match="larger than the limit"):
        pair.here.send_tensor(_bytes(SLOT + 1))
    pair.here.send_tensor(_bytes(SLOT))
    assert torch.equal(pair.there.recv_tensor(), _bytes(SLOT))


@pytest.mark.parametrize(
    "frame",
    [b"", b"X", b"T", b"T" + bytes(64), b"S" + bytes(20), b"S" + bytes(3), b"C"],
    ids=["empty", "unknown", "cut short", "no message", "part of nothing", "cut part", "card alone"],
)
def test_nonsense_from_the_other_end_is_a_broken_pipe(pair, frame):
    tensor = torch.tensor(list(frame), dtype=torch.uint8)
    pair.here.companion.out.send_tensor(tensor)
    if frame == b"C":
        pair.here.companion.out.send_tensor(None)
    with pytest.raises(BrokenError):
        pair.there.recv_tensor()


def test_an_acknowledgement_of_a_slot_that_is_free_is_a_broken_pipe(pair):
    for _ in range(4):
        pair.here.send_tensor(_bytes(SLOT))
    pair.there.companion.into.send_tensor(torch.tensor([9, 0, 0, 0], dtype=torch.uint8))
    with pytest.raises(BrokenError, match="slot 9"):
        pair.here.send_tensor(_bytes(SLOT))
