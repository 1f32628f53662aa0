"""Hand-overs that arrive by chance while D decodes and P prefills: what each costs the others.

The same arrivals for every contender: exponential gaps from a fixed seed. To keep the link busy, more prompts have
to arrive than P could prefill. P therefore has them in its prefix cache, all but a new end, and answers with a ticket
soon; D's pool is too small to keep any until it comes again (`Setup.kv_cache_bytes`), so that D fetches them whole.
Tickets are asked for ahead, so that what P takes does not shift what D is given.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from bench.serving import transfers
from bench.serving.session import Session
from bench.serving.streams import Streams, gaps_ms
from kvconnect.bench.tables import Row
from kvconnect.demo import client as api
from kvconnect.demo.deployment import say

_SEED = 20
_THREADS = 128
_DRAIN_S = 60.0


@dataclass(frozen=True)
class Load:
    """What is done at once.

    Args:
        rate: hand-overs a second, on average.
        seconds: that are measured.
        tokens: of a handed-over prompt.
        fresh_tokens: at its end that no earlier prompt had.
        prompts: how many different ones arrive in turn.
        lead_s: how long before an arrival its ticket is asked for.
        streams: that D decodes all the time.
        stream_tokens: of each stream's prompt.
        prefills: that stand before P at any time, next to the tickets: more than one step takes, so that P
            never waits for this process.
        prefill_tokens: of each of them.

    """

    rate: float
    seconds: float
    tokens: int
    prompts: int
    fresh_tokens: int = 32
    lead_s: float = 2.0
    streams: int = 16
    stream_tokens: int = 512
    prefills: int = 8
    prefill_tokens: int = 2048

    def arrivals_s(self) -> list[float]:
        """Return the moments of all arrivals, from 0: a Poisson process, the same whenever asked."""
        random = np.random.default_rng(_SEED)
        count = int(2 * self.rate * self.seconds) + 10
        moments = np.cumsum(random.exponential(1 / self.rate, count))
        return [float(moment) for moment in moments[moments < self.seconds]]


@dataclass
class Seen:
    """What one repeat of a load saw; times in milliseconds."""

    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    launch: list[float] = field(default_factory=list)
    prefill_tokens_per_s: float | None = None
    late: list[float] = field(default_factory=list)
    gb_per_s: float | None = None
    failed: int = 0


class Loader:
    """Puts loads on one contender's engines. ``prepare`` first."""

    def __init__(self, session: Session, load: Load) -> None:
        self._session, self._load = session, load
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.Client(timeout=_DRAIN_S, trust_env=False, limits=limits)
        self._random = np.random.default_rng(_SEED)
        shape = (load.prompts, load.tokens - load.fresh_tokens)
        self._prompts = [_digits(ids) for ids in self._draw(shape)]
        self._repeats = 0

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def prepare(self) -> None:
        """Let P prefill every prompt once, and D stand where it will stand."""
        for number in range(len(self._prompts)):
            name = f"prepare-{number}"
            end, params = self._ticket(number, name, ask=True)
            self._arrive(number, params, end, name)

    def repeat(self, *, taken: bool) -> Seen:
        """Run the load once; without ``taken``, P computes the same but nobody asks for its KV."""
        load, seen = self._load, Seen()
        self._repeats += 1
        mark = f"load-{self._repeats}"
        moved = self._session.fetched_tokens()
        with (
            Streams(self._session.fleet.decode.port, self._stream_body(), load.streams, _DRAIN_S) as streams,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            begin_s = time.monotonic() + load.lead_s + 0.1
            end_s = begin_s + load.seconds
            prefilling = [pool.submit(self._prefill_until, end_s, seed) for seed in self._seeds()]
            arrived = self._arrivals(pool, begin_s, mark, taken=taken)
            _until(end_s)
            for future in arrived:
                _settle(future, seen)
            seconds = time.monotonic() - begin_s
            done = sorted(moment for future in prefilling for moment in future.result(_DRAIN_S))
            seen.gaps = gaps_ms(streams.stop(), begin_s, end_s)
        seen.prefill_tokens_per_s = rate([moment for moment in done if begin_s <= moment <= end_s], load.prefill_tokens)
        if taken and self._session.fleet.prefill is not None:
            moved = self._session.fetched_tokens() - moved
            seen.gb_per_s = round(moved * self._session.setup.kv_bytes_per_token / seconds / 1e9, 4)
        seen.launch = transfers.launch_ms(found for found in self._session.loads() if f"{mark}-" in found.request)
        return seen

    def _arrivals(
        self, pool: ThreadPoolExecutor, begin_s: float, mark: str, *, taken: bool
    ) -> list[Future[tuple[float, float]]]:
        """Ask for each ticket ahead and send each arrival in its moment; return how late and how long (s) each was."""
        moments = [begin_s + moment for moment in self._load.arrivals_s()]
        events = [(moment, number, False) for number, moment in enumerate(moments)]
        events += [(moment - self._load.lead_s, number, True) for number, moment in enumerate(moments)]
        tickets: dict[int, Future[tuple[str, dict[str, Any] | None]]] = {}
        arrived = []
        for moment, number, ahead in sorted(events):
            name = f"{mark}-{number}"
            _until(moment)
            if ahead:
                tickets[number] = pool.submit(self._ticket, number, name, ask=taken)
            elif taken:
                arrived.append(pool.submit(self._arrive_in_time, moment, number, tickets[number], name))
        if not taken:
            for ticket in tickets.values():
                ticket.result(_DRAIN_S)
        return arrived

    def _ticket(self, number: int, name: str, *, ask: bool) -> tuple[str, dict[str, Any] | None]:
        """Draw an end for a prompt and lead it through P; return the end and the ticket, if that is asked for."""
        ids = np.random.default_rng([_SEED, self._repeats, number]).integers(
            *self._session.setup.tokens, self._load.fresh_tokens
        )
        end = _digits(ids)
        prefill = self._session.fleet.prefill
        if prefill is None:
            return end, None
        answer = self._send(prefill.url, self._body(number, end, api.ASK if ask else None), name)
        params = answer.get("kv_transfer_params")
        if ask and params is None:
            raise RuntimeError("P returned no kv_transfer_params")
        return end, params

    def _arrive_in_time(
        self, moment: float, number: int, ticket: Future[tuple[str, dict[str, Any] | None]], name: str
    ) -> tuple[float, float]:
        end, params = ticket.result(_DRAIN_S)
        late_s = time.monotonic() - moment
        return late_s, self._arrive(number, params, end, name)

    def _arrive(self, number: int, params: dict[str, Any] | None, end: str, name: str) -> float:
        """Send one prompt to D; return the seconds until its first token, which is its only one."""
        began = time.monotonic()
        self._send(self._session.fleet.decode.url, self._body(number, end, params), name)
        return time.monotonic() - began

    def _prefill_until(self, end_s: float, seed: int) -> list[float]:
        """Keep one prompt after the other before P; return when each was done."""
        prefill = self._session.fleet.prefill
        if prefill is None:
            return []
        random, done = np.random.default_rng(seed), []
        while time.monotonic() < end_s:
            ids = random.integers(*self._session.setup.tokens, self._load.prefill_tokens)
            self._send(prefill.url, _request(_digits(ids)), None)
            done.append(time.monotonic())
        return done

    def _seeds(self) -> list[int]:
        """Seeds of the prefills' prompts: new ones in every repeat, or P would have them already."""
        return [1000 * self._repeats + number for number in range(self._load.prefills)]

    def _body(self, number: int, end: str, params: Any) -> bytes:
        return _request(f"{self._prompts[number % len(self._prompts)]},{end}", params)

    def _stream_body(self) -> dict[str, Any]:
        """One body for all streams; D serves its prompt from its own cache but for the first."""
        ids = self._draw((self._load.stream_tokens,)).tolist()
        room = self._session.setup.options.max_model_len - self._load.stream_tokens - 1
        settings = {"max_tokens": room, "stream": True, "detokenize": False, "ignore_eos": True, "temperature": 0}
        return {"model": api.MODEL, "prompt": ids, **settings}

    def _draw(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        return self._random.integers(*self._session.setup.tokens, shape)

    def _send(self, url: str, body: bytes, name: str | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        response = self._http.post(f"{url}/v1/completions", content=body, headers=headers)
        if response.status_code != httpx.codes.OK:
            raise httpx.HTTPError(f"{url} answered {response.status_code}: {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer


def measure(session: Session, load: Load, repeats: int, engine_rate: float) -> Iterator[list[Row]]:
    """Yield the row of a load after each repeat, should the next be cut off; ``engine_rate``: the link, bytes/s."""
    loader = Loader(session, load)
    taken: list[Seen] = []
    alone: list[Seen] = []
    try:
        loader.prepare()
        for _ in range(repeats):
            taken.append(loader.repeat(taken=True))
            if session.fleet.prefill is not None:
                alone.append(loader.repeat(taken=False))
            row = session.identity(f"load of {load.tokens} tokens", "under load", load.tokens)
            row |= {"arrivals_per_s": load.rate, "seconds": load.seconds, "streams": load.streams}
            row |= _summary(taken, alone, engine_rate)
            say(json.dumps({key: value for key, value in row.items() if value is not None}))
            yield [row]
    finally:
        loader.close()


def _summary(taken: Sequence[Seen], alone: Sequence[Seen], engine_rate: float) -> Row:
    """Return what the repeats saw, each number with all of them."""
    return {
        **_spread("itl_p50_ms", [transfers.percentile(seen.gaps, 50) for seen in taken]),
        **_spread("itl_p99_ms", [transfers.percentile(seen.gaps, 99) for seen in taken]),
        **_spread("itl_alone_p99_ms", [transfers.percentile(seen.gaps, 99) for seen in alone]),
        **_spread("ttft_ms", [transfers.percentile(seen.first, 50) for seen in taken]),
        **_spread("ttft_p99_ms", [transfers.percentile(seen.first, 99) for seen in taken]),
        **_spread("launch_p50_ms", [transfers.percentile(seen.launch, 50) for seen in taken]),
        **_spread("launch_p99_ms", [transfers.percentile(seen.launch, 99) for seen in taken]),
        **_spread("gb_per_s", [seen.gb_per_s for seen in taken]),
        **_spread("link_share", [seen.gb_per_s and round(seen.gb_per_s * 1e9 / engine_rate, 3) for seen in taken]),
        **_spread("prefill_tokens_per_s", [seen.prefill_tokens_per_s for seen in taken]),
        **_spread("prefill_alone_tokens_per_s", [seen.prefill_tokens_per_s for seen in alone]),
        "late_p99_ms": transfers.percentile([late for seen in taken for late in seen.late], 99),
        "failed": sum(seen.failed for seen in taken),
    }


def rate(done: Sequence[float], tokens: int) -> float | None:
    """Return tokens a second from the moments at which prompts were done: the slope of their count.

    They are done in bursts, of which a plain count over a window would have one too many or too few.
    """
    if len(done) < 3 or done[-1] <= done[0]:
        return None
    slope = np.polyfit(np.asarray(done) - done[0], np.arange(len(done)), 1)[0]
    return round(float(slope) * tokens, 1)


def _spread(name: str, values: Sequence[float | None]) -> Row:
    """Return the median and all values of the repeats; nothing if there are none."""
    known = [value for value in values if value is not None]
    return {name: statistics.median(known), f"{name}_all": known} if known else {}


def _settle(future: Future[tuple[float, float]], seen: Seen) -> None:
    """Add one arrival's outcome to what was seen."""
    try:
        late_s, first_s = future.result(_DRAIN_S)
    except (httpx.HTTPError, RuntimeError, TimeoutError) as error:
        seen.failed += 1
        say(f"an arrival failed: {error!r}")
        return
    seen.late.append(late_s * 1e3)
    seen.first.append(first_s * 1e3)


def _until(moment: float) -> None:
    """Sleep until a moment of `time.monotonic`."""
    threading.Event().wait(max(0.0, moment - time.monotonic()))


def _digits(ids: npt.NDArray[np.int64]) -> str:
    """Write token ids as they stand in a body: done once, since it takes longer than sending them."""
    return ",".join(map(str, ids.tolist()))


def _request(ids: str, params: Any = None) -> bytes:
    settings = {"model": api.MODEL, "max_tokens": 1, "temperature": 0, "detokenize": False, "ignore_eos": True}
    if params is not None:
        settings["kv_transfer_params"] = dict(params)
    return (json.dumps(settings)[:-1] + f', "prompt": [{ids}]}}').encode()
