"""Talking to vLLM's OpenAI server and to the proxy: requests, the hand-over protocol, metrics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvconnect.connectors.protocol import ASK_FOR_TICKET

MODEL = "demo"
EXTERNAL_TOKENS = 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'
#: What a router sends to the prefilling engine.
ASK = ASK_FOR_TICKET


@dataclass(frozen=True)
class Prompt:
    """Text for completions, or messages for chat, with everything that is sent along."""

    content: str | list[int] | list[str] | list[dict[str, str]]
    max_tokens: int = 16
    chat: bool = False
    #: Requests with different salts share no KV; the output does not depend on it.
    salt: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The address it is sent to."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, **changes: Any) -> dict[str, Any]:
        """Return the request's body, greedy."""
        body: dict[str, Any] = {"model": MODEL, "max_tokens": self.max_tokens, "temperature": 0, **self.more}
        body["messages" if self.chat else "prompt"] = self.content
        if self.salt is not None:
            body["cache_salt"] = self.salt
        return body | {key: value for key, value in changes.items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """What came back. ``first_token_s`` is measured by the client, for streams only."""

    texts: tuple[str, ...]
    prompt_tokens: int
    first_token_s: float = 0.0
    total_s: float = 0.0
    kv_transfer_params: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """The only choice's text."""
        return self.texts[0]


def open_client(timeout_s: float = 60.0) -> httpx.Client:
    """Return an HTTP client that ignores proxies of the environment, since all servers are local."""
    return httpx.Client(timeout=timeout_s, trust_env=False)


def send(
    client: httpx.Client,
    url: str,
    prompt: Prompt,
    *,
    request_id: str | None = None,
    kv_transfer_params: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> Answer:
    """Send one request and wait for its whole answer.

    Raises:
        httpx.HTTPError: no answer, or not 200; the text carries the server's.

    """
    body = prompt.body(kv_transfer_params=kv_transfer_params, max_tokens=max_tokens)
    began = time.perf_counter()
    response = client.post(url + prompt.path, json=body, headers=_headers(request_id))
    _raise_for(response)
    answer = response.json()
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    texts = tuple(choice["message"]["content"] if prompt.chat else choice["text"] for choice in choices)
    return Answer(
        texts=texts,
        prompt_tokens=answer["usage"]["prompt_tokens"],
        total_s=time.perf_counter() - began,
        kv_transfer_params=answer.get("kv_transfer_params"),
    )


def stream(client: httpx.Client, url: str, prompt: Prompt, *, request_id: str | None = None) -> Answer:
    """Send one request, streaming, and time the first token.

    Raises:
        httpx.HTTPError: no answer, not 200, or an error inside the stream.

    """
    body = prompt.body(stream=True, stream_options={"include_usage": True})
    text, first_s, tokens = "", 0.0, 0
    began = time.perf_counter()
    with client.stream("POST", url + prompt.path, json=body, headers=_headers(request_id)) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            _raise_for(response)
        for line in response.iter_lines():
            chunk = _chunk(line)
            if chunk is None:
                continue
            if chunk.get("usage"):
                tokens = chunk["usage"]["prompt_tokens"]
            piece = "".join(_piece(choice) for choice in chunk["choices"])
            if piece and not first_s:
                first_s = time.perf_counter() - began
            text += piece
    return Answer((text,), tokens, first_s, time.perf_counter() - began)


def hand_over(
    client: httpx.Client, prefill: str, decode: str, prompt: Prompt, *, request_id: str | None = None
) -> Answer:
    """Do by hand what a router does: prefill on one engine, take its ticket to the other."""
    ticket = send(client, prefill, prompt, request_id=request_id, kv_transfer_params=ASK, max_tokens=1)
    return send(client, decode, prompt, request_id=request_id, kv_transfer_params=ticket.kv_transfer_params)


def metrics(client: httpx.Client, url: str) -> dict[str, float]:
    """Read a server's Prometheus metrics as ``name{label="value",…}`` → value.

    The labels ``engine`` and ``model_name`` are left out and the values of such
    series added up, so that a name does not depend on the deployment.
    """
    response = client.get(url + "/metrics")
    _raise_for(response)
    found: dict[str, float] = {}
    for line in response.text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is None:
            continue
        labels = [label for label in _LABEL.findall(match["labels"] or "") if label[0] not in {"engine", "model_name"}]
        inner = ",".join(f'{key}="{value}"' for key, value in labels)
        name = f"{match['name']}{{{inner}}}" if inner else match["name"]
        found[name] = found.get(name, 0.0) + float(match["value"])
    return found


_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def _headers(request_id: str | None) -> dict[str, str]:
    return {"X-Request-Id": request_id} if request_id else {}


def _chunk(line: str) -> dict[str, Any] | None:
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return None
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise httpx.HTTPError(f"the stream ended in an error: {chunk['error']}")
    return chunk


def _piece(choice: Mapping[str, Any]) -> str:
    return str((choice["delta"].get("content") if "delta" in choice else choice.get("text")) or "")


def _raise_for(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        raise httpx.HTTPError(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
