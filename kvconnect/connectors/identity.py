"""Which KV a request means: the content's digest, and the name both legs share.

Request ids differ between prefill and decode engines (vLLM appends random
characters), so they are never compared whole; and whatever a ticket or a shared
X-Request-Id finds must still have the request's own digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kvconnect.buffers.base import LookupKey

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: Changes whenever the meaning of the digest does, so that old and new never match.
_SCHEME = b"kvconnect-digest-1"

#: ``[child_](cmpl|chatcmpl)-<X-Request-Id>[-prompt index][-8 random hex]``
_SERVED_ID = re.compile(r"^(?:\d+_)?((?:chat)?cmpl-.+?)(?:-[0-9a-f]{8})?$")


def key_of(request: Request, namespace: str) -> LookupKey | None:
    """Return the key of a request's whole prompt, or ``None`` if its content has no token ids."""
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return None
    lora = request.lora_request
    media = (
        (feature.identifier, feature.mm_position.offset, feature.mm_position.length)
        for feature in request.mm_features or ()
    )
    value = digest(
        request.prompt_token_ids,
        lora=(lora.lora_name, lora.lora_path) if lora is not None else None,
        media=media,
        salt=request.cache_salt,
    )
    return LookupKey(namespace, value, len(request.prompt_token_ids))


def digest(
    tokens: list[int],
    *,
    lora: tuple[str, str] | None = None,
    media: Iterable[tuple[str, int, int]] = (),
    salt: str | None = None,
) -> bytes:
    """Digest everything that decides a prompt's KV, in 16 bytes, equal in every process.

    Args:
        tokens: the prompt's token ids.
        lora: name and path of the adapter.
        media: hash, offset and length of each multimodal item.
        salt: the request's cache salt.

    """
    state = hashlib.blake2b(_SCHEME, digest_size=16)
    state.update(len(tokens).to_bytes(8, "little"))
    state.update(np.asarray(tokens, dtype="<i8").tobytes())
    _add(state, "lora", *(lora or ()))
    _add(state, "salt", *(() if salt is None else (salt,)))
    for identifier, offset, length in media:
        _add(state, "media", identifier, str(offset), str(length))
    return state.digest()


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
