"""Which KV a request means: the content's digest, and the name both legs share.

Request ids differ between prefill and decode engines (vLLM appends random
characters), so they are never compared whole; and whatever a ticket or a shared
X-Request-Id finds must still have the request's own digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvconnect.buffers.base import LookupKey

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: Changes whenever the meaning of the digest does, so that old and new never match.
_SCHEME = b"kvconnect-digest-2"

#: ``[child_](cmpl|chatcmpl)-<X-Request-Id>[-prompt index][-8 random hex]``
_SERVED_ID = re.compile(r"^(?:\d+_)?((?:chat)?cmpl-.+?)(?:-[0-9a-f]{8})?$")


def key_of(request: Request, namespace: str) -> LookupKey | None:
    """Return the key of a request's whole prompt, or ``None`` if its content has no token ids."""
    keys = keys_of(request, namespace, 0)
    return keys[-1] if keys else None


def keys_of(request: Request, namespace: str, every: int) -> tuple[LookupKey, ...]:
    """Return the keys of what a request's prompt begins with, the shortest first, the whole prompt last.

    Args:
        request: whose prompt; without token ids it has no keys.
        namespace: of the keys.
        every: there is a key each so many tokens; with 0 only that of the whole.

    """
    tokens = request.prompt_token_ids
    if tokens is None or getattr(request, "prompt_embeds", None) is not None:
        return ()
    lora = request.lora_request
    media = [
        (feature.identifier, feature.mm_position.offset, feature.mm_position.length)
        for feature in request.mm_features or ()
    ]
    lengths = [*(range(every, len(tokens), every) if every else ()), len(tokens)]
    digests = prefix_digests(
        tokens,
        lengths,
        lora=(lora.lora_name, lora.lora_path) if lora is not None else None,
        media=media,
        salt=request.cache_salt,
    )
    return tuple(LookupKey(namespace, value, length) for value, length in zip(digests, lengths, strict=True))


def prefix_digests(
    tokens: list[int],
    lengths: Iterable[int],
    *,
    lora: tuple[str, str] | None = None,
    media: Sequence[tuple[str, int, int]] = (),
    salt: str | None = None,
) -> list[bytes]:
    """Digest everything that decides the KV of a prompt's first tokens, in 16 bytes, equal in every process.

    Args:
        tokens: the prompt's token ids.
        lengths: of how many of them, ascending; each token is read once, however many lengths there are.
        lora: name and path of the adapter.
        media: hash, offset and length of each multimodal item; those count that begin in time.
        salt: the request's cache salt.

    """
    state = hashlib.blake2b(_SCHEME, digest_size=16)
    _add(state, "lora", *(lora or ()))
    _add(state, "salt", *(() if salt is None else (salt,)))
    ids, done = np.asarray(tokens, dtype="<i8"), 0
    digests = []
    for length in lengths:
        state.update(ids[done:length].tobytes())
        done = length
        end = state.copy()
        for identifier, offset, count in media:
            if offset < length:
                _add(end, "media", identifier, str(offset), str(count))
        # Last, so that nothing above can be taken for tokens.
        end.update(length.to_bytes(8, "little"))
        digests.append(end.digest())
    return digests


def shared_label(request_id: str) -> str | None:
    """Return the part of a served request's id that its other leg has too, else ``None``.

    ``cmpl-<X-Request-Id>-0-1a2b3c4d`` → ``cmpl-<X-Request-Id>-0``. Ids of offline
    requests are counters, which mean nothing to another engine.
    """
    match = _SERVED_ID.match(request_id)
    return match.group(1) if match else None


def _add(state: hashlib.blake2b, kind: str, *parts: str) -> None:
    """Feed named strings, each with its length, so that no two inputs run together."""
    for part in (kind, *parts):
        data = part.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    state.update(len(parts).to_bytes(8, "little"))
