"""The demo's requests: each answered with hand-over and by one engine alone, then compared."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvconnect.buffers.ticket import Ticket
from kvconnect.demo import client as api
from kvconnect.demo import report
from kvconnect.demo.client import EXTERNAL_TOKENS, Answer, Prompt

if TYPE_CHECKING:
    import httpx

    from kvconnect.demo.deployment import Deployment

_FIRST_TOKEN = "vllm:time_to_first_token_seconds"  # noqa: S105 - a metric's name


@dataclass(frozen=True)
class Control:
    """The negative control: one block of a prompt zeroed before it was fetched."""

    block: int
    blocks: int
    intact_equal: bool
    fetched_tokens: int
    changed: bool


class Scenario:
    """Sends the demo's requests to a running deployment.

    The *reference*, one engine that did both, is D itself, asked directly. Its
    request carries a ``cache_salt`` of its own: that makes the KV another KV to
    every cache and to kvconnect, while the output stays what the tokens say. So
    D computes it from nothing, and its own metric shows that it fetched nothing.
    """

    def __init__(self, deployment: Deployment, client: httpx.Client) -> None:
        self._servers = deployment
        self._http = client

    def warm_up(self, prompt: Prompt) -> None:
        """Send one request by every route, so that what the first one costs is not in the table."""
        api.stream(self._http, self._servers.proxy.url, prompt, request_id=_id("warm-up"))
        api.stream(self._http, self._servers.decode.url, replace(prompt, salt="warm-up"))

    def external_tokens(self) -> int:
        """Return D's own count of prompt tokens whose KV came from elsewhere."""
        return int(api.metrics(self._http, self._servers.decode.url).get(EXTERNAL_TOKENS, 0))

    def row(self, name: str, prompt: Prompt) -> report.Row:
        """Answer one prompt both ways."""
        request_id = _id(name)
        answer, with_ms = self._timed(self._servers.proxy.url, prompt, request_id)
        before = self.external_tokens()
        reference, without_ms = self._timed(self._servers.decode.url, replace(prompt, salt=_id("reference")), None)
        if self.external_tokens() != before:
            raise RuntimeError(f"the reference for {name!r} was not computed by D alone")
        return report.Row(
            name=name,
            prompt_tokens=answer.prompt_tokens,
            load=report.find_load(self._servers.decode.log, request_id),
            with_ms=with_ms,
            without_ms=without_ms,
            client_ms=answer.first_token_s * 1e3,
            equal=answer.text == reference.text,
        )

    def negative_control(self, prompt: Prompt) -> Control:
        """Hand the same prompt over twice, intact and with one block zeroed in P's memory in between."""
        reference = api.send(self._http, self._servers.decode.url, replace(prompt, salt=_id("reference")))
        intact, _, _, _ = self._hand_over(replace(prompt, salt=_id("intact")), zero=False)
        before = self.external_tokens()
        damaged, block, blocks, fetched = self._hand_over(replace(prompt, salt=_id("zeroed")), zero=True)
        return Control(
            block=block,
            blocks=blocks,
            intact_equal=intact.text == reference.text,
            fetched_tokens=min(fetched, self.external_tokens() - before),
            changed=damaged.text != reference.text,
        )

    def _hand_over(self, prompt: Prompt, *, zero: bool) -> tuple[Answer, int, int, int]:
        """Prefill, perhaps zero the middle block, decode; return the answer, the block and how many there are."""
        request_id = _id("control")
        first = api.send(
            self._http,
            self._servers.prefill.url,
            prompt,
            request_id=request_id,
            kv_transfer_params=api.ASK,
            max_tokens=1,
        )
        params: Any = first.kv_transfer_params
        if not params or "kvconnect" not in params:
            raise RuntimeError("P returned no ticket")
        blocks = Ticket.from_wire(params["kvconnect"]).blocks[0]
        block = blocks[len(blocks) // 2]
        if zero:
            rpc = {"method": "zero_kv_block", "args": [str(block)], "timeout": 30}
            done = self._http.post(self._servers.prefill.url + "/collective_rpc", json=rpc)
            done.raise_for_status()
        answer = api.send(
            self._http, self._servers.decode.url, prompt, request_id=request_id, kv_transfer_params=params
        )
        load = report.find_load(self._servers.decode.log, request_id)
        return answer, block, len(blocks), load.tokens if load else 0

    def _timed(self, url: str, prompt: Prompt, request_id: str | None) -> tuple[Answer, float]:
        """Send one request; also return D's own first-token time in milliseconds, from its metrics."""
        count, total = self._first_token()
        answer = api.stream(self._http, url, prompt, request_id=request_id)
        count_after, total_after = self._first_token()
        if count_after != count + 1:
            raise RuntimeError(f"D saw {count_after - count:.0f} requests where one was sent")
        return answer, (total_after - total) * 1e3

    def _first_token(self) -> tuple[float, float]:
        found = api.metrics(self._http, self._servers.decode.url)
        return found.get(f"{_FIRST_TOKEN}_count", 0.0), found.get(f"{_FIRST_TOKEN}_sum", 0.0)


def _id(name: str) -> str:
    return f"{name.replace(' ', '-')}-{uuid.uuid4().hex}"
