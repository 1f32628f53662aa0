"""Real routers before real engines, unchanged: each hands the KV over, and answers as one engine would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvconnect.demo import client as api
from kvconnect.demo import engines, model
from kvconnect.demo.client import Prompt
from kvconnect.demo.engines import Server, free_port
from tests.vllm.fleet import Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.parametrize("fleet", ["shm"], indirect=True)]

START_S = 60.0


def vllm_router(fleet: Fleet, port: int) -> list[str]:
    """vLLM's own, from PyPI: a ticket goes from the prefill's answer to the decode request."""
    return [
        *("vllm_router.launch_router", "--vllm-pd-disaggregation", "--policy", "round_robin"),
        *_list(fleet),
        *_at(port),
    ]


def vllm_router_by_discovery(fleet: Fleet, port: int) -> list[str]:
    """The same without a list: the engines register."""
    return [
        *("vllm_router.launch_router", "--vllm-pd-disaggregation", "--policy", "round_robin"),
        *("--vllm-discovery-address", fleet.plan.router),
        *_at(port),
    ]


def smg(fleet: Fleet, port: int) -> list[str]:
    """The successor of SGLang's: it passes on the ticket that a producer gives unasked."""
    return [
        *("smg", "launch", "--pd-disaggregation", "--policy", "round_robin"),
        *_list(fleet),
        *_at(port),
    ]


def _list(fleet: Fleet) -> Iterator[str]:
    for leg, servers in (("--prefill", fleet.producers), ("--decode", fleet.consumers)):
        for engine in servers:
            yield from (leg, engine.url)


def _at(port: int) -> tuple[str, ...]:
    return "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())


@contextmanager
def running(name: str, command: Callable[[Fleet, int], list[str]], fleet: Fleet, folder: Path) -> Iterator[Server]:
    """Run a router."""
    port = free_port()
    router = Server(name, command(fleet, port), port, folder / f"{name}.log")
    try:
        engines.start([router], print)
        engines.wait_ready([router], START_S, print)
        yield router
    finally:
        engines.stop([router])


@pytest.mark.parametrize("command", [vllm_router, vllm_router_by_discovery, smg])
def test_a_router_hands_over_and_answers_as_one_engine(
    fleet: Fleet, command: Callable[[Fleet, int], list[str]], tmp_path: Path
) -> None:
    # As text, which is all that every router takes.
    text = "\n".join(model.training_text())
    prompts = [Prompt(text[7000 * n :][:length]) for n, length in enumerate((20, 150, 600, 2500))]
    prompts += [Prompt([{"role": "user", "content": text[300:700]}], chat=True)]
    wanted = [fleet.reference(prompt) for prompt in prompts]
    with running(command.__name__, command, fleet, tmp_path) as router:
        before = sum(fleet.metric(engine, api.EXTERNAL_TOKENS) for engine in fleet.consumers)
        answers = fleet.together(lambda prompt=prompt: fleet.ask(router, prompt) for prompt in prompts)
        assert [answer.text for answer in answers] == [one.text for one in wanted]
        fetched = sum(fleet.metric(engine, api.EXTERNAL_TOKENS) for engine in fleet.consumers) - before
        assert fetched >= sum(answer.prompt_tokens - 1 for answer in answers)
        streamed = api.stream(fleet.http, router.url, prompts[1])
        assert streamed.text == wanted[1].text
    assert fleet.settle() == []
