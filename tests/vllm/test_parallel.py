"""Engines of several: data-parallel ones behind one server, and tensor-parallel workers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import httpx
import pytest

from kvconnect.demo.client import EXTERNAL_TOKENS, Answer, Prompt
from kvconnect.demo.engines import Server, free_port
from tests.vllm import workers
from tests.vllm.conftest import START_S, running
from tests.vllm.fleet import BLOCK, CHUNK, Fleet, Plan, unique

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(START_S + 300)]

RANKS = (0, 1)
USED = "vllm:kv_cache_usage_perc"


# -- data parallel ------------------------------------------------------------------


def _port_pair() -> int:
    """Return a port that is free, as is the one behind it."""
    ports = {free_port()}
    while not (pairs := [port for port in ports if port + 1 in ports]):
        ports.add(free_port())
    return pairs[0]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two producing engines behind one server and one configured port, two consuming ones behind another server."""
    plan = Plan(
        "KvConnectTcp",
        producers=1,
        consumers=1,
        tiny=False,
        # Four engines on fewer cores may stand still for longer than a look-up waits for them, or a lease lasts.
        extra_config={"port": _port_pair(), "lookup_timeout_s": 20.0},
        lease_s=30.0,
        arguments=("--data-parallel-size", "2"),
    )
    with running(plan, tmp_path_factory.mktemp("data-parallel")) as fleet:
        yield fleet
        for rank in RANKS:  # `settle` pokes one of them only
            hand_over(fleet, Prompt(unique("poke"), max_tokens=1), rank, rank)
        assert fleet.settle() == []
        # vLLM passes on what the first of them says of its blocks. The gauge is of the last step of each,
        # in which the blocks of one or two pokes, of a thousand, were still lent.
        assert max(used for engine in fleet.engines for used in by_rank(engine, USED).values()) < 5e-3


def hand_over(fleet: Fleet, prompt: Prompt, p: int, d: int) -> Answer:
    """Hand over from data-parallel engine ``p`` to ``d`` by ticket."""
    params = fleet.ticket(fleet.producers[0], prompt, rank=p)
    assert params["kvconnect"]["engine"].endswith(f"_dp{p}")
    return fleet.ask(fleet.consumers[0], prompt, rank=d, kv_transfer_params=params)


def by_rank(server: Server, name: str) -> dict[int, float]:
    """Return a metric of each data-parallel engine behind a server."""
    name, _, labels = name.partition("{")
    text = httpx.get(server.url + "/metrics", trust_env=False).text
    samples = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    found = [(re.search(r'engine="(\d+)"', inner), inner, value) for inner, value in samples]
    return {int(rank[1]): float(value) for rank, inner, value in found if rank and labels.rstrip("}") in inner}


@pytest.mark.parametrize("d", RANKS)
@pytest.mark.parametrize("p", RANKS)
def test_a_ticket_leads_to_the_engine_that_issued_it(data_parallel: Fleet, p: int, d: int) -> None:
    prompt = data_parallel.prompt(3 * BLOCK + 5, 10 * p + d)
    consumer = data_parallel.consumers[0]
    before = by_rank(consumer, EXTERNAL_TOKENS)
    answer = hand_over(data_parallel, prompt, p, d)
    after = by_rank(consumer, EXTERNAL_TOKENS)
    assert after[d] - before[d] >= 3 * BLOCK + 4
    assert after[1 - d] == before[1 - d]
    assert answer.texts == data_parallel.reference(prompt).texts


def test_each_engine_has_the_configured_port_plus_its_number(data_parallel: Fleet) -> None:
    port = data_parallel.plan.extra_config["port"]
    tickets = [
        data_parallel.ticket(data_parallel.producers[0], data_parallel.prompt(50, 40 + rank), rank=rank)
        for rank in RANKS
    ]
    assert [ticket["kvconnect"]["at"] for ticket in tickets] == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]


@pytest.mark.parametrize("route", ["by_ticket", "by_label", "by_content"])
def test_whichever_engines_vllm_chooses(data_parallel: Fleet, route: str) -> None:
    ways = {"by_ticket": data_parallel.by_ticket, "by_label": data_parallel.by_label}
    way: Callable[[Prompt], Answer] = ways.get(route, data_parallel.by_content)
    for seed in range(3):
        prompt = data_parallel.prompt(CHUNK + 50 + seed, 50 + 7 * len(route) + seed)
        answer, fetched = data_parallel.fetched(data_parallel.consumers[0], functools.partial(way, prompt))
        assert fetched >= CHUNK + 49 + seed
        assert answer.texts == data_parallel.reference(prompt).texts


def test_many_at_once_between_all_engines(data_parallel: Fleet) -> None:
    prompts = [data_parallel.prompt(20 + 31 * i, 200 + i, max_tokens=8) for i in range(16)]
    calls = [functools.partial(data_parallel.by_ticket, prompt) for prompt in prompts]
    answers, fetched = data_parallel.fetched(data_parallel.consumers[0], lambda: data_parallel.together(calls))
    assert fetched >= sum(20 + 31 * i for i in range(16)) - 16
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.texts == data_parallel.reference(prompt).texts


def test_a_list_of_prompts_is_spread_over_engines_and_found_again(data_parallel: Fleet) -> None:
    singles = [data_parallel.prompt(tokens, 300 + tokens) for tokens in (5, 100, 300)]
    prompt = Prompt([single.content for single in singles])  # type: ignore[arg-type]
    request_id = unique("list")
    consumer = data_parallel.consumers[0]
    params = data_parallel.ticket(data_parallel.producers[0], prompt, request_id=request_id)
    answer, fetched = data_parallel.fetched(
        consumer, lambda: data_parallel.ask(consumer, prompt, request_id=request_id, kv_transfer_params=params)
    )
    assert fetched >= 405 - 3
    assert answer.texts == tuple(data_parallel.reference(single).text for single in singles)


def test_two_choices_under_one_ticket_may_run_on_two_engines(data_parallel: Fleet) -> None:
    greedy = {"temperature": 1.0, "top_k": 1}  # vLLM forbids n > 1 with temperature 0
    prompt = data_parallel.prompt(200, 400, more=greedy)
    params = data_parallel.ticket(data_parallel.producers[0], prompt)
    both = Prompt(prompt.content, more=greedy | {"n": 2})
    consumer = data_parallel.consumers[0]
    call = functools.partial(data_parallel.ask, consumer, both, kv_transfer_params=params)
    answer, fetched = data_parallel.fetched(consumer, call)
    assert fetched >= 199  # the one that was second computes its own
    assert len(answer.texts) == 2
    assert set(answer.texts) == set(data_parallel.reference(prompt).texts)


# -- tensor parallel -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A producer and a consumer of two workers each, and an engine of one that does both.

    vLLM's workers wait for each other without sleeping, so on fewer cores than workers a step may take seconds.
    """
    plan = Plan(
        "KvConnect",
        producers=1,
        consumers=1,
        tiny=False,
        patient=True,
        lease_s=100,
        extra_config={"connect_timeout_s": 60, "lookup_timeout_s": 60, "release_timeout_s": 100},
        strangers=1,
        stranger_arguments=("--tensor-parallel-size", "1"),
        stranger_role="kv_both",
        arguments=("--tensor-parallel-size", "2"),
    )
    with running(plan, tmp_path_factory.mktemp("tensor-parallel")) as fleet:
        yield fleet
        assert fleet.settle() == []


@pytest.mark.parametrize(
    ("route", "tokens"),
    [("by_ticket", 1), ("by_ticket", BLOCK + 1), ("by_ticket", CHUNK + 200), ("by_label", 100), ("by_content", 100)],
)
def test_each_worker_fetches_its_part(tensor_parallel: Fleet, route: str, tokens: int) -> None:
    prompt = tensor_parallel.prompt(tokens, 7 * tokens + len(route), max_tokens=4)
    workers.each_worker_fetches_its_part(tensor_parallel, prompt, getattr(tensor_parallel, route))


def test_several_at_once_between_several_workers(tensor_parallel: Fleet) -> None:
    prompts = [tensor_parallel.prompt(20 + 37 * i, 400 + i, max_tokens=4) for i in range(4)]
    calls = [functools.partial(tensor_parallel.by_ticket, prompt) for prompt in prompts]
    answers, fetched = tensor_parallel.fetched(tensor_parallel.consumers[0], lambda: tensor_parallel.together(calls))
    assert fetched >= sum(20 + 37 * i for i in range(4)) - 4
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.texts == tensor_parallel.reference(prompt).texts


def test_a_peer_with_fewer_workers_is_refused_by_name_and_recomputes(tensor_parallel: Fleet) -> None:
    producer, stranger = tensor_parallel.producers[0], tensor_parallel.strangers[0]
    workers.is_refused(tensor_parallel, producer, stranger, "tensor_parallel_size differs: ours 1, theirs 2", 500)


def test_a_peer_with_more_workers_is_refused_by_name_and_recomputes(tensor_parallel: Fleet) -> None:
    consumer, stranger = tensor_parallel.consumers[0], tensor_parallel.strangers[0]
    workers.is_refused(tensor_parallel, stranger, consumer, "tensor_parallel_size differs: ours 2, theirs 1", 510)
