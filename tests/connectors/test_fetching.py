"""The consumer's half over a buffer end whose answers the test chooses."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvconnect.buffers.base import Claim, Miss, SchedulerEnd
from kvconnect.connectors.fetching import Fetching
from kvconnect.connectors.groups import Group
from kvconnect.connectors.identity import key_of

GROUPS = (Group(0, 4, None, ("layer",)),)


def test_a_claim_that_ended_before_blocks_were_allocated_is_a_load_that_is_refused() -> None:
    end = create_autospec(SchedulerEnd, instance=True)
    fetching = Fetching(end, "ns", GROUPS, content_lookup=True)
    request = Request("r", list(range(8)), SamplingParams(max_tokens=1), None)
    key = key_of(request, "ns")
    assert key is not None
    end.found.return_value = Claim("g", key, ((5, 6),))
    end.commit.return_value = Miss("gone", "its lease has ended")
    assert fetching.external_tokens(request, 0) == 8
    fetching.allocated(request, [[1, 2]], 8)
    (load,) = fetching.take_loads()
    assert "gone" in load.refused
    assert load.local == ((1, 2),)
    end.settle.assert_not_called()
    fetching.loaded(["r"])
    end.settle.assert_called_once_with("r")


def test_a_claim_that_ended_before_it_was_asked_for_again_is_computed_locally() -> None:
    end = create_autospec(SchedulerEnd, instance=True)
    fetching = Fetching(end, "ns", GROUPS, content_lookup=True)
    request = Request("r", list(range(8)), SamplingParams(max_tokens=1), None)
    key = key_of(request, "ns")
    assert key is not None
    end.found.return_value = Claim("g", key, ((5, 6),))
    assert fetching.external_tokens(request, 0) == 8
    end.found.return_value = Miss("gone", "its lease has ended")
    assert fetching.external_tokens(request, 0) == 0
    fetching.allocated(request, [[1, 2]], 0)
    assert fetching.take_loads() == ()
    end.commit.assert_not_called()
