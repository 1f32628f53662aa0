"""`kvconnect.pipes.shm_blocks`: beginning and ending, where the peer or the channel lets it down."""

import threading
from concurrent.futures import Future

import pytest

from kvconnect import blocks as paged
from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    ConfigError,
    DeadlineError,
    HandshakeError,
    KVConnectError,
)
from kvconnect.paging import LayerLayout, PagedLayout, PagedMemory
from kvconnect.pipes.peer_memory import PeerMemory
from kvconnect.pipes.shm import ShmPipe
from kvconnect.pipes.shm_blocks import ShmBlocks
from kvconnect.testing.peers import open_pair, spawn

LIMIT_S = 30.0
BLOCKS = 64


@pytest.fixture(params=["direct", "ring"])
def pair(request):
    pair = open_pair(ShmPipe, {"copy": request.param})
    yield pair
    pair.close()


@pytest.fixture
def direct():
    pair = open_pair(ShmPipe, {"copy": "direct"})
    yield pair
    pair.close()


def _layout():
    layers = tuple(LayerLayout(f"layer{i}", 0, i, 0, 1 << 16, BLOCKS, 1 << 16) for i in range(2))
    return PagedLayout(layers, (BLOCKS << 16,) * 2)


def _memory():
    return paged.heap_memory(_layout())


def _attach_both(pair):
    theirs = _memory()
    pair.there.attach(theirs, _layout(), pair.channels[1])
    pair.here.attach(_memory(), _layout(), pair.channels[0])
    pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    return theirs


class _Channel:
    """A channel whose calls end as the test says; nobody calls from the other side."""

    def __init__(self, error=None):
        self.answer = Future()
        self.handlers = {}
        if error is not None:
            self.answer.set_exception(error)

    def call(self, op, body):
        return self.answer

    def handle(self, op, handler):
        self.handlers[op] = handler


# -- before the peer has attached ---------------------------------------------------


def test_a_transfer_fails_by_itself_if_the_peer_does_not_attach_in_time(pair):
    short = pair.another(timeout_s=0.3)
    short.here.attach(_memory(), _layout(), short.channels[0])
    transfers = [short.here.read_blocks([[1]], [[2]]), short.here.write_blocks([[1]], [[2]])]
    for transfer in transfers:
        over = threading.Event()
        transfer.add_done_callback(lambda _, over=over: over.set())
        assert over.wait(10)
        assert isinstance(transfer.error, DeadlineError)
    # The pipe is as good as before.
    short.there.attach(_memory(), _layout(), short.channels[1])
    short.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)


@pytest.mark.parametrize("error", [BrokenError, DeadlineError, ClosedError])
def test_whoever_asks_after_the_peer_could_not_be_told_is_told_so(direct, error):
    channel = _Channel()
    direct.here.attach(_memory(), _layout(), channel)
    early = direct.here.read_blocks([[1]], [[2]])
    channel.answer.set_exception(error("nobody there"))
    with pytest.raises(error, match="nobody there"):
        early.wait(LIMIT_S)
    with pytest.raises((BrokenError, ClosedError), match="nobody there"):
        direct.here.read_blocks([[1]], [[2]])


def test_a_peer_that_told_by_itself_needs_no_answer(direct):
    channel = _Channel()
    direct.here.attach(_memory(), _layout(), channel)
    theirs = _memory()
    (handler,) = channel.handlers.values()
    handler({"direct": True, "streams": False, "bases": theirs.bases.tolist()})
    channel.answer.set_exception(DeadlineError("too slow"))
    direct.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)


def test_a_malformed_answer_ends_the_block_path_and_not_only_what_waits(direct):
    channel = _Channel()
    direct.here.attach(_memory(), _layout(), channel)
    early = direct.here.read_blocks([[1]], [[2]])
    channel.answer.set_result({"direct": True, "bases": [1]})
    with pytest.raises(HandshakeError, match="base addresses"):
        early.wait(LIMIT_S)
    with pytest.raises(BrokenError, match="base addresses"):
        direct.here.read_blocks([[1]], [[2]])


def test_an_ask_that_overlaps_a_close_ends_and_does_not_wait(direct, monkeypatch):
    direct.here.attach(_memory(), _layout(), _Channel())
    check_open = ShmPipe.check_open

    def check_and_be_overtaken(pipe):
        check_open(pipe)
        pipe.close()

    monkeypatch.setattr(ShmPipe, "check_open", check_and_be_overtaken)
    with pytest.raises(ClosedError):
        direct.here.read_blocks([[1]], [[2]])


def test_a_closed_end_tells_a_peer_that_attaches_later(direct):
    direct.there.attach(_memory(), _layout(), direct.channels[1])
    direct.there.close()
    direct.here.attach(_memory(), _layout(), direct.channels[0])
    with pytest.raises(BrokenError):
        direct.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)


# -- attaching ------------------------------------------------------------------------


def test_a_second_attach_is_refused_and_the_first_stays(pair):
    _attach_both(pair)
    with pytest.raises(BusyError, match="attached"):
        pair.here.attach(_memory(), _layout(), pair.channels[0])
    pair.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)


def test_an_attach_that_failed_may_be_repeated(pair):
    with pytest.raises(HandshakeError):
        pair.here.attach(_memory(), PagedLayout((), ()), pair.channels[0])
    _attach_both(pair)


def test_of_two_threads_that_attach_at_once_one_is_refused(direct, monkeypatch):
    inside, go_on, create = threading.Event(), threading.Event(), ShmBlocks.__init__

    def slow(self, *arguments, **named):
        inside.set()
        go_on.wait(LIMIT_S)
        create(self, *arguments, **named)

    monkeypatch.setattr(ShmBlocks, "__init__", slow)
    attaching = [spawn(lambda: direct.here.attach(_memory(), _layout(), direct.channels[0])) for _ in range(2)]
    assert inside.wait(LIMIT_S)
    go_on.set()
    assert sorted(str(type(each.exception(LIMIT_S)).__name__) for each in attaching) == ["BusyError", "NoneType"]


def test_an_attach_that_a_close_overtakes_leaves_no_block_path_behind(monkeypatch):
    pair = open_pair(ShmPipe, {"copy": "ring"}, timeout_s=0.5)
    inside, go_on, create = threading.Event(), threading.Event(), ShmBlocks.__init__

    def slow(self, *arguments, **named):
        inside.set()
        go_on.wait(LIMIT_S)
        create(self, *arguments, **named)

    monkeypatch.setattr(ShmBlocks, "__init__", slow)
    attaching = spawn(lambda: pair.here.attach(_memory(), _layout(), pair.channels[0]))
    assert inside.wait(LIMIT_S)
    pair.here.abort()
    go_on.set()
    assert isinstance(attaching.exception(LIMIT_S), ClosedError)
    with pytest.raises(ClosedError):
        pair.here._blocks._stream.read([[1]], [[2]])
    pair.close()


def test_memory_of_a_gpu_is_refused_by_name(direct):
    memory = _memory()
    elsewhere = PagedMemory(memory.layout, memory.bases.tolist(), "cuda:0", memory.owner)
    with pytest.raises(ConfigError, match="cuda:0"):
        direct.here.attach(elsewhere, _layout(), direct.channels[0])


# -- ending -----------------------------------------------------------------------------


def test_a_look_at_the_peer_that_fails_for_another_reason_never_counts_as_success(direct, monkeypatch):
    _attach_both(direct)

    def fail(_):
        raise ValueError("a bug")

    monkeypatch.setattr(PeerMemory, "verify", fail)
    transfer = direct.here.read_blocks([[1]], [[2]])
    with pytest.raises(BrokenError, match="a bug") as caught:
        transfer.wait(LIMIT_S)
    assert isinstance(caught.value.__cause__, ValueError)
    monkeypatch.undo()
    direct.here.close()  # and the pipe waits for nobody


def test_a_copy_that_fails_for_another_reason_says_which(direct, monkeypatch):
    _attach_both(direct)
    read = PeerMemory.read

    def fail(self, local, remote):
        if int(remote[0, 1]) > 1000:
            raise MemoryError("no memory")
        read(self, local, remote)

    monkeypatch.setattr(PeerMemory, "read", fail)
    with pytest.raises(BrokenError, match="no memory") as caught:
        direct.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_transfer_that_cannot_start_late_ends_and_so_do_those_behind_it(direct, monkeypatch):
    mine = _memory()
    direct.here.attach(mine, _layout(), direct.channels[0])
    early = [direct.here.read_blocks([[1]], [[2]]) for _ in range(3)]
    monkeypatch.setattr(mine, "iovec", lambda _: 1 / 0)
    direct.there.attach(_memory(), _layout(), direct.channels[1])
    for transfer in early:
        with pytest.raises(KVConnectError, match="ZeroDivisionError"):
            transfer.wait(LIMIT_S)


def test_a_write_stops_when_the_peer_closes_in_the_middle(direct, monkeypatch):
    _attach_both(direct)
    write, chunks = PeerMemory.write, []

    def write_and_close(self, local, remote):
        chunks.append(1)
        write(self, local, remote)
        if len(chunks) == 1:
            direct.there.close()

    monkeypatch.setattr("kvconnect.pipes.shm_blocks.useful_threads", lambda: 1)
    monkeypatch.setattr(PeerMemory, "write", write_and_close)
    ids = [list(range(BLOCKS))]
    with pytest.raises(BrokenError, match="closed"):
        direct.here.write_blocks(ids, ids).wait(LIMIT_S)
    assert len(chunks) == 1
