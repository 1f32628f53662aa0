"""A network without sockets, on a clock that only moves when something happens.

`Client` and `Server` have the methods that takers and lenders use of `kvconnect.control`'s. Messages
are packed and read as on the wire, so that their number and bytes are exact. What they cost in time is
a value (`Costs`): each end has one thread, which handles one message after another.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvconnect import messages
from kvconnect.clock import Clock
from kvconnect.control import Handler
from kvconnect.errors import BrokenError, DeadlineError, KVConnectError
from kvconnect.loop import Timer

Answer = Future[dict[str, Any]]


@dataclass(frozen=True)
class Costs:
    """What messages cost, in seconds.

    Args:
        latency_s: from one end to the other.
        message_s: of a thread, for one message received.
        connect_s: of a server's thread, for each new connection.

    """

    latency_s: float = 50e-6
    message_s: float = 100e-6
    connect_s: float = 300e-6


class VirtualClock(Clock):
    """The network's time."""

    def __init__(self) -> None:
        self.time = 0.0

    @property
    def identity(self) -> str:
        """Every engine is a host of its own."""
        return ""

    def now(self) -> float:
        """Return the time of what happens now."""
        return self.time


class Network:
    """All that is going to happen, in order."""

    def __init__(self, costs: Costs) -> None:
        self.costs, self.clock = costs, VirtualClock()
        self.servers: dict[str, Server] = {}
        #: Requests by operation, and the bytes of them and of their answers.
        self.asked: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._due: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def later(self, delay_s: float, call: Callable[[], object]) -> Timer:
        """Have something happen."""
        timer = Timer(self.clock.time + delay_s, call)  # type: ignore[arg-type]
        heapq.heappush(self._due, (timer.when, next(self._order), timer))
        return timer

    def run(self, until: float) -> None:
        """Let everything happen that is due by then."""
        while self._due and self._due[0][0] <= until:
            self.clock.time, _, timer = heapq.heappop(self._due)
            if timer.call is not None:
                timer.call()
        self.clock.time = until


class _Thread:
    """Does one thing after another, each of which takes its time."""

    def __init__(self, network: Network) -> None:
        self._network, self._busy_until = network, 0.0
        self.busy_s = 0.0
        #: The longest that something has waited for its turn.
        self.longest_s = 0.0

    def do(self, after_s: float, takes_s: float, call: Callable[[], object]) -> None:
        """Make ``call``, which takes ``takes_s`` seconds, in ``after_s`` seconds or after what is before it."""
        now = self._network.clock.time
        begin = max(now + after_s, self._busy_until)
        self.longest_s = max(self.longest_s, begin - now - after_s)
        self.busy_s += takes_s
        self._busy_until = begin + takes_s
        self._network.later(begin + takes_s - now, call)


class Server:
    """A `kvconnect.control.ControlServer`."""

    def __init__(self, network: Network, endpoint: str) -> None:
        self.endpoint, self.thread = endpoint, _Thread(network)
        #: Connections, by client.
        self.joined: set[Client] = set()
        self._network, self._handlers = network, dict[str, Handler]()
        network.servers[endpoint] = self

    def handle(self, op: str, handler: Handler) -> None:
        """Answer requests of ``op``."""
        self._handlers[op] = handler

    def close(self) -> None:
        """Stop to answer; who is connected hears of it."""
        del self._network.servers[self.endpoint]
        for client in self.joined:
            client.lost(self)

    def receive(self, client: Client, data: bytes) -> None:
        """Answer a request, now."""
        if self._network.servers.get(self.endpoint) is not self:
            return
        message = messages.unpack(data)
        reply = partial(self._reply, client, message)
        try:
            answer = self._handlers[message["op"]](message["body"])
        except KVConnectError as error:
            reply(error)
            return
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: reply(done.exception() or done.result()))
        else:
            reply(answer)

    def _reply(self, client: Client, message: Mapping[str, Any], answer: Any) -> None:
        number = message["id"]
        pack = messages.pack_error if isinstance(answer, KVConnectError) else messages.pack_reply
        data = pack(number, answer)
        self._network.bytes[message["op"]] += len(data)
        client.thread.do(self._network.costs.latency_s, self._network.costs.message_s, lambda: client.receive(data))


class Client:
    """A `kvconnect.control.ControlClient`."""

    def __init__(self, network: Network) -> None:
        self.clock, self.thread = network.clock, _Thread(network)
        self._network, self._numbers = network, itertools.count(1)
        self._open: dict[int, tuple[Server | None, Answer]] = {}

    def call(self, endpoint: str, op: str, body: Mapping[str, Any], timeout_s: float) -> Answer:
        """Ask; see `kvconnect.control.ControlClient.call`."""
        network, number, future = self._network, next(self._numbers), Answer()
        data = messages.pack_request(number, op, body)
        network.asked[op] += 1
        network.bytes[op] += len(data)
        server = network.servers.get(endpoint)
        self._open[number] = server, future
        late = DeadlineError(f"{endpoint} did not answer {op!r} within {timeout_s:g} s")
        timer = network.later(timeout_s, lambda: self._fail(number, late))
        future.add_done_callback(lambda _: timer.cancel())
        if server is None:
            network.later(2 * network.costs.latency_s, lambda: self._fail(number, BrokenError(f"{endpoint} is gone")))
            return future
        takes_s = network.costs.message_s
        if self not in server.joined:
            server.joined.add(self)
            takes_s += network.costs.connect_s
        server.thread.do(network.costs.latency_s, takes_s, lambda: server.receive(self, data))
        return future

    def later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Make a call later."""
        return self._network.later(delay_s, call)

    def soon(self, call: Callable[[], None]) -> bool:
        """Make a call next."""
        self._network.later(0.0, call)
        return True

    def check(self, endpoint: str) -> None:
        """Contact whoever is named."""

    def flush(self) -> None:
        """Wait for nothing: there is one thread."""

    def receive(self, data: bytes) -> None:
        """Take an answer, now."""
        message = messages.unpack(data)
        _, future = self._open.pop(message["id"], (None, None))
        if future is None:
            return
        if "error" in message:
            future.set_exception(messages.error_of(message))
        else:
            future.set_result(message["body"])

    def lost(self, server: Server) -> None:
        """A server is gone, and with it what it was asked."""
        for number in [number for number, (asked, _) in self._open.items() if asked is server]:
            error = BrokenError(f"{server.endpoint} closed the connection")
            self._network.later(self._network.costs.latency_s, partial(self._fail, number, error))

    def _fail(self, number: int, error: KVConnectError) -> None:
        _, future = self._open.pop(number, (None, None))
        if future is not None:
            future.set_exception(error)
