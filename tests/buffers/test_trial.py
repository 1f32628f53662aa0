"""The pipe ``auto``: which of several it takes, what it says of the others, and what it does when they fail."""

import dataclasses
import logging
import re
import threading
import time
from collections import Counter
from concurrent.futures import wait
from contextlib import ExitStack, closing, contextmanager
from typing import ClassVar

import pytest
import torch

from kvconnect import registry
from kvconnect.buffers import experience, links, trial
from kvconnect.buffers.base import Want
from kvconnect.buffers.choice import AutoOptions
from kvconnect.clock import Clock
from kvconnect.config import Backend
from kvconnect.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    DeadlineError,
    HandshakeError,
    LoadError,
    UnknownBackendError,
)
from kvconnect.pipes.base import Reach, Traits, Transfer, Verdict
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from tests.buffers.engines import Engine, eventually, group, key, layout

MB = 1 << 20
BLOCKS = 32


class Third(InprocPipe):
    """A third party's pipe."""

    seconds_per_mb: ClassVar[float] = 0.0
    fails: ClassVar[dict] = {}  # what is raised, by side
    hangs: ClassVar[set] = set()  # sides, and "reads"
    breaks: ClassVar[int] = 0  # reads that fail
    stalls: ClassVar[int] = 0  # reads that wait for the gate
    gate: ClassVar[threading.Event]  # ends what hangs; set by the fixture
    reads: ClassVar[Counter]
    live: ClassVar[set]

    def __init__(self, spec):
        cls = type(self)
        if spec.side in cls.fails:
            raise cls.fails[spec.side]
        if spec.side in cls.hangs:
            cls.gate.wait(20)
        super().__init__(spec)
        cls.live.add(self)

    def abort(self):
        type(self).live.discard(self)
        super().abort()

    def read_blocks(self, remote, local):
        cls = type(self)
        cls.reads[len(local[0])] += 1
        if "reads" in cls.hangs:
            return self._hanging()
        if cls.breaks:
            type(self).breaks -= 1
            raise BrokenError("cut")
        if cls.stalls:
            type(self).stalls -= 1
            cls.gate.wait(20)
        threading.Event().wait(cls.seconds_per_mb * len(local[0]))
        return super().read_blocks(remote, local)

    def _hanging(self):
        """Move nothing; let go when the pipe is ended."""
        transfer = Transfer(1)
        threading.Thread(target=lambda: (self._ended(), transfer.finish(ClosedError("ended"))), daemon=True).start()
        return transfer

    def _ended(self):
        eventually(lambda: self not in type(self).live, 20)


def third(gate, **fields):
    own = {"gate": gate, "reads": Counter(), "live": set(), "hangs": set(), "fails": {}}
    return type("ThirdOwn", (Third,), {**own, **fields})


@pytest.fixture
def register(monkeypatch):
    """Have these pipes registered and no others."""
    gate, real = threading.Event(), registry.pipe

    def having(*names, **classes):
        known = {**{name: real(name) for name in names}}
        known |= {name: cls if isinstance(cls, type) else third(gate, **cls) for name, cls in classes.items()}
        monkeypatch.setattr(registry, "pipes", lambda: known)
        monkeypatch.setattr(registry, "pipe", lambda name: known.get(name) or real(name))
        return known

    yield having
    gate.set()


@contextmanager
def engines(pipe="auto", **options):
    """Two engines; blocks have 1 MB."""
    options = {"group": group(), "shape": layout(BLOCKS, MB // 2, 2), "pipe": pipe, **options}
    with closing(Engine("P", produces=True, **options)) as p, closing(Engine("D", consumes=True, **options)) as d:
        yield p, d


@pytest.fixture
def pair():
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(engines(*args, **options))


def load(p, d, number=1, blocks=16, limit_s=15):
    """Hand over that many blocks, the last ones first at the other end, and compare every byte."""
    transfer, local = start(p, d, number, blocks)
    transfer.wait(limit_s)
    for theirs, ours in zip(p.memories[0].owner, d.memories[0].owner, strict=True):
        assert torch.equal(ours.view(BLOCKS, -1)[list(local)], theirs.view(BLOCKS, -1)[:blocks])
        ours.zero_()
    return transfer


def start(p, d, number=1, blocks=16):
    remote, local = tuple(range(blocks)), tuple(range(BLOCKS - 1, BLOCKS - 1 - blocks, -1))
    claim = d.find(f"r{number}", Want(key(number), ticket=p.offer(number, (remote,))))
    return d.read(claim, local=(local,)), local


def choose(p, d, blocks=16):
    """Hand over until a pipe has been chosen: if opening others takes longer than a load, that is the next one."""
    for number in range(100, 110):
        load(p, d, number, blocks)
        pipe = link(d).pipe if link(d) else None
        if not isinstance(pipe, trial.Trial):
            return
        wait([pipe._opening], 20)
    raise AssertionError("no pipe was chosen")


def ready(p, d, rival):
    """Start a load with which all pipes will be measured: ``rival`` was opened after the first one."""
    rival.hangs.add("asks")
    start(p, d, 100)[0].wait(15)
    rival.gate.set()
    wait([link(d).pipe._opening], 20)
    rival.gate.clear()
    return start(p, d, 101)[0]


def link(d):
    return next(iter(d.workers[0]._links._links.values()), None)


def lines(caplog):
    """What was said of the pipes that are taken."""
    return [record.getMessage() for record in caplog.records if "reading from" in record.getMessage()]


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, "kvconnect.buffers")


def test_the_slower_of_two_pipes_that_are_as_near_loses_though_it_comes_first(register, pair, caplog):
    known = register(a={"seconds_per_mb": 0.01}, b={})
    p, d = pair()
    choose(p, d)
    assert link(d).name == "b"
    known["a"].reads.clear()
    load(p, d, 2)
    assert known["b"].reads[16] == 1
    assert not known["a"].reads
    first, second = lines(caplog)
    assert "over a (not b: as near as a, a large load will tell)" in first
    figures = re.search(r"over b, ([\d.]+) GB/s \(not a: (0\.[\d]+) GB/s\); measured in [\d.]+ s", second)
    assert figures, second
    assert float(figures[2]) < 0.11 < float(figures[1])
    eventually(lambda: not known["a"].live and len(known["b"].live) == 2)
    assert p.workers[0]._pipes.count == 1


def test_a_pipe_that_cannot_be_opened_gives_way_to_the_next_and_one_line_says_why(register, pair, caplog):
    far = type("Far", (InprocPipe,), {"traits": Traits(reach=Reach.NETWORK)})
    nowhere = type("Nowhere", (InprocPipe,), {"can_reach": classmethod(lambda *_: Verdict(False, "too far", "walk"))})
    register(a={"fails": {"asks": ValueError("no handle")}}, b=far, c=nowhere)
    p, d = pair()
    load(p, d)
    (line,) = lines(caplog)
    assert line.endswith(
        "over b (not a: it cannot be opened: the pipe failed: ValueError: no handle; not c: too far (walk))"
    )
    assert caplog.records[[record.getMessage() for record in caplog.records].index(line)].levelno == logging.WARNING
    load(p, d, 2)
    assert len(lines(caplog)) == 1


def test_a_pipe_that_the_other_end_cannot_open_gives_way_to_the_next(register, pair, caplog):
    known = register(a={"fails": {"serves": HandshakeError("no room")}}, b={})
    p, d = pair()
    load(p, d)
    (line,) = lines(caplog)
    assert "over b (not a: it cannot be opened: no room)" in line
    eventually(lambda: not known["a"].live)
    assert p.workers[0]._pipes.count == 1


def test_a_load_fails_with_the_reason_of_every_pipe_if_none_can_be_opened(register, pair):
    register(a={"fails": {"asks": ValueError("no handle")}}, b={"fails": {"serves": HandshakeError("no room")}})
    p, d = pair()
    with pytest.raises(LoadError, match=r"a: it cannot be opened: .*no handle; b: it cannot be opened: no room"):
        load(p, d)
    eventually(lambda: p.workers[0]._pipes.count == 0)


@pytest.mark.parametrize("side", ["asks", "serves"])
def test_a_pipe_that_hangs_while_it_is_opened_gives_way_to_the_next_in_time(register, pair, monkeypatch, side):
    monkeypatch.setattr("kvconnect.buffers.lines._SLACK_S", 0.1)
    known = register(a={"hangs": {side}}, b={})
    p, d = pair(connect_timeout_s=0.5)
    began = time.monotonic()
    load(p, d)
    assert time.monotonic() - began < 5
    assert link(d).name == "b"
    known["a"].gate.set()
    eventually(lambda: not known["a"].live, 5)
    assert p.workers[0]._pipes.count == 1


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ("b", {"hangs": {"asks"}}),
        ("b", {"hangs": {"serves"}}),
        ("b", {"hangs": {"reads"}}),
        ("a", {"hangs": {"reads"}}),
        ("b", {"breaks": 1}),
        ("a", {"breaks": 1}),
    ],
)
def test_a_pipe_that_hangs_or_breaks_in_a_trial_is_passed_over_and_the_load_arrives(register, pair, bad, fault):
    good = "a" if bad == "b" else "b"
    known = register(**{good: {}, bad: fault})
    p, d = pair(connect_timeout_s=1.0)
    began = time.monotonic()
    choose(p, d)
    assert time.monotonic() - began < 8
    assert link(d).name == good
    known[bad].gate.set()
    eventually(lambda: not known[bad].live and len(known[good].live) == 2)
    load(p, d, 2)


def test_a_trial_of_a_pipe_that_hangs_costs_no_more_than_connecting_may(register, pair, caplog):
    register(a={}, b={"hangs": {"reads"}})
    p, d = pair(connect_timeout_s=0.8)
    choose(p, d)
    assert "not b: it did not move 1048576 bytes within its 0.8 s" in lines(caplog)[-1]
    assert 0.7 < float(re.search(r"measured in ([\d.]+) s", lines(caplog)[-1])[1]) < 3.0


def test_a_load_whose_every_pipe_fails_in_the_trial_is_read_anew(register, pair):
    known = register(a={"breaks": 1}, b={"breaks": 1})
    p, d = pair()
    load(p, d)
    assert known["a"].breaks == known["b"].breaks == 0


def test_blocks_are_not_given_back_while_a_pipe_of_the_trial_may_touch_them(register, pair, monkeypatch):
    monkeypatch.setattr(trial, "_LET_GO_S", 0.1)
    hanging = []

    class Clings(Third):
        def read_blocks(self, remote, local):
            hanging.append(Transfer(1))
            return hanging[-1]

    own = {"gate": threading.Event(), "reads": Counter(), "live": set(), "hangs": set()}
    known = register(a={}, b=type("ClingsOwn", (Clings,), own))
    p, d = pair(connect_timeout_s=1.0)
    transfer = ready(p, d, known["b"])
    eventually(lambda: hanging and link(d) and isinstance(link(d).pipe, known["a"]))
    load(p, d, 2, blocks=2)
    assert not transfer.done
    hanging[0].finish(BrokenError("at last"))
    transfer.wait(8)


def test_a_load_does_not_wait_until_other_pipes_are_open(register, pair):
    known = register(a={}, b={"hangs": {"asks"}})
    p, d = pair()
    load(p, d)
    load(p, d, 2)
    assert isinstance(link(d).pipe, trial.Trial)
    assert not known["b"].live
    known["b"].gate.set()
    choose(p, d)
    assert known["b"].reads


def test_a_slow_pipe_is_not_taken_for_one_that_hangs_while_others_are_opened(register, pair, caplog):
    register(a={"seconds_per_mb": 0.05}, b={"hangs": {"asks"}})
    p, d = pair(connect_timeout_s=0.6)
    choose(p, d, blocks=30)
    assert link(d).name == "a"
    assert "not b: it cannot be opened: it did not open within 0.6 s" in lines(caplog)[-1]


def test_loads_that_are_too_small_go_by_the_first_pipe_and_open_no_other(register, pair):
    known = register(a={}, b={})
    p, d = pair()
    for number in range(1, 4):
        load(p, d, number, blocks=13)
    assert known["a"].reads[13] == 3
    assert not known["b"].live


def test_loads_beside_a_trial_arrive_and_the_loser_ends_after_the_last_of_them(register, pair):
    gate = threading.Event()

    class Waits(Third):
        def read_blocks(self, remote, local):
            moving = super().read_blocks(remote, local)
            if len(local[0]) != 3:
                return moving
            late = Transfer(1)
            threading.Thread(target=lambda: (gate.wait(20), late.finish(moving.error)), daemon=True).start()
            return late

    own = {"gate": gate, "reads": Counter(), "live": set(), "seconds_per_mb": 0.01}
    waits = type("WaitsOwn", (Waits,), own)
    register(a=waits, b={})
    p, d = pair()
    beside, _ = start(p, d, 1, blocks=3)
    eventually(lambda: waits.reads[3])
    choose(p, d)
    assert link(d).name == "b"
    assert len(waits.live) == 2
    assert not beside.done
    gate.set()
    beside.wait(8)
    eventually(lambda: not waits.live)


def test_a_cancelled_trial_begins_afresh_with_the_next_load(register, pair):
    known = register(a={}, b={"stalls": 1})
    p, d = pair()
    transfer = ready(p, d, known["b"])
    eventually(lambda: known["b"].reads)
    transfer.cancel()
    known["b"].gate.set()
    with pytest.raises(LoadError, match="cancelled"):
        transfer.wait(8)
    assert isinstance(link(d).pipe, trial.Trial)
    known["a"].seconds_per_mb = 0.01
    choose(p, d)
    assert link(d).name == "b"


def test_a_pipe_that_opens_but_cannot_read_gives_way_to_the_next(register, pair, caplog):
    far = type("Far", (InprocPipe,), {"traits": Traits(reach=Reach.NETWORK)})
    register(a={"breaks": 99}, b=far)
    p, d = pair()
    load(p, d)
    assert link(d).name == "b"
    assert "not a: it failed: cut" in lines(caplog)[-1]


def test_a_pipe_that_has_worked_is_opened_anew_when_it_breaks(register, pair):
    far = type("Far", (InprocPipe,), {"traits": Traits(reach=Reach.NETWORK)})
    known = register(a={}, b=far)
    p, d = pair()
    load(p, d)
    known["a"].breaks = 1
    load(p, d, 2)
    assert link(d).name == "a"


def test_what_was_measured_is_remembered_when_pipes_are_opened_again(register, pair):
    known = register(a={"seconds_per_mb": 0.01}, b={})
    p, d = pair()
    choose(p, d)
    known["a"].reads.clear()
    d.workers[0]._client.soon(lambda: d.workers[0]._links.drop(link(d)))
    eventually(lambda: not known["b"].live)
    load(p, d, 2)
    assert link(d).name == "b"
    assert not known["a"].reads


def test_small_loads_of_a_first_pipe_that_hangs_go_by_the_next_in_time(register, pair, caplog):
    known = register(a={"hangs": {"reads"}}, b={})
    p, d = pair(connect_timeout_s=0.5)
    began = time.monotonic()
    for transfer, _ in [start(p, d, number, 1) for number in (1, 2, 3)]:
        transfer.wait(10)
    assert time.monotonic() - began < 5
    assert link(d).name == "b"
    assert "not a: it moved nothing within 0.5 s" in lines(caplog)[-1]
    eventually(lambda: not known["a"].live)
    load(p, d, 4, 1)


def test_small_loads_pass_over_as_many_pipes_as_hang(register, pair):
    register(a={"hangs": {"reads"}}, b={"hangs": {"reads"}}, c={})
    p, d = pair(connect_timeout_s=0.3)
    load(p, d, blocks=1)
    assert link(d).name == "c"


def test_a_pipe_that_hangs_after_it_has_worked_is_given_the_whole_time_of_a_load(register, pair):
    known = register(a={}, b={})
    p, d = pair(connect_timeout_s=0.2, transfer_timeout_s=1.5)
    load(p, d, blocks=1)
    known["a"].hangs.add("reads")
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        start(p, d, 2, 1)[0].wait(10)
    assert time.monotonic() - began > 1.4


class Ahead(Clock):
    """The host's clock, some seconds later."""

    def __init__(self, seconds):
        self._seconds = seconds

    def now(self):
        return super().now() + self._seconds


def later(d, seconds):
    """Let what is remembered of pipes grow older; no timer ends."""
    known = d.workers[0]._links
    known._client.clock = known._experience._clock = Ahead(seconds)


def test_a_link_that_fell_back_takes_the_better_pipe_when_its_failure_is_long_ago(register, pair, monkeypatch):
    far = type("Far", (InprocPipe,), {"traits": Traits(reach=Reach.NETWORK)})
    known = register(a={"fails": {"asks": OSError("no handle yet")}}, b=far)
    p, d = pair(transfer_timeout_s=0.5)
    monkeypatch.setattr(links, "_SLACK_S", 0.1)
    load(p, d)
    assert link(d).name == "b"
    known["a"].fails.clear()
    old = link(d)
    load(p, d, 2)
    assert link(d) is old
    later(d, experience._PASSED_OVER_S)
    load(p, d, 3)  # goes by what there is
    eventually(lambda: link(d).name == "a")
    load(p, d, 4)
    assert known["a"].reads[16]
    eventually(lambda: p.workers[0]._pipes.count == 1)
    assert not d.workers[0]._links._retired


def test_a_better_pipe_that_still_cannot_be_had_costs_the_loads_nothing(register, pair):
    far = type("Far", (InprocPipe,), {"traits": Traits(reach=Reach.NETWORK)})
    known = register(a={"fails": {"asks": OSError("no handle")}}, b=far)
    p, d = pair(connect_timeout_s=2.0)
    load(p, d)
    used = link(d).lines[0]
    known["a"].fails.clear()
    known["a"].hangs.add("asks")
    later(d, experience._PASSED_OVER_S)
    for number in range(2, 6):
        load(p, d, number)
    assert "no handle" in link(d).passed["a"], "loads have waited until its opening was given up"
    eventually(lambda: "it did not open" in link(d).passed["a"], 20)
    assert link(d).lines == [used]
    load(p, d, 7)


def test_pipes_are_measured_again_when_that_was_long_ago_and_loads_under_way_go_on(register, pair, monkeypatch):
    known = register(a={}, b={"seconds_per_mb": 0.01})
    p, d = pair(transfer_timeout_s=1.5)
    monkeypatch.setattr(links, "_SLACK_S", 0.1)
    choose(p, d)
    assert link(d).name == "a"
    used = link(d).lines[0]
    known["a"].seconds_per_mb, known["b"].seconds_per_mb = 0.01, 0.0
    later(d, experience._BELIEVED_S)
    load(p, d, 2)
    eventually(lambda: isinstance(link(d).pipe, trial.Trial))
    assert link(d).lines[0] is used
    choose(p, d)
    assert link(d).name == "b"
    eventually(lambda: used.ended)
    eventually(lambda: p.workers[0]._pipes.count == 1)


@pytest.mark.parametrize("pipe", [Backend("a"), Backend("auto", {"measure": False})])
def test_nothing_is_measured_where_a_pipe_is_named_or_measuring_is_switched_off(register, pair, pipe):
    known = register(a={"seconds_per_mb": 0.002}, b={})
    p, d = pair(pipe)
    load(p, d)
    assert link(d).name == "a"
    assert known["a"].reads == {16: 1}
    assert not known["b"].live


def test_a_pipe_that_cannot_carry_the_memory_is_passed_over_and_the_line_says_the_cure(register, pair, caplog):
    no = Verdict(False, "its memory comes from expandable segments", "unset expandable_segments")
    register(a={"accepts": classmethod(lambda *_: no)}, b={})
    p, d = pair()
    load(p, d)
    assert link(d).name == "b"
    assert "not a: this engine cannot use it, its memory comes from expandable segments (unset exp" in lines(caplog)[0]


def test_auto_gives_each_pipe_the_options_it_has_for_it(register, pair):
    given = []

    class Notes(Third):
        def __init__(self, spec):
            given.append(dict(spec.options))
            super().__init__(dataclasses.replace(spec, options={}))

    register(a=type("NotesOwn", (Notes,), {"gate": threading.Event(), "reads": Counter(), "live": set()}))
    p, d = pair(Backend("auto", {"options": {"a": {"bind_host": "127.0.0.2"}}}))
    load(p, d)
    assert given == [{"bind_host": "127.0.0.2"}] * 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"measures": True}, ConfigError, "did you mean 'measure'"),
        ({"options": {"tpc": {}}}, UnknownBackendError, "did you mean 'tcp'"),
        ({"options": {"tcp": 5}}, ConfigError, r"pipe\.options\.tcp must be an object"),
        ({"options": 5}, ConfigError, r"pipe\.options must be an object"),
    ],
)
def test_wrong_options_of_auto_are_refused_by_name(options, error, text):
    with pytest.raises(error, match=text):
        AutoOptions.of(Backend("auto", options))


@pytest.fixture
def real(register, monkeypatch):
    """Real pipes as between hosts, where all are as near."""

    def having(*names):
        for cls in register(*names).values():
            monkeypatch.setattr(cls, "traits", Traits(cls.traits.devices, Reach.NETWORK, zero_copy=True))

    return having


@pytest.mark.parametrize("names", [("tcp", "shm"), ("tcp", "nixl"), ("tcp", "shm", "nixl")])
def test_real_pipes_are_tried_and_one_is_left_afterwards(real, pair, caplog, names):
    real(*names)
    p, d = pair(connect_timeout_s=10.0)
    choose(p, d, blocks=24)
    assert link(d).name in names
    assert len(re.findall(r"[\d.]+ GB/s", lines(caplog)[-1])) == len(names)
    eventually(lambda: p.workers[0]._pipes.count == 1)
    load(p, d, 2)
    assert sum(line.pipe is not None for line in link(d).lines) == 1


def test_a_trial_leaves_no_thread_file_or_shared_memory(real):
    real("tcp", "shm", "nixl")
    before = None
    for _ in range(2):  # some things are made once for the process
        before = Holdings.now()
        with engines(connect_timeout_s=10.0) as (p, d):
            choose(p, d, blocks=24)
    assert_nothing_left(before)


def test_a_medium_whose_openings_hang_is_not_opened_for_ever_more_peers(register, pair, monkeypatch, caplog):
    monkeypatch.setattr("kvconnect.buffers.lines._SLACK_S", 0.1)
    monkeypatch.setattr("kvconnect.buffers.lines._MAX_HANGING", 1)
    known = register(a={"hangs": {"asks"}}, b={})
    p, d = pair(connect_timeout_s=0.5)
    load(p, d)
    with closing(Engine("P2", produces=True, pipe="auto", shape=layout(BLOCKS, MB // 2, 2), group=group())) as p2:
        load(p2, d, 2)
        assert "not a: it cannot be opened: 1 such pipes hang still" in lines(caplog)[-1]
    known["a"].gate.set()
