"""What each leg of a request carries: bodies, headers and the ticket. Pure functions."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvconnect.connectors.protocol import ASK_FOR_TICKET

Headers = list[tuple[bytes, bytes]]

#: Fields that the prefill leg goes without: they shape the answer, which is
#: thrown away, or contradict its one token (vLLM answers 400 to min_tokens > max_tokens).
#: The KV of a prompt is the same for all ``n`` of its answers.
_DECODE_ONLY = frozenset({"stream_options", "min_tokens", "n", "best_of", "use_beam_search"})

#: RFC 9110 §7.6.1, and what a client computes for its own connection.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"expect",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

#: RFC 9110 §5.5: not in the value of a header.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
#: Deeper JSON is refused: far less than what can still be written where it could be read.
_MOST_NESTED = 200


@dataclass(frozen=True)
class Request:
    """What one leg sends.

    Args:
        method: of HTTP.
        path: with the query.
        headers: all but those that the HTTP client makes itself.
        content: the body.
        prefix: how the prompt begins, for policies; "" if there is none.
        afresh: returns the body for another server after one has read ``content``; ``None`` if it is the same.

    """

    method: str
    path: str
    headers: Headers
    content: bytes = b""
    prefix: str = ""
    afresh: Callable[[], bytes] | None = None

    def content_once_read(self) -> bytes:
        """Return the body for another server after one has read the first body."""
        return self.content if self.afresh is None else self.afresh()


def parse(content: bytes) -> dict[str, Any] | None:
    """Return a request's JSON object, or ``None`` if it is none, or nested too deeply."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) and not _is_deep(body, content) else None


def _is_deep(body: dict[str, Any], content: bytes) -> bool:
    if content.count(b"[") + content.count(b"{") <= _MOST_NESTED:
        return False
    level: list[Any] = [body]
    for _ in range(_MOST_NESTED):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if isinstance(child, dict | list)]
    return bool(level)


def prefill_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request that makes a prefill server compute the prompt and offer its KV."""
    leg = {key: value for key, value in body.items() if key not in _DECODE_ONLY}
    leg |= {"max_tokens": 1, "stream": False, "kv_transfer_params": dict(ASK_FOR_TICKET)}
    if "max_completion_tokens" in body:
        leg["max_completion_tokens"] = 1
    return leg


def decode_body(body: Mapping[str, Any], ticket: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the request for the decode server: the client's, with the ticket or with none.

    A client's own ``kv_transfer_params`` never get through: they could name any address.
    """
    leg = {key: value for key, value in body.items() if key != "kv_transfer_params"}
    if ticket is not None:
        leg["kv_transfer_params"] = ticket
    return leg


def ticket(content: bytes) -> dict[str, Any] | None:
    """Return the ticket in a prefill server's answer, if it holds one."""
    found = (parse(content) or {}).get("kv_transfer_params")
    return found if isinstance(found, dict) else None


def prefix(body: Mapping[str, Any], characters: int) -> str:
    """Return the beginning of a request's prompt, with what else its KV depends on; "" if it has no prompt.

    Of several prompts it is the first one's: tickets are for that one only. Token ids and messages count as JSON.
    """
    prompt = body.get("messages") or body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if not prompt or not isinstance(prompt, str | list):
        return ""
    beginning = ""
    for item in [prompt] if isinstance(prompt, str) else prompt:
        beginning += item[:characters] if isinstance(item, str) else f"{json.dumps(item)},"
        if len(beginning) >= characters:
            break
    return json.dumps([body.get("model"), body.get("cache_salt")]) + beginning[:characters]


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the client's X-Request-Id, or a new one; both legs carry it."""
    given = next((value for name, value in headers if name.lower() == b"x-request-id" and value), None)
    return given or uuid.uuid4().hex.encode()


def request_headers(headers: Headers, name: bytes) -> Headers:
    """Return a client's end-to-end headers for a server, under the request id ``name``."""
    kept = end_to_end(headers)
    own = {b"host", b"content-length", b"x-request-id"}
    kept = [(key, value) for key, value in kept if key.lower() not in own]
    present = {key.lower() for key, _ in kept}
    if b"content-type" not in present:
        kept.append((b"content-type", b"application/json"))
    if b"accept-encoding" not in present:
        # Else the HTTP client asks for encodings that the caller did not ask for.
        kept.append((b"accept-encoding", b"identity"))
    return [*kept, (b"x-request-id", name)]


def fit(headers: Headers) -> bool:
    """Whether all values may be sent; parsers let through what none may."""
    return not any(_CONTROL.search(value) for _, value in headers)


def end_to_end(headers: Headers) -> Headers:
    """Drop the headers that belong to one connection only."""
    named = {
        token.strip().lower() for key, value in headers if key.lower() == b"connection" for token in value.split(b",")
    }
    return [(key, value) for key, value in headers if key.lower() not in _HOP_BY_HOP | named]


def without(headers: Headers, *names: bytes) -> Headers:
    """Return ``headers`` less those called ``names`` (lower case)."""
    return [(key, value) for key, value in headers if key.lower() not in names]
