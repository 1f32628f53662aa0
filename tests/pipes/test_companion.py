"""Host pipes beside a device pipe: two of them over one exchange."""

from typing import ClassVar

import pytest
import torch

from kvconnect import registry
from kvconnect.config import Backend
from kvconnect.errors import ConfigError, HandshakeError, UnavailableBackendError, UnknownBackendError
from kvconnect.pipes.base import Pipe, PipeSpec, Verdict
from kvconnect.pipes.companion import join
from kvconnect.pipes.shm import ShmPipe
from kvconnect.testing.channels import MemoryExchange
from kvconnect.testing.leaks import Holdings, assert_nothing_left
from kvconnect.testing.peers import LIMIT_S, spawn

AUTO = Backend("auto")


def joined(asks=AUTO, serves=AUTO):
    """Join two ends in this process; return both, or raise what the asking end raised."""
    exchange = MemoryExchange(LIMIT_S)

    def serve():
        exchange.await_asked()
        try:
            return join(PipeSpec("serves", exchange.serve, timeout_s=5.0), {"from": "serves"}, serves)
        except BaseException as error:
            exchange.fail(error)
            raise

    there = spawn(serve)
    here = spawn(lambda: join(PipeSpec("asks", exchange.ask, timeout_s=5.0), {"from": "asks"}, asks))
    errors = [here.exception(LIMIT_S), there.exception(LIMIT_S)]
    for end in (here, there):
        if any(errors) and end.exception() is None:
            end.result().abort()
    if any(errors):
        raise errors[0] or errors[1]
    return here.result(), there.result()


def works(here, there):
    for sender, receiver in ((here.out, there.into), (there.into, here.out), (there.out, here.into)):
        sender.send_tensor(torch.arange(7))
        assert torch.equal(receiver.recv_tensor(), torch.arange(7))
    for end in (here, there):
        end.abort()


def test_two_pipes_and_each_ends_own_message_go_over_one_exchange():
    here, there = joined()
    assert (here.theirs, there.theirs) == ({"from": "serves"}, {"from": "asks"})
    assert here.name == there.name == "shm"
    works(here, there)


def test_where_the_nearest_does_not_reach_the_next_one_is_taken(monkeypatch):
    def refuse(*_):
        return Verdict(False, "another network namespace")

    monkeypatch.setattr(ShmPipe, "can_reach", classmethod(refuse))
    here, there = joined()
    assert here.name == there.name == "tcp"
    works(here, there)


@pytest.mark.parametrize(("asks", "serves"), [("tcp", "auto"), ("auto", "tcp"), ("tcp", "tcp")])
def test_an_end_may_insist_on_a_medium(asks, serves):
    here, there = joined(Backend(asks), Backend(serves))
    assert here.name == there.name == "tcp"
    works(here, there)


def test_options_of_auto_are_those_of_tcp():
    here, there = joined(Backend("auto", {"bind_host": "127.0.0.2"}), Backend("auto", {"chunk_bytes": 8192}))
    assert here.name == "shm"
    works(here, there)


def test_ends_without_a_common_medium_say_what_each_has():
    with pytest.raises(HandshakeError, match="shm: only one side has it"):
        joined(Backend("shm"), Backend("tcp"))


def test_a_medium_that_cannot_be_had_is_passed_over_and_one_that_is_wanted_is_named(monkeypatch):
    monkeypatch.setattr(ShmPipe, "availability", classmethod(lambda _: Verdict(False, "no pidfd")))
    here, there = joined()
    assert here.name == "tcp"
    works(here, there)
    with pytest.raises(UnavailableBackendError, match="no pidfd"):
        join(PipeSpec("asks", dict), {}, Backend("shm"))
    with pytest.raises(UnknownBackendError, match="shmm"):
        join(PipeSpec("asks", dict), {}, Backend("shmm"))
    with pytest.raises(ConfigError, match=r"pipe\.bind"):
        join(PipeSpec("asks", dict), {}, Backend("tcp", {"bind": 1}))


@pytest.mark.parametrize(
    "theirs",
    [
        {},
        {"hosts": 3},
        {"hosts": [["shm"]]},
        {"hosts": [["shm", {"at": {}, "messages": [{}]}]], "own": {}},
        {"hosts": []},
    ],
)
def test_an_answer_of_another_kind_of_pipe_is_refused_and_leaves_nothing_open(theirs):
    joined_once = joined()  # starts what the process shares
    works(*joined_once)
    before = Holdings.now()
    for side in ("asks", "serves"):
        with pytest.raises(HandshakeError):
            join(PipeSpec(side, lambda _: theirs), {}, AUTO)
    assert_nothing_left(before)


def test_an_exchange_that_fails_leaves_nothing_open():
    works(*joined())
    before = Holdings.now()

    def fail(_):
        raise HandshakeError("no answer")

    for side in ("asks", "serves"):
        with pytest.raises(HandshakeError, match="no answer"):
            join(PipeSpec(side, fail), {}, AUTO)
    assert_nothing_left(before)


def test_a_pipe_that_exchanges_nothing_can_be_a_companion(monkeypatch):
    class Silent(Pipe):
        opened: ClassVar = []

        def __init__(self, spec):
            self.opened.append(spec.side)

        def send_tensor(self, tensor):
            raise NotImplementedError

        recv_tensor = close = send_tensor

    monkeypatch.setattr(registry, "pipe", lambda _: Silent)
    here, _ = joined(Backend("silent"), Backend("silent"))
    assert here.name == "silent"
    assert sorted(Silent.opened) == ["asks", "asks", "serves", "serves"]
