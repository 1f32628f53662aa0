"""The NIXL pipe: the laws in each of its modes, and what only this medium has to withstand."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.cuda.tiles import Paged
from kvconnect.errors import BrokenError, ConfigError, KVConnectError, UnavailableBackendError
from kvconnect.paging import place
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.nixl import NixlPipe
from kvconnect.pipes.nixl_agent import Agent
from kvconnect.pipes.nixl_choice import AGAIN, TRIAL_BYTES, Costs
from kvconnect.pipes.nixl_notes import Note, What
from kvconnect.pipes.nixl_place import Place, read_card
from kvconnect.pipes.nixl_pull import Pull
from kvconnect.pipes.nixl_runs import Runs
from kvconnect.pipes.nixl_staging import STAGERS, SlotPool, Use, portions
from kvconnect.testing.block_laws import attach
from kvconnect.testing.layouts import naive_stream, noisy_memory, random_ids, separate_layers, shared_region
from kvconnect.testing.peers import LIMIT_S, open_pair
from kvconnect.testing.pipe_tests import PipeTests

BLOCK = 1 << 16


class TestRuns(PipeTests):
    pipe_class = NixlPipe
    options: ClassVar = {"mode": "runs", "companion": "tcp"}


class TestStaged(PipeTests):
    pipe_class = NixlPipe
    one_sided = False
    options: ClassVar = {"mode": "staged", "portion_bytes": 1 << 20}


# -- one agent a process ------------------------------------------------------------


@pytest.fixture(params=["runs", "staged"])
def pair(request):
    pair = open_pair(NixlPipe, {"mode": request.param})
    yield pair
    pair.close()


def _layout(blocks=64):
    return separate_layers(2, blocks, 1, BLOCK)


def _attached(pair, blocks=64):
    return attach(pair, noisy_memory(_layout(blocks), 1), noisy_memory(_layout(blocks), 2))


def _fork(work):
    """Run ``work`` in a forked child; return what it returned."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(work()))
    child.start()
    assert ours.poll(LIMIT_S), "the child did not answer"
    got = ours.recv()
    child.join(LIMIT_S)
    assert child.exitcode == 0
    return got


def test_all_pipes_of_a_process_share_one_agent_and_one_registration(pair):
    other = pair.another()
    memory = noisy_memory(_layout(), 1)
    peers = [noisy_memory(_layout(), seed) for seed in (2, 3)]
    for each, peer in zip((pair, other), peers, strict=True):
        attach(each, memory, peer)
    agent = pair.here._agent
    assert agent is other.there._agent
    mine = [one for one in agent._registered.values() if one.owner is memory]
    assert [one.users for one in mine] == [1]
    for each, peer in zip((pair, other), peers, strict=True):
        each.here.read_blocks([[5]], [[6]]).wait(LIMIT_S)
        assert naive_stream(memory, [[6]]).equal(naive_stream(peer, [[5]]))
    pair.close()
    other.close()
    agent.call(lambda: None)
    assert not any(one.owner in {memory, *peers} for one in agent._registered.values() if one.owner is not None)


def test_a_process_with_an_idle_pipe_takes_no_processor_time(pair):
    ends = _attached(pair)
    ends.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    pair.here.send_tensor(torch.ones(1000))
    pair.there.recv_tensor()
    # What a test before left running may end just now; who polls does it in every second.
    used = min((_used_in_a_second() for _ in range(5)), key=lambda by_thread: sum(by_thread.values()))
    assert sum(used.values()) < 0.2, used


def _used_in_a_second():
    """Return how long each thread was on a processor."""
    before = _used()
    threading.Event().wait(1.0)
    used, names = _used(), {thread.native_id: thread.name for thread in threading.enumerate()}
    return {f"{names.get(tid, '?')} ({tid})": used[tid] - before.get(tid, 0.0) for tid in used}


def _used():
    ticks = os.sysconf("SC_CLK_TCK")
    used = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            _, _, numbers = (task / "stat").read_text().rpartition(")")
            used[int(task.name)] = sum(map(int, numbers.split()[11:13])) / ticks
    return used


def test_a_child_forked_from_a_process_with_an_agent_says_that_it_cannot_have_one(pair):
    assert pair.here._agent

    def use():
        with pytest.raises(UnavailableBackendError, match="forked"):
            NixlPipe.open(PipeSpec("asks", dict))
        return NixlPipe.availability().reason

    assert "forked" in _fork(use)
    assert NixlPipe.availability()


FORK = """
import os
import torch
from kvconnect.pipes.nixl import NixlPipe
from kvconnect.testing.peers import open_pair
from kvconnect.testing.block_laws import reading_copies_exactly_the_blocks_asked_for

torch.set_num_threads(1)
if pid := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
pair = open_pair(NixlPipe)
reading_copies_exactly_the_blocks_asked_for(pair)
pair.close()
"""


def test_a_child_forked_before_there_was_an_agent_may_have_one():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_metadata_of_another_agent_than_it_says_are_refused(pair):
    ends = _attached(pair)
    card = ends.here._blocks._meeting._card()
    for metadata in (card["metadata"], b"nonsense"):
        with pytest.raises(BrokenError):
            pair.here._agent.meet(read_card({**card, "agent": "somebody else", "metadata": metadata}))


@pytest.mark.parametrize(
    "wrong", [{"number": 7}, {"number": True}, {"valid": None}, {"valid": [0, "1"]}, {"valid": []}]
)
def test_a_card_says_which_registrations_are_valid(wrong):
    told = {"agent": "there", "metadata": b"m", "kind": "DRAM", "device": 0, "number": 0, "valid": [0, 3]}
    assert read_card(told).denies(2)
    with pytest.raises(BrokenError, match="registrations"):
        read_card({**told, **wrong})


# -- what the two ends tell each other --------------------------------------------------


def _staged(timeout_s=10.0):
    pair = open_pair(NixlPipe, {"mode": "staged", "portion_bytes": 4 * BLOCK}, timeout_s=timeout_s)
    return pair, _attached(pair)


@pytest.mark.parametrize("eager", [False, True])
def test_without_notifications_the_channel_carries_notes(monkeypatch, eager):
    monkeypatch.setattr(Agent, "notify", lambda *_: False)
    pair, ends = _staged()
    monkeypatch.setattr(pair.here._agent, "eager", eager)
    ids = [list(range(40))]
    ends.here.read_blocks(ids, [ids[0][::-1]]).wait(LIMIT_S)
    assert naive_stream(ends.mine, [ids[0][::-1]]).equal(naive_stream(ends.theirs, ids))
    pair.close()


def test_an_eager_agent_is_told_by_notes_that_the_bytes_count(monkeypatch):
    pair, ends = _staged()
    monkeypatch.setattr(pair.here._agent, "eager", True)
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)
    blocks, tell = pair.here._blocks, pair.here._blocks.tell
    monkeypatch.setattr(blocks, "tell", lambda op, body: Future() if op == "nixl.end" else tell(op, body))
    ends.here.read_blocks([[2, 3]], [[5, 6]]).wait(LIMIT_S)
    assert naive_stream(ends.mine, [[5, 6]]).equal(naive_stream(ends.theirs, [[2, 3]]))
    pair.close()


def test_a_lender_may_answer_before_the_reader_goes_on(monkeypatch):
    pair, ends = _staged(timeout_s=2.0)
    ends.here.read_blocks([[1]], [[1]]).wait(LIMIT_S)  # from now on nothing has to be learnt first
    blocks, tell = pair.here._blocks, pair.here._blocks.tell

    def slowly(op, body):
        told = tell(op, body)
        if op == "nixl.begin":
            threading.Event().wait(0.1)  # as a thread does that is preempted
        return told

    monkeypatch.setattr(blocks, "tell", slowly)
    ends.here.read_blocks([[2, 3]], [[5, 6]]).wait(LIMIT_S)
    assert naive_stream(ends.mine, [[5, 6]]).equal(naive_stream(ends.theirs, [[2, 3]]))
    pair.close()


def test_a_portion_may_be_there_before_the_reader_goes_on(monkeypatch):
    pair, ends = _staged()
    blocks, tell = pair.here._blocks, pair.here._blocks.tell

    def slowly(op, body):
        answer = tell(op, body)
        if op == "nixl.begin":
            threading.Event().wait(0.3)
        return answer

    monkeypatch.setattr(blocks, "tell", slowly)
    for _ in range(2):  # the first meets the other end's memory, too
        ends.here.read_blocks([[1, 2]], [[3, 4]]).wait(LIMIT_S)
        assert naive_stream(ends.mine, [[3, 4]]).equal(naive_stream(ends.theirs, [[1, 2]]))
    pair.close()


@pytest.mark.parametrize("note", [b"", b"\xff" * 25, Note(What.ENDED, 1).pack()])
def test_notes_that_make_no_sense_or_are_not_the_peers_change_nothing(note):
    pair, ends = _staged()
    agent, token = pair.here._agent, pair.here._blocks.notes.token
    for name in (agent.name, "somebody else"):
        agent.soon(partial(agent._hear, name, token + note))
    ends.here.read_blocks([[1]], [[2]]).wait(LIMIT_S)
    assert naive_stream(ends.mine, [[2]]).equal(naive_stream(ends.theirs, [[1]]))
    pair.close()


def test_slots_are_taken_back_from_an_end_that_does_not_read_them(monkeypatch):
    pair, ends = _staged(timeout_s=1.0)
    monkeypatch.setattr(Pull, "full", lambda *_: None)
    blocks, tell = pair.here._blocks, pair.here._blocks.tell
    monkeypatch.setattr(blocks, "tell", lambda op, body: Future() if op == "nixl.end" else tell(op, body))
    transfer = ends.here.read_blocks([list(range(40))], [list(range(40))])
    with pytest.raises(KVConnectError):
        transfer.wait(LIMIT_S)
    pool = pair.there._blocks.shared.slots
    free = pool._slots - pool._held[Use.LENDING]
    deadline = time.monotonic() + LIMIT_S
    while free < pool._slots and time.monotonic() < deadline:
        threading.Event().wait(0.05)
        free = pool._slots - pair.here._agent.call(lambda: pool._held[Use.LENDING])
    assert free == pool._slots
    pair.close()


def _pool_of_three(agent):
    pool = SlotPool(agent, STAGERS["cpu"]("cpu"), Place.of("cpu"), BLOCK, 3)
    agent.call(pool.open)
    return pool


def test_a_process_that_only_lends_lends_every_slot_until_something_is_to_land(pair):
    agent = pair.here._agent
    pool, lent = _pool_of_three(agent), []

    def lend(count):
        for _ in range(count):
            pool.take(Use.LENDING, lent.append)

    agent.call(partial(lend, 4))
    assert len(lent) == 3
    agent.call(pool.expect)
    agent.call(lambda: pool.give(lent[0]))
    assert len(lent) == 3, "the slot that came back was not kept for what lands"
    agent.call(lambda: pool.give(lent[1]))
    assert len(lent) == 4
    agent.call(pool.close)


def test_lending_leaves_a_slot_to_what_lands(pair):
    agent = pair.here._agent
    pool = _pool_of_three(agent)
    agent.call(pool.expect)
    landing, lending = [], []

    def fill():
        for _ in range(3):
            pool.take(Use.LENDING, lending.append)
        for _ in range(3):
            pool.take(Use.LANDING, landing.append)

    agent.call(fill)
    assert (len(lending), len(landing)) == (2, 1)
    agent.call(lambda: pool.give(landing[0]))
    assert (len(lending), len(landing)) == (2, 2)
    agent.call(lambda: pool.give(lending[0]))
    assert (len(lending), len(landing)) == (2, 3)
    agent.call(lambda: pool.give(landing[1]))
    assert (len(lending), len(landing)) == (3, 3)
    agent.call(pool.close)


def test_what_copies_a_portion_waits_for_shorter_steps(pair):
    agent, done = pair.here._agent, []

    def queue():
        for number in range(3):
            agent.soon_long(partial(done.append, f"long {number}"))
        agent.soon(partial(done.append, "short"))

    agent.call(queue)
    over = threading.Event()
    agent.soon_long(over.set)
    assert over.wait(LIMIT_S)
    assert done == ["short", "long 0", "long 1", "long 2"]


# -- a target that does not answer ------------------------------------------------------


@pytest.fixture
def slow_wire(monkeypatch):
    """UCX over TCP, where every byte takes the target's progress – in this process's children only."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


SCRIPT = """
import threading
from kvconnect.pipes.nixl import NixlPipe
from kvconnect.testing import processes, layouts
from kvconnect.errors import DeadlineError

if __name__ == "__main__":
    peer = processes.ProcessPeer(NixlPipe, {"mode": MODE})
    layout = layouts.separate_layers(1, 512, 1, 1 << 16)
    mine = layouts.noisy_memory(layout, 1)
    end = peer.open(timeout_s=2.0)
    theirs = end.attach(mine, layout, 2)
    everything = [list(range(512))]
    end.pipe.read_blocks([[3, 4]], [[3, 4]]).wait(30)
    assert layouts.naive_stream(mine, [[3, 4]]).equal(layouts.naive_stream(theirs, [[3, 4]]))
    end.pipe.write_blocks([[7]], [[8]]).wait(30)
    peer.freeze()
    transfer = end.pipe.read_blocks(everything, everything)
    threading.Event().wait(4.0)
    if MODE == "staged":  # nothing but staging memory can still be written
        assert isinstance(transfer.error, DeadlineError), transfer.error
        layouts.regions(mine)[0].zero_()
    else:  # the blocks can: they are not free before the target has answered
        assert not transfer.done
    peer.thaw()
    try:
        transfer.wait(20)
    except DeadlineError:
        pass
    assert isinstance(transfer.error, DeadlineError), transfer.error
    layouts.regions(mine)[0].zero_()
    threading.Event().wait(1.0)
    again = peer.open(timeout_s=10.0)
    other = layouts.noisy_memory(layout, 5)
    theirs = again.attach(other, layout, 6)
    again.pipe.read_blocks(everything, everything).wait(30)
    assert layouts.naive_stream(other, everything).equal(layouts.naive_stream(theirs, everything))
    assert not layouts.regions(mine)[0].any(), "blocks were written after the transfer was over"
    end.pipe.abort()
    again.pipe.abort()
    peer.close()
    print("well")
"""


@pytest.mark.usefixtures("slow_wire")
@pytest.mark.parametrize("mode", ["runs", "staged"])
def test_nothing_of_a_frozen_target_is_written_after_its_transfer_is_over(tmp_path, mode):
    script = tmp_path / "frozen.py"
    script.write_text(SCRIPT.replace("MODE", repr(mode)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "well" in done.stdout.splitlines()


# -- portions -----------------------------------------------------------------------------------


def test_portions_are_whole_blocks_and_cover_each_once():
    layout = separate_layers(2, 64, 1, 1000, 2)
    blocks = random_ids(1, 64, [13, 5])
    for portion_bytes in (1, 2000, 9000, 1 << 20):
        found = [[], []]
        for portion in portions(layout, blocks, portion_bytes):
            assert 0 < layout.nbytes(portion) <= max(portion_bytes, 2000)
            for group, some in enumerate(portion):
                found[group] += some
        assert found == [list(group) for group in blocks]


# -- runs --------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.booleans(), st.booleans())
def test_runs_read_every_piece_of_every_block_from_its_own_place(seed, shared, neighbours):
    theirs, ours = separate_layers(2, 40, 1, 1000, 2), (shared_region if shared else separate_layers)(2, 50, 1, 1000, 2)
    remote, local = random_ids(seed, 40, [9, 4]), random_ids(seed + 1, 50, [9, 4])
    if neighbours:
        remote, local = [range(3, 12), [7, 8, 1, 2]], [range(30, 39), [0, 1, 2, 3]]
    runs = Runs(_side(theirs), _side(ours))
    far, near = runs.cut(remote, local)
    assert np.array_equal(far[:, 1], near[:, 1])
    assert len(far) <= runs.count(remote, local) <= 2 * 2 * (9 + 4)
    wanted = zip(_bytes_of(theirs, remote), _bytes_of(ours, local), strict=True)
    found = zip(_spread(far), _spread(near), strict=True)
    assert sorted(found) == sorted(wanted)


def _side(layout):
    return Paged(layout, _bases(layout))


def _bases(layout):
    return [(i + 1) << 30 for i in range(len(layout.region_bytes))]


def _bytes_of(layout, blocks):
    return _spread(place(layout, np.array(_bases(layout), dtype=np.uint64), blocks))


def _spread(iov):
    return [int(address) + i for address, size in iov for i in range(int(size))]


def test_the_layers_of_a_block_and_neighbouring_blocks_are_read_in_one_run():
    outermost, layers = shared_region(3, 40, 1, 1000, gap_bytes=0), separate_layers(3, 40, 1, 1000)
    for layout, scattered, together in ((outermost, 5, 1), (layers, 15, 3)):
        runs = Runs(_side(layout), _side(layout))
        assert runs.count([[3, 9, 5, 30, 7]], [[1, 2, 3, 4, 5]]) == scattered
        assert len(runs.cut([[3, 9, 5, 30, 7]], [[1, 2, 3, 4, 5]])[0]) == scattered
        assert runs.count([[3, 4, 5]], [[10, 11, 12]]) == together
        assert len(runs.cut([[3, 4, 5]], [[10, 11, 12]])[0]) == together


# -- the choice ----------------------------------------------------------------------------------


def _warm(known):
    for mode in ("runs", "staged"):
        known.note(mode, 1, 1, 1.0)
    return known


def test_the_quicker_way_is_taken_once_both_are_known():
    known = _warm(Costs("runs"))
    small = (64, 2 << 20)
    assert known.choose(*small) == "runs"
    known.note("runs", *small, 1.0)
    assert known.choose(*small) == "staged"
    known.note("staged", *small, 0.1)
    assert [known.choose(*small) for _ in range(9)] == ["staged"] * 9
    known.note("staged", *small, 90.0)
    assert known.choose(*small) == "runs"


def test_a_large_transfer_tries_nothing_out():
    known = _warm(Costs("runs"))
    large = (8192, TRIAL_BYTES * 4)
    known.note("runs", *large, 1.0)
    assert [known.choose(*large) for _ in range(2 * AGAIN)] == ["runs"] * 2 * AGAIN


def test_long_runs_are_staged_only_once_that_has_proved_quicker():
    known = _warm(Costs("staged"))
    long = (4, 8 << 20)
    assert known.choose(*long) == "runs"
    known.note("runs", *long, 1.0)
    assert known.choose(*long) == "staged"
    known.note("staged", *long, 2.0)
    assert known.choose(*long) == "runs"


def test_what_the_first_transfer_of_a_kind_paid_for_does_not_count():
    known = Costs("staged")
    small = (64, 2 << 20)
    took = {"staged": iter((9.0, 0.1, 0.1)), "runs": iter((9.0, 1.0, 1.0))}
    chosen = []
    for _ in range(5):
        chosen.append(known.choose(*small))
        known.note(chosen[-1], *small, next(took[chosen[-1]]))
    assert chosen == ["staged", "staged", "runs", "runs", "staged"]


def test_good_news_counts_at_once():
    known = _warm(Costs("staged"))
    large = (8192, TRIAL_BYTES * 4)
    known.note("staged", *large, 9.0)
    known.note("runs", *large, 1.0)
    assert known.choose(*large) == "runs"
    known.note("staged", *large, 0.5)
    assert known.choose(*large) == "staged"


def test_what_small_transfers_took_says_nothing_of_large_ones():
    known = _warm(Costs("runs"))
    known.note("runs", 8, 16 << 20, 1.0)
    known.note("staged", 8, 512 << 20, 2.0)
    assert known.choose(256, 512 << 20) == "runs"


def test_the_slower_way_is_tried_again_now_and_then():
    known = _warm(Costs("runs"))
    small = (64, 2 << 20)
    known.note("runs", *small, 0.1)
    known.note("staged", *small, 0.2)
    assert [known.choose(*small) for _ in range(AGAIN)].count("staged") == 1


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"mode": "fast"}, "pipe.mode"),
        ({"backends": []}, "pipe.backends"),
        ({"backends": ["UCXX"]}, "UCXX"),
        ({"portion_bytes": 1}, "pipe.portion_bytes"),
        ({"portions": 1}, "pipe.portions"),
        ({"companion": 3}, "pipe.companion"),
    ],
)
def test_a_wrong_option_is_named(options, names):
    with pytest.raises(ConfigError, match=names):
        NixlPipe.open(PipeSpec("asks", dict, options=options))


def test_memory_of_a_kind_that_cannot_be_gathered_is_refused():
    with pytest.raises(UnavailableBackendError, match="meta"):
        NixlPipe.open(PipeSpec("asks", dict, device="meta"))


def test_availability_imports_nothing_and_says_what_to_install(monkeypatch):
    assert NixlPipe.availability()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        verdict = NixlPipe.availability()
    assert not verdict
    assert "kvconnect[nixl]" in verdict.cure


def test_memory_that_cannot_be_gathered_here_is_refused_before_any_pipe_is_opened(monkeypatch) -> None:
    memory = noisy_memory(separate_layers(1, 2, 1, 64), 1)
    assert NixlPipe.accepts(memory)

    def missing(_: str) -> None:
        raise UnavailableBackendError("package", "cupy", "it is not installed")

    monkeypatch.setitem(STAGERS, "cpu", missing)
    verdict = NixlPipe.accepts(memory)
    assert not verdict
    assert "cupy" in verdict.reason
