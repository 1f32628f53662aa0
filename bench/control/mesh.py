"""A thousand producers and a thousand consumers, whose tables and messages are real, on a network that is not.

`Lender`, `Taker` and `Peers` are those of an engine; requests come at random moments to any two of them.
Workers say what workers say at the control channel (a hello at the first meeting, a claim where a promise
would not last, a release); their pipes are not simulated.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from bench.control.engines import Shape, prompt, settings
from bench.control.network import Client, Network, Server
from kvconnect.buffers import layouts
from kvconnect.buffers.base import Claim, LookupKey, Want
from kvconnect.buffers.choice import describe_pipes
from kvconnect.buffers.directory import Producers
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.lender import Lender
from kvconnect.buffers.peers import Peer, Peers
from kvconnect.buffers.taker import Taker
from kvconnect.paging import PagedLayout, PagedMemory

#: From the claim to the last byte.
_MOVE_S = 0.05
_BLOCKS = (tuple(range(1, 33)),)


@dataclass
class Served:
    """How the requests of one span of time went."""

    loaded: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    #: Seconds from the ticket to the answer of each, and to its release.
    found_s: list[float] = field(default_factory=list)
    released_s: list[float] = field(default_factory=list)


class Producer:
    """One that lends; it may be restarted at its address."""

    def __init__(self, mesh: Mesh, number: int) -> None:
        self._mesh, self.at, self._life = mesh, f"10.0.{number >> 8}.{number & 255}:1", 0
        self.start()

    def start(self) -> None:
        """Begin, or begin anew as another incarnation."""
        self._life += 1
        self.server = Server(self._mesh.network, self.at)
        me = self._mesh.hello(f"{self.at}/{self._life}", "P")
        self.lender = Lender(me, self.server, self.at, clock=self._mesh.network.clock)  # type: ignore[arg-type]
        self.lender.introduce(self._mesh.workers)

    def stop(self) -> None:
        """Be killed."""
        self.server.close()


class Consumer:
    """One that loads, with its workers."""

    def __init__(self, mesh: Mesh, number: int, producers: Sequence[str]) -> None:
        self._mesh, name = mesh, f"D{number}"
        options = replace(settings(name, "D", mesh.shape).options, content_lookup=True)
        self.client = Client(mesh.network)
        known = Producers(producers, None)
        self.taker = Taker(options, mesh.hello(name, "D"), self.client, known, self._answered)  # type: ignore[arg-type]
        self.taker.introduce(mesh.workers)
        self._workers = [Client(mesh.network) for _ in range(mesh.shape.workers)]
        self._peers = [
            Peers(mesh.hello(f"{name}/{rank}", "D", rank), client, options.connect_timeout_s)  # type: ignore[arg-type]
            for rank, client in enumerate(self._workers)
        ]
        self._options = options
        self._asked: dict[str, tuple[Served, float]] = {}
        self._loads: set[str] = set()

    def serve(self, name: str, want: Want, served: Served) -> None:
        """Take a request in."""
        self._asked[name] = served, self._mesh.network.clock.now()
        self.taker.look(name, want)

    def _answered(self, name: str) -> None:
        self._mesh.network.later(0.0, partial(self._act, name))

    def _act(self, name: str) -> None:
        """Go on with a request that has an answer."""
        if name in self._loads or name not in self._asked:
            return
        answer, (served, since) = self.taker.commit(name), self._asked[name]
        served.found_s.append(self._mesh.network.clock.now() - since)
        if not isinstance(answer, Claim):
            served.missed[answer.cause] += 1
            self._end(name)
            return
        self._loads.add(name)
        left = [len(self._workers)]
        for rank, (client, peers) in enumerate(zip(self._workers, self._peers, strict=True)):
            peers.meet(
                answer.data["at"], partial(self._move, name, answer, client, rank, left), answer.data["incarnation"]
            )

    def _move(self, name: str, claim: Claim, client: Client, rank: int, left: list[int], _: Peer) -> None:
        def release() -> None:
            body = {"grant": claim.grant, "part": rank, **claim.data}
            answer = client.call(claim.data["at"], "release", body, self._options.release_timeout_s)
            answer.add_done_callback(partial(self._released, name, left))

        self._mesh.network.later(_MOVE_S, release)

    def _released(self, name: str, left: list[int], answer: Future[dict[str, Any]]) -> None:
        left[0] -= 1
        if left[0]:
            return
        served, since = self._asked[name]
        if answer.exception() is None and answer.result().get("answer") == "ok":
            served.loaded += 1
            served.released_s.append(self._mesh.network.clock.now() - since)
        else:
            served.missed["not released"] += 1
        self._end(name)

    def _end(self, name: str) -> None:
        self.taker.settle(name)
        self._loads.discard(name)
        del self._asked[name]


class Mesh:
    """All of them, and their requests."""

    def __init__(self, network: Network, producers: int, consumers: int, shape: Shape, seed: int = 6) -> None:
        self.network, self.shape = network, shape
        self._dice = random.Random(seed)  # noqa: S311 - who serves what, and when
        layout = shape.layout()
        pipes = describe_pipes("auto", PagedMemory(PagedLayout((), ()), []))
        own = {"endpoint": "10.0.0.1:40000", **pipes, "layout": layouts.write(layout), "device": "cpu"}
        self.workers = [{"rank": rank, **own} for rank in range(shape.workers)]
        self.producers = [Producer(self, number) for number in range(producers)]
        everybody = [producer.at for producer in self.producers]
        self.consumers = [Consumer(self, number, everybody) for number in range(consumers)]
        self._number = 0

    def hello(self, name: str, role: str, rank: int | None = None) -> Hello:
        """Describe one engine."""
        return Hello.of(settings(name, role, self.shape), f"incarnation of {name}", rank=rank)

    def run(self, seconds: float, rate: float, *, tickets: bool = True) -> Served:
        """Let ``rate`` requests a second come for so long, and go on until all that began is over."""
        served, begin = Served(), self.network.clock.now()
        moment = self._dice.expovariate(rate)
        while moment < seconds:
            self.network.later(moment, partial(self._send, served, tickets=tickets))
            moment += self._dice.expovariate(rate)
        for second in range(int(seconds) + 1):
            self.network.run(min(begin + second + 1, begin + seconds))
            for producer in self.producers:
                producer.lender.drain_released()
        return served

    def _send(self, served: Served, *, tickets: bool) -> None:
        producer, consumer = self._dice.choice(self.producers), self._dice.choice(self.consumers)
        self._number += 1
        key: LookupKey = prompt()
        ticket = producer.lender.offer(key, _BLOCKS, label=None, asked=True)
        consumer.serve(f"r{self._number}", Want(key, ticket=ticket if tickets else None), served)

    def acquaint(self, consumer: Consumer) -> int:
        """Have one consumer be served by every producer; return the bytes that it remembers for it afterwards."""
        gc.collect()
        tracemalloc.start()
        served = Served()
        for producer in self.producers:
            key = prompt()
            ticket = producer.lender.offer(key, _BLOCKS, label=None, asked=True)
            self._number += 1
            consumer.serve(f"r{self._number}", Want(key, ticket=ticket), served)
            self.network.run(self.network.clock.now() + 0.2)
        self.network.run(self.network.clock.now() + 60.0)
        for producer in self.producers:
            producer.lender.drain_released()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        if served.loaded != len(self.producers):
            raise RuntimeError(f"not every producer served: {served.missed}")
        return held
