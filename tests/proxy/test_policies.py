"""Which server gets a request."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kvconnect.proxy import legs
from kvconnect.proxy.policies import POLICIES
from kvconnect.proxy.servers import Server

_moments = itertools.count(1)


def servers(count: int) -> list[Server]:
    return [Server("prefill", f"http://10.0.0.{at}:8000") for at in range(count)]


def choose(name: str, among: list[Server], prefix: str = "") -> Server:
    server = POLICIES[name](among, prefix)
    server.chosen_s = next(_moments)
    return server


def test_in_turn_each_server_gets_as_many():
    among = servers(3)
    assert [choose("round_robin", among) for _ in range(6)] == among * 2


def test_a_server_that_was_away_gets_one_request_and_then_its_turns():
    among = servers(3)
    for _ in range(10):
        choose("round_robin", among[:2])
    chosen = [choose("round_robin", among) for _ in range(6)]
    assert chosen[0] is among[2]
    assert Counter(chosen) == dict.fromkeys(among, 2)


def test_the_server_with_the_fewest_requests_in_flight_is_taken_and_of_several_each_in_turn():
    among = servers(3)
    among[0].in_flight = 2
    assert [choose("least_loaded", among) for _ in range(4)] == [among[1], among[2]] * 2
    among[1].in_flight = among[2].in_flight = 3
    assert choose("least_loaded", among) is among[0]


def test_one_prefix_goes_to_one_server_and_many_are_spread():
    prefixes = [f"You are assistant number {at}. " for at in range(400)]
    homes = Counter(choose("prefix_aware", servers(4), prefix).url for prefix in prefixes)
    assert len(homes) == 4
    assert min(homes.values()) > 50
    again = Counter(choose("prefix_aware", servers(4)[::-1], prefix).url for prefix in prefixes)
    assert again == homes, "another proxy, which lists them in another order, agrees"


def test_a_server_that_goes_moves_only_its_own_prefixes():
    among, prefixes = servers(5), [str(at) for at in range(200)]
    before = {prefix: choose("prefix_aware", among, prefix) for prefix in prefixes}
    after = {prefix: choose("prefix_aware", among[:-1], prefix) for prefix in prefixes}
    assert all(after[prefix] is home for prefix, home in before.items() if home is not among[-1])


@pytest.mark.parametrize("requests", [8, 40, 200])
def test_a_prefix_that_everybody_has_overloads_no_server(requests):
    among = servers(4)
    for _ in range(requests):
        choose("prefix_aware", among, "the same").in_flight += 1
    assert max(server.in_flight for server in among) < 2 + 1.25 * requests / 4


def test_a_few_requests_with_one_prefix_stay_together():
    among = servers(4)
    for _ in range(2):
        choose("prefix_aware", among, "the same").in_flight += 1
    assert sorted(server.in_flight for server in among) == [0, 0, 0, 2]


def test_a_request_without_a_prompt_goes_to_the_least_loaded():
    among = servers(2)
    among[0].in_flight = 1
    assert choose("prefix_aware", among) is among[1]


BASE = {"model": "m", "prompt": "x" * 20}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (BASE, BASE | {"prompt": "x" * 10 + "y", "temperature": 1, "max_tokens": 7}),
        (BASE, BASE | {"prompt": ["x" * 11, "y"]}),
        ({"prompt": [11, 12, 13, 14]}, {"prompt": [11, 12, 13, 15, 1]}),
        ({"prompt": [[11, 12, 13, 14], [1]]}, {"prompt": [11, 12, 13, 15]}),
        ({"messages": [{"content": "abc"}]}, {"messages": [{"content": "abd"}, {"content": "x"}]}),
    ],
)
def test_prompts_that_begin_alike_have_one_prefix(one, other):
    assert legs.prefix(one, 10) == legs.prefix(other, 10) != ""


@pytest.mark.parametrize(
    "other",
    [
        BASE | {"prompt": "x" * 9 + "y"},
        BASE | {"model": "n"},
        BASE | {"cache_salt": "s"},
        BASE | {"messages": [{"content": "hi"}]},
        BASE | {"prompt": [1, 2]},
    ],
)
def test_prompts_whose_kv_differs_have_different_prefixes(other):
    assert legs.prefix(BASE, 10) != legs.prefix(other, 10)


@pytest.mark.parametrize("prompt", [None, "", [], [""], [[]], 7, {"a": 1}, True])
def test_what_is_no_prompt_has_no_prefix(prompt):
    assert legs.prefix({"prompt": prompt}, 10) == ""


def test_halves_of_surrogate_pairs_can_be_hashed():
    assert choose("prefix_aware", servers(2), legs.prefix({"prompt": "\ud800"}, 10))
