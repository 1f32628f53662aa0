"""Engines of two workers each on GPUs: parts, refusals, and hand-overs both ways under load.

NCCL's kernels of two communicators on one GPU may wait for each other for ever: those of vLLM's own
tensor parallelism, and those of a hand-over. Here both run at once, in both directions, on all GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="its engines run here")

from kvconnect.demo.client import Prompt
from tests.gpu.agreement import Agreement, Choice, ask, handed_over
from tests.gpu.fleets import FLOAT32, Case, started
from tests.vllm import workers
from tests.vllm.fleet import Fleet, unique

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

#: vLLM's workers are to use NCCL for sums of every size.
TWO = ("--tensor-parallel-size", "2", "--disable-custom-all-reduce")
NCCL_ONLY = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
ONE = ("--tensor-parallel-size", "1")
BOTH_WAYS, TOKENS, AT_ONCE = 60, 32, 12
LIMIT_S = 90.0


@pytest.fixture(scope="module", params=["KvConnectNccl", "KvConnectCudaIpc"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines of two workers and two GPUs each, and one of one worker; all produce and consume."""
    case = Case(request.param, FLOAT32 + TWO, NCCL_ONLY, devices=((0, 1), (2, 3)))
    both = ("kv_both", "kv_both")
    with started(
        case,
        tmp_path_factory.mktemp(f"gpu-parallel-{request.param}"),
        roles=both,
        strangers=1,
        stranger_role="kv_both",
        stranger_arguments=ONE,
    ) as fleet:
        yield fleet
        assert fleet.settle() == []


@pytest.mark.parametrize("tokens", [1, 17, 700])
def test_each_worker_fetches_its_part(fleet: Fleet, tokens: int) -> None:
    prompt = fleet.prompt(tokens, 7 * tokens, max_tokens=4)
    workers.each_worker_fetches_its_part(fleet, prompt, fleet.by_ticket)


def test_hand_overs_both_ways_while_both_decode(fleet: Fleet) -> None:
    ends = (fleet.producers[0], fleet.consumers[0])
    prompts = [fleet.prompt(100 + 13 * i, i, max_tokens=TOKENS) for i in range(BOTH_WAYS)]

    def there(number: int) -> list[Choice]:
        producer, consumer = ends if number % 2 else ends[::-1]
        return handed_over(fleet, prompts[number], producer, consumer)

    def call() -> list[list[Choice]]:
        return fleet.together([functools.partial(there, i) for i in range(BOTH_WAYS)], AT_ONCE, LIMIT_S)

    (got, there_fetched), here_fetched = fleet.fetched(ends[0], lambda: fleet.fetched(ends[1], call))
    assert there_fetched + here_fetched >= sum(len(prompt.content) - 1 for prompt in prompts)
    alone = [functools.partial(ask, fleet, ends[1], _alone(prompt)) for prompt in prompts]
    assert not Agreement.of(zip(got, fleet.together(alone, AT_ONCE, LIMIT_S), strict=True)).wrong


def test_a_peer_with_fewer_workers_is_refused_by_name_and_recomputes(fleet: Fleet) -> None:
    producer, stranger = fleet.producers[0], fleet.strangers[0]
    workers.is_refused(fleet, producer, stranger, "tensor_parallel_size differs: ours 1, theirs 2", 500)


def test_a_peer_with_more_workers_is_refused_by_name_and_recomputes(fleet: Fleet) -> None:
    consumer, stranger = fleet.consumers[0], fleet.strangers[0]
    workers.is_refused(fleet, stranger, consumer, "tensor_parallel_size differs: ours 2, theirs 1", 510)


def _alone(prompt: Prompt) -> Prompt:
    return Prompt(prompt.content, prompt.max_tokens, salt=unique("alone"))
