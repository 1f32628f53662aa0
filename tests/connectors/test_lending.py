"""The producer's half over vLLM's real block pool and a real buffer end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request, RequestStatus

from kvconnect.buffers.base import EndSettings, SchedulerEnd
from kvconnect.buffers.remote import RemoteBuffer
from kvconnect.config import Config
from kvconnect.connectors.compat import BlockPins
from kvconnect.connectors.groups import Group
from kvconnect.connectors.lending import Lending, Limits

BLOCK = 4
POOL = 41  # one of them is the null block
GROUPS = (Group(0, BLOCK, None, ("layer",)),)


@dataclass
class Producer:
    """A pool, and requests that come and go on it as vLLM's scheduler lets them."""

    pool: BlockPool
    end: SchedulerEnd
    lending: Lending
    count: int = 0
    last: list[list[int]] = field(default_factory=list)

    def serve(self, prompt_tokens: int, *, asked: bool = False, status: str = "FINISHED_LENGTH_CAPPED") -> dict | None:
        """Run one request from admission to its end."""
        self.count += 1
        params = {"kv_transfer_params": {"do_remote_decode": True}} if asked else None
        tokens = [self.count * 1000 + i for i in range(prompt_tokens)]
        request = Request(f"r{self.count}", tokens, SamplingParams(max_tokens=1, extra_args=params), None)
        need = -(-prompt_tokens // BLOCK)
        self.lending.make_room(need)
        blocks = self.pool.get_new_blocks(need)
        request.num_computed_tokens = prompt_tokens
        request.status = RequestStatus[status]
        table = [[block.block_id for block in blocks]]
        answer = self.lending.finished(request, table)
        self.pool.free_blocks(reversed(blocks))
        self.lending.after_step()
        return answer

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()


@pytest.fixture
def producer(request: pytest.FixtureRequest) -> Iterator[Producer]:
    config = Config(group="test-lending", lease_s=30)
    end = RemoteBuffer.scheduler_end(EndSettings("engine", {"model": "m"}, 1, True, False, config))
    pool = BlockPool(POOL, enable_caching=True, hash_block_size=BLOCK)
    lending = Lending(end, "ns", GROUPS, getattr(request, "param", Limits(4, 0.5)))
    lending.bind(BlockPins(pool, lending.let_go))
    yield Producer(pool, end, lending)
    end.close()


def test_a_finished_prompt_keeps_its_blocks_and_returns_a_ticket(producer: Producer) -> None:
    answer = producer.serve(10, asked=True)
    assert answer is not None
    assert answer["do_remote_prefill"] is True
    assert answer["kvconnect"]["length"] == 10
    assert f"{answer['remote_host']}:{answer['remote_port']}" == answer["kvconnect"]["at"]
    assert producer.free == POOL - 1 - 3


def test_what_routers_read_as_a_host_has_no_key_in_it(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer.end._lender, "_at", f"{'k:@' * 13}k@10.0.0.5:7")
    answer = producer.serve(10, asked=True)
    assert answer is not None
    assert (answer["remote_host"], answer["remote_port"]) == ("10.0.0.5", 7)
    assert answer["kvconnect"]["at"].endswith("k@10.0.0.5:7")


def test_a_ticket_comes_unasked_too(producer: Producer) -> None:
    answer = producer.serve(10)
    assert answer is not None
    assert producer.end.unasked_blocks() == 3


def test_a_request_that_was_aborted_is_not_offered(producer: Producer) -> None:
    assert producer.serve(10, asked=True, status="FINISHED_ABORTED") is None
    assert producer.free == POOL - 1


@pytest.mark.parametrize("producer", [Limits(4, 0.25)], indirect=True)
def test_unasked_entries_hold_no_more_than_their_share(producer: Producer) -> None:
    for _ in range(10):
        producer.serve(12)
    assert producer.end.unasked_blocks() <= 0.25 * POOL
    assert producer.free >= 0.75 * (POOL - 1)


@pytest.mark.parametrize("producer", [Limits(4, 0.25)], indirect=True)
def test_a_prompt_larger_than_the_share_is_not_kept(producer: Producer) -> None:
    assert producer.serve(12 * BLOCK) is None
    assert producer.free == POOL - 1


@pytest.mark.parametrize("producer", [Limits(4, 1.0)], indirect=True)
def test_unasked_entries_give_way_before_a_request_waits(producer: Producer) -> None:
    while producer.end.unasked_blocks() < 30:
        producer.serve(12)
    held = producer.end.unasked_blocks()
    assert producer.free < 20
    producer.serve(20 * BLOCK, status="FINISHED_ABORTED")  # get_new_blocks raises if there is no room
    assert producer.end.unasked_blocks() < held


@pytest.mark.parametrize("producer", [Limits(4, 1.0)], indirect=True)
def test_room_for_the_next_step_of_running_requests_is_always_free(producer: Producer) -> None:
    for _ in range(20):
        producer.serve(12)
        assert producer.free >= 4


def test_the_oldest_gives_way_first(producer: Producer) -> None:
    first = producer.serve(BLOCK)
    for _ in range(8):
        producer.serve(BLOCK)
    producer.lending.make_room(producer.free + 1)
    from kvconnect.buffers.ticket import Ticket

    oldest = Ticket.from_wire(first["kvconnect"])
    blocks = {i for ids in oldest.blocks for i in ids}
    assert all(producer.pool.blocks[i].ref_cnt == 0 for i in blocks)
    assert producer.end.unasked_blocks() == 8


def test_what_was_asked_for_does_not_give_way(producer: Producer) -> None:
    producer.serve(12, asked=True)
    producer.lending.make_room(POOL)
    assert producer.free == POOL - 1 - 3


def test_the_pools_reset_is_not_held_up_by_entries_that_nobody_reads(producer: Producer) -> None:
    producer.serve(12, asked=True)
    producer.serve(12)
    assert producer.pool.reset_prefix_cache()
    assert producer.free == POOL - 1


def test_room_is_made_although_entries_share_their_blocks(producer: Producer) -> None:
    shared = producer.pool.get_new_blocks(6)
    for number in range(5):
        request = Request(f"s{number}", [*range(24), number], SamplingParams(max_tokens=1), None)
        request.num_computed_tokens, request.status = 25, RequestStatus.FINISHED_STOPPED
        own = producer.pool.get_new_blocks(1)
        table = [[b.block_id for b in (*shared, *own)]]
        assert producer.lending.finished(request, table) is not None or number
        producer.pool.free_blocks(own)
    producer.pool.free_blocks(shared)
    producer.lending.make_room(POOL - 1)
    assert producer.free == POOL - 1


def test_reset_returns_every_unclaimed_block(producer: Producer) -> None:
    producer.serve(12, asked=True)
    producer.serve(12)
    assert producer.end.clear()
    producer.lending.take_back()
    assert producer.free == POOL - 1


def test_a_prompt_with_blocks_outside_its_window_missing_is_still_offered(producer: Producer) -> None:
    group = Group(0, BLOCK, 8, ("layer",))
    # The last of 20 tokens is computed by the consumer: it reads from position 12 on.
    assert group.needed(19) == range(3, 5)
    lending = Lending(producer.end, "ns", (group,), Limits(4, 0.5))
    lending.bind(BlockPins(producer.pool, lending.let_go))
    blocks = producer.pool.get_new_blocks(2)
    request = Request("w", list(range(20)), SamplingParams(max_tokens=1), None)
    request.num_computed_tokens, request.status = 20, RequestStatus.FINISHED_STOPPED
    assert lending.finished(request, [[0, 0, 0, *(b.block_id for b in blocks)]]) is not None
    request.request_id = "thin"
    assert lending.finished(request, [[0, 0, 0, 0, blocks[1].block_id]]) is None


@pytest.mark.parametrize("producer", [Limits(4, 0.5, blocks=9)], indirect=True)
def test_the_oldest_that_nobody_has_claimed_give_way_to_new_prompts_at_the_capacity(producer: Producer) -> None:
    answers = [producer.serve(12, asked=True) for _ in range(10)]
    assert None not in answers
    assert producer.end.lent_blocks() == 9
    assert producer.free == POOL - 1 - 9
    assert producer.end.stats()["reclaimed"] == 7


@pytest.mark.parametrize("producer", [Limits(4, 0.5, blocks=9)], indirect=True)
def test_what_nobody_asked_for_gives_way_first(producer: Producer) -> None:
    producer.serve(12, asked=True)
    producer.serve(12)
    producer.serve(12, asked=True)
    producer.serve(12, asked=True)
    assert producer.end.unasked_blocks() == 0
    assert producer.end.lent_blocks() == 9


@pytest.mark.parametrize("producer", [Limits(4, 0.5, blocks=9, policy="refuse")], indirect=True)
def test_a_prompt_beyond_the_capacity_is_not_lent_if_the_policy_is_to_refuse(producer: Producer) -> None:
    answers = [producer.serve(12, asked=True) for _ in range(5)]
    assert [answer is None for answer in answers] == [False] * 3 + [True] * 2
    assert producer.lending.counters["no_room"] == 2
    assert producer.free == POOL - 1 - 9


@pytest.mark.parametrize("producer", [Limits(4, 0.5, blocks=9)], indirect=True)
def test_a_prompt_larger_than_the_capacity_ends_no_other(producer: Producer) -> None:
    producer.serve(12, asked=True)
    assert producer.serve(10 * BLOCK, asked=True) is None
    assert producer.end.lent_blocks() == 3


@pytest.mark.parametrize("producer", [Limits(4, 0.5, spared_s=0.2)], indirect=True)
def test_what_was_asked_for_and_not_claimed_in_good_time_gives_way_to_a_request_that_waits(producer: Producer) -> None:
    producer.serve(20 * BLOCK, asked=True)
    producer.lending.admit(30)
    assert producer.free == POOL - 1 - 20
    threading.Event().wait(0.25)
    producer.lending.after_step()
    assert producer.free == POOL - 1 - 20, "nobody waits for it"
    producer.lending.admit(30)
    assert producer.free == POOL - 1
