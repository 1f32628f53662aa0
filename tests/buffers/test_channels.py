"""Who looks after a pipe's other end, and how often."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.control.network import Client, Costs, Network, Server
from kvconnect.buffers.channels import Channels


class _Worker:
    """A worker's channels on a simulated network, and how many questions came to it."""

    def __init__(self, network: Network, name: str) -> None:
        self.at, self.lost, self.asked = name, list[str](), 0
        server, client = Server(network, name), Client(network)
        self.channels = Channels(server, client, 10.0, 30.0, lambda pipe, _: self.lost.append(pipe))  # type: ignore[arg-type]
        ping = self.channels._ping

        def counted(body: dict[str, Any]) -> Any:
            self.asked += 1
            return ping(body)

        server.handle("pipe.ping", counted)


def _star(network: Network, count: int) -> tuple[_Worker, list[_Worker]]:
    """Return a worker that serves a pipe to each of so many others."""
    one, others = _Worker(network, "one"), [_Worker(network, f"other {i}") for i in range(count)]
    for other in others:
        other.channels.open(f"to {other.at}", "asks", one.at)
        one.channels.open(f"to {other.at}", "serves", other.at)
    return one, others


def _questions(network: Network, one: _Worker, seconds: float) -> tuple[float, float]:
    """Return how many questions a second ``one`` is asked, and asks."""
    before, asked = Counter(network.asked), one.asked
    network.run(network.clock.now() + seconds)
    to_it = one.asked - asked
    return to_it / seconds, ((network.asked - before)["pipe.ping"] - to_it) / seconds


def test_both_ends_of_a_pipe_ask_every_five_seconds() -> None:
    network = Network(Costs())
    one, _ = _star(network, 20)
    network.run(20.0)
    assert _questions(network, one, 50.0) == (4.0, 4.0)


def test_a_worker_with_very_many_pipes_asks_no_more_often_and_has_the_others_ask_less() -> None:
    network = Network(Costs())
    one, others = _star(network, 1000)
    network.run(60.0)
    to_it, by_it = _questions(network, one, 100.0)
    assert 35.0 < to_it <= 41.0
    assert 35.0 < by_it <= 41.0
    assert not one.lost
    assert not any(other.lost for other in others)


def test_an_end_that_its_worker_has_forgotten_is_given_up_however_long_the_pauses() -> None:
    network = Network(Costs())
    one, others = _star(network, 400)
    network.run(60.0)
    one.channels.close("to other 7", "serves")
    network.run(network.clock.now() + 11.0)
    assert others[7].lost == ["to other 7"]
