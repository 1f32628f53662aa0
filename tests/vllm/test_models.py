"""Model kinds beside plain attention, a MultiConnector's child, and peers that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvconnect.buffers.ticket import Ticket
from kvconnect.connectors import compat
from kvconnect.demo.client import Prompt
from tests.vllm.conftest import running
from tests.vllm.fleet import CHUNK, Fleet, Plan

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

#: A window of attention layers that alternate with full ones, as a child of MultiConnector and with a
#: consumer of another block size; and MLA, by the pipe that `auto` takes.
PLANS = {
    "sliding": Plan("KvConnect", producers=1, consumers=1, tiny=False, variant="sliding", multi=True, strangers=1),
    "mla": Plan("KvConnect", producers=1, consumers=1, tiny=False, variant="mla"),
}


@pytest.fixture(scope="module", params=["sliding", pytest.param("mla", marks=pytest.mark.slow)])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet a model kind."""
    if request.param == "mla" and "CPU_MLA" not in AttentionBackendEnum.__members__:
        pytest.skip("this vLLM has no MLA on CPUs")
    with running(PLANS[request.param], tmp_path_factory.mktemp(f"model-{request.param}")) as fleet:
        yield fleet
        assert fleet.settle() == []


def several_groups_are_refused(models: Fleet) -> bool:
    """Whether this vLLM would stop at a load that failed, so that consumers of such models compute by themselves."""
    return models.plan.variant == "sliding" and not compat.reports_failed_requests()


@pytest.mark.parametrize("tokens", [33, 100, CHUNK + 200])
def test_hand_over_equals_one_engine(models: Fleet, tokens: int) -> None:
    prompt = models.prompt(tokens, tokens)
    params = models.ticket(models.producers[0], prompt)
    blocks = Ticket.from_wire(params["kvconnect"]).blocks
    lent = models.digests(models.producers[0])
    consumer = models.consumers[0]
    answer, fetched = models.fetched(consumer, lambda: models.ask(consumer, prompt, kv_transfer_params=params))
    if several_groups_are_refused(models):
        assert fetched == 0
    else:
        assert fetched >= tokens - 1
    if models.plan.variant == "mla":
        # vLLM's CPU kernels for MLA disagree among themselves: one engine alone continues a
        # prompt differently when its last token went through the decode kernel, as it does
        # after a hand-over. So the blocks are compared, all that decoding has not written to.
        here = set(models.digests(consumer).values())
        assert {lent[block] for block in blocks[0][:-1]} <= here
    else:
        assert answer.texts == models.reference(prompt).texts


def test_after_the_producer_went_on_generating(models: Fleet) -> None:
    if models.plan.variant == "mla":
        pytest.skip("vLLM's CPU kernels for MLA disagree among themselves, see above")
    # A window may have moved past blocks that the consumer needs: then nothing is offered.
    prompt = models.prompt(300, 1, max_tokens=80, more={"ignore_eos": True})
    models.ask(models.producers[0], prompt)
    short = replace(prompt, max_tokens=16)
    answer = models.ask(models.consumers[0], short)
    assert answer.texts == models.reference(short).texts


def test_a_peer_whose_blocks_differ_recomputes_and_says_so_once(models: Fleet) -> None:
    if not models.strangers:
        pytest.skip("this fleet has no engine with another block size")
    if several_groups_are_refused(models):
        pytest.skip("this vLLM cannot take back a load that failed where there are several groups: nobody asks")
    stranger = models.strangers[0]
    for seed in (2, 3):
        prompt: Prompt = models.prompt(150, seed)
        params = models.ticket(models.producers[0], prompt)
        answer, fetched = models.fetched(
            stranger,
            lambda: models.ask(stranger, prompt, kv_transfer_params=params),  # noqa: B023
        )
        assert fetched == 0
        assert answer.texts == models.reference(prompt).texts
    said = [line for line in stranger.log.read_text().splitlines() if "differs" in line]
    assert len(said) == 1
    assert "blocks differs" in said[0]
