"""What the NCCL pipe says of itself where there is no GPU."""

from __future__ import annotations

import pytest

from kvconnect import registry
from kvconnect.config import parse_options
from kvconnect.connectors import named
from kvconnect.cuda import nccl
from kvconnect.errors import ConfigError, UnavailableBackendError
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.nccl import NcclOptions, NcclPipe

HERE = {"host": "a", "uuid": "aa", "nccl": 22809}


def verdict(**other):
    ours, theirs = NcclPipe.can_reach(HERE, {**HERE, **other}), NcclPipe.can_reach({**HERE, **other}, HERE)
    assert ours.ok == theirs.ok
    return ours


def test_two_gpus_are_joined_wherever_they_are():
    assert verdict(uuid="bb")
    assert verdict(uuid="bb", host="b", nccl=22810)


def test_one_gpu_is_refused_with_a_cure():
    refused = verdict()
    assert not refused
    assert "one GPU, which NCCL refuses" in refused.reason
    assert "cuda_ipc" in refused.cure


def test_another_release_of_nccl_is_refused_by_its_number():
    refused = verdict(uuid="bb", nccl=22703)
    assert not refused
    assert {"22809", "22703"} <= set(refused.reason.split())


def test_an_end_without_a_gpu_is_refused():
    assert "an end has none" in NcclPipe.can_reach(HERE, {"host": "a"}).reason
    assert not NcclPipe.can_reach({}, {})


def test_where_cuda_is_missing_the_pipe_says_so(monkeypatch):
    monkeypatch.setattr(nccl, "missing", lambda: ("there is no NVIDIA GPU here", "use tcp"))
    found = NcclPipe.availability()
    assert (found.ok, found.reason, found.cure) == (False, "there is no NVIDIA GPU here", "use tcp")
    with pytest.raises(UnavailableBackendError, match="pipe 'nccl' is not available: there is no NVIDIA GPU"):
        registry.pipe("nccl")


def test_the_connector_of_that_name_uses_it():
    assert named.KvConnectNccl.pipe == "nccl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ctas": 0}, "pipe.max_ctas is 0; it must be at least 1"),
        ({"max_ctas": 65}, "at most 64"),
        ({"multiprocessors": -1}, "pipe.multiprocessors is -1"),
        ({"slot_bytes": 4096}, "pipe.slot_bytes is 4096; it must be at least 1048576"),
        ({"slots": 3}, "pipe.slots is not a known option"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(NcclOptions, options, "pipe")


def test_a_device_that_is_no_gpu_is_refused_before_anything_else():
    spec = PipeSpec("asks", lambda _: pytest.fail("the ends met"), "cpu")
    with pytest.raises(ConfigError, match="'cpu' is not a CUDA device"):
        NcclPipe(spec)
