"""One contender's engines at work: hand-overs one at a time, and the random requests that fragment a pool."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.serving import transfers
from bench.serving.contenders import Contender, Fleet, Legs
from bench.serving.setups import Setup
from bench.serving.transfers import Transfer
from kvconnect.bench.tables import Row
from kvconnect.demo import client as api
from kvconnect.demo.client import Prompt
from kvconnect.demo.deployment import say

if TYPE_CHECKING:
    import httpx
    import numpy as np

TIME_TO_FIRST = "vllm:time_to_first_token_seconds_sum"
#: A decoding engine that has to be given KV for every request takes fewer at once.
_AT_ONCE = {Legs.TICKET: 96, Legs.NONE: 96, Legs.ADDRESSES: 16}


@dataclass(frozen=True)
class HandOver:
    """One request, led through P and D, with the client's clock in seconds and D's own."""

    request_id: str
    prefill_s: float
    decode_s: float
    #: From D's frontend's sight of the request to its first token; None where D does not tell.
    first_s: float | None
    #: When D's leg was sent, on `time.monotonic`'s clock.
    sent_s: float

    @property
    def ttft_s(self) -> float:
        """D's first token, as D tells it, else the client."""
        return self.decode_s if self.first_s is None else self.first_s


@dataclass
class Session:
    """Engines that are ready, and what is needed to speak to them."""

    contender: Contender
    setup: Setup
    fleet: Fleet
    http: httpx.Client
    random: np.random.Generator
    release: str

    def prompt(self, tokens: int, max_tokens: int = 1) -> Prompt:
        """Return random token ids: no two prompts share a prefix."""
        ids = self.random.integers(*self.setup.tokens, tokens).tolist()
        return Prompt(ids, max_tokens, more={"detokenize": False, "ignore_eos": True})

    def prefill(self, prompt: Prompt, request_id: str) -> tuple[float, dict[str, Any] | None]:
        """Lead a request through P; return seconds and what D is to be told, if anything."""
        if self.fleet.prefill is None:
            return 0.0, None
        ask = api.ASK if self.contender.legs is Legs.TICKET else None
        url = self.fleet.prefill.url
        answer = api.send(self.http, url, prompt, request_id=request_id, kv_transfer_params=ask, max_tokens=1)
        if ask is not None and answer.kv_transfer_params is None:
            raise RuntimeError("P returned no kv_transfer_params")
        return answer.total_s, dict(answer.kv_transfer_params) if answer.kv_transfer_params else None

    def decode(self, prompt: Prompt, request_id: str, params: dict[str, Any] | None) -> float:
        """Lead a request through D; return seconds."""
        url = self.fleet.decode.url
        return api.send(self.http, url, prompt, request_id=request_id, kv_transfer_params=params).total_s

    def hand_over(self, tokens: int) -> HandOver:
        """Time one request, with nothing else going on."""
        prompt, request_id = self.prompt(tokens), self.fleet.request_id()
        prefill_s, params = self.prefill(prompt, request_id)
        before = self.metrics().get(TIME_TO_FIRST)
        sent_s = time.monotonic()
        decode_s = self.decode(prompt, request_id, params)
        after = self.metrics().get(TIME_TO_FIRST)
        first_s = None if before is None or after is None else after - before
        return HandOver(request_id, prefill_s, decode_s, first_s, sent_s)

    def metrics(self) -> dict[str, float]:
        """Return D's metrics."""
        return api.metrics(self.http, self.fleet.decode.url)

    def fetched_tokens(self) -> int:
        """Return how many prompt tokens D has had from elsewhere, by its own count."""
        return int(self.metrics().get(api.EXTERNAL_TOKENS, 0))

    def loads(self) -> list[Transfer]:
        """Return what D's log tells of its loads so far."""
        return transfers.read(self.fleet.decode.log)

    def fragment(self, requests: int) -> None:
        """Serve random requests on every engine, so that free blocks lie scattered."""
        longest = min(2000, self.setup.options.max_model_len // 2)
        lengths = self.random.integers(16, longest, requests)
        outputs = self.random.integers(1, 48, requests)
        prompts = [self.prompt(int(n), int(m)) for n, m in zip(lengths, outputs, strict=True)]
        with ThreadPoolExecutor(_AT_ONCE[self.contender.legs]) as pool:
            list(pool.map(self._serve, prompts))

    def _serve(self, prompt: Prompt) -> None:
        if self.contender.legs is Legs.ADDRESSES:  # its engines serve nothing but hand-overs
            request_id = self.fleet.request_id("fragment")
            self.decode(prompt, request_id, self.prefill(prompt, request_id)[1])
            return
        for server in self.fleet.servers:
            api.send(self.http, server.url, prompt)

    def identity(self, case: str, pool: str, tokens: int) -> Row:
        """Return the fields that say what a row is about; with ``null`` where nothing is compared yet."""
        return {
            "case": case,
            "backend": self.contender.name,
            "mode": self.setup.mode,
            "place": self.setup.place,
            "vllm": self.release,
            "pool": pool,
            "prompt_tokens": tokens,
            "bytes": tokens * self.setup.kv_bytes_per_token,
            "reference": None,
            "ratio": None,
            "goal": None,
            "met": None,
        }


def measure(session: Session, lengths: Sequence[int], pool: str, requests: int) -> list[Row]:
    """Return a row for each length, on a pool that is as it is."""
    rows = []
    for tokens in lengths:
        session.hand_over(tokens)  # the first one of a length meets the peer and compiles kernels
        moved = session.fetched_tokens()
        samples = [session.hand_over(tokens) for _ in range(requests)]
        moved = session.fetched_tokens() - moved
        row = session.identity(f"hand-over of {tokens} tokens", pool, tokens)
        row |= _times(samples) | {"fetched_tokens": moved} | _phases(session, samples)
        say(json.dumps({key: value for key, value in row.items() if value is not None}))
        rows.append(row)
    return rows


def _times(samples: Sequence[HandOver]) -> Row:
    """Return medians in milliseconds, each with all its samples where it is a result."""
    first = [sample.ttft_s * 1e3 for sample in samples]
    total = [(sample.prefill_s + sample.ttft_s) * 1e3 for sample in samples]
    return {
        "ttft_ms": _median(first),
        "ttft_ms_all": [round(value, 2) for value in first],
        "clock": "D" if all(sample.first_s is not None for sample in samples) else "client",
        "prefill_ms": _median([sample.prefill_s * 1e3 for sample in samples]),
        "decode_ms": _median([sample.decode_s * 1e3 for sample in samples]),
        "total_ms": _median(total),
        "total_ms_all": [round(value, 2) for value in total],
    }


def _phases(session: Session, samples: Sequence[HandOver]) -> Row:
    """Return the phases of the sample in the middle, in milliseconds after D's leg was sent, if D's log has them."""
    middle = sorted(samples, key=lambda sample: sample.ttft_s)[len(samples) // 2]
    loads = session.loads()
    load = transfers.of_request(loads, middle.request_id)
    if load is None:
        return {}
    seen_ms = (load.seen_s - middle.sent_s) * 1e3
    at_ms = {"seen": seen_ms} | {name: seen_ms + value for name, value in load.at_ms.items()}
    own = [found for sample in samples if (found := transfers.of_request(loads, sample.request_id)) is not None]
    return {
        "phases_ms": {name: round(value, 3) for name, value in at_ms.items()} | {"answered": _ms(middle.decode_s)},
        "launch_ms": transfers.percentile(transfers.launch_ms(own), 50),
    }


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
