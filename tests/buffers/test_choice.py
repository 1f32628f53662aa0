"""Which pipe joins two workers, and which of them a worker offers."""

import pytest

from kvconnect import registry
from kvconnect.buffers.choice import choose_pipe, describe_pipes
from kvconnect.errors import HandshakeError, UnavailableBackendError, UnknownBackendError
from kvconnect.paging import PagedLayout, PagedMemory
from kvconnect.pipes.base import Pipe, Reach, Traits, Verdict
from kvconnect.pipes.inproc import InprocPipe
from tests.buffers.engines import Engine, group


def pipes(monkeypatch, **classes):
    monkeypatch.setattr(registry, "pipe", classes.__getitem__)


def stub(reach=Reach.NETWORK, reaches=True, **traits):
    class Stub(InprocPipe):
        @classmethod
        def can_reach(cls, local, remote):
            return Verdict(reaches, "" if reaches else "too far")

    Stub.traits = Traits(reach=reach, **traits)
    return Stub


def both(*names):
    return {"pipes": {name: {} for name in names}}


def test_the_nearest_pipe_that_reaches_is_chosen_and_the_others_are_explained(monkeypatch):
    pipes(monkeypatch, far=stub(), near=stub(Reach.HOST), nearest=stub(Reach.PROCESS, reaches=False))
    found, passed = choose_pipe(both("far", "near", "nearest", "ours"), both("far", "near", "nearest"))
    assert [candidate.name for candidate in found] == ["near", "far"]
    assert passed == {"nearest": "too far", "ours": "only one side has it"}


def test_no_common_pipe_is_refused_with_every_reason(monkeypatch):
    pipes(monkeypatch, near=stub(Reach.HOST, reaches=False))
    with pytest.raises(HandshakeError, match="near: too far; other: only one side has it"):
        choose_pipe(both("near"), both("near", "other"))


def test_an_unknown_pipe_fails_at_the_start():
    with pytest.raises(UnknownBackendError, match="did you mean 'tcp'"):
        Engine("D", consumes=True, pipe="tpc", group=group())


def test_every_available_pipe_is_described():
    found = describe_pipes("auto", PagedMemory(PagedLayout((), ()), []))["pipes"]
    assert "inproc" in found
    assert all(issubclass(registry.pipe(name), Pipe) for name in found)


def test_a_pipe_that_refuses_the_memory_is_passed_over_and_named_if_it_was_asked_for(monkeypatch):
    memory = PagedMemory(PagedLayout((), ()), [])
    refusal = Verdict(False, "its memory comes from expandable segments", "unset expandable_segments")
    monkeypatch.setattr(registry.pipe("tcp"), "accepts", lambda _: refusal)
    assert "tcp" not in describe_pipes("auto", memory)["pipes"]
    with pytest.raises(UnavailableBackendError, match=r"expandable segments.*unset expandable_segments"):
        describe_pipes("tcp", memory)
