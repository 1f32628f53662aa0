"""Which KV a request means."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvconnect.connectors.identity import key_of, keys_of, prefix_digests, shared_label


def digest(tokens: list[int], **content: Any) -> bytes:
    (value,) = prefix_digests(tokens, [len(tokens)], **content)
    return value


def request(tokens: list[int], **kwargs: object) -> Request:
    return Request("r", list(tokens), SamplingParams(max_tokens=4), None, **kwargs)  # type: ignore[arg-type]


def test_equal_content_has_equal_keys_whatever_the_request_id() -> None:
    first, second = request([1, 2, 3]), request([1, 2, 3])
    second.request_id = "another"
    assert key_of(first, "ns") == key_of(second, "ns")
    assert key_of(first, "ns").length == 3


def test_every_part_of_the_content_changes_the_digest() -> None:
    lora = LoRARequest("a", 1, "/a")
    variants = [
        digest([1, 2, 3]),
        digest([1, 2, 4]),
        digest([1, 2]),
        digest([1, 2, 3], salt=""),
        digest([1, 2, 3], salt="s"),
        digest([1, 2, 3], lora=(lora.lora_name, lora.lora_path)),
        digest([1, 2, 3], lora=("b", "/a")),
        digest([1, 2, 3], media=[("hash", 0, 2)]),
        digest([1, 2, 3], media=[("hash", 1, 2)]),
        digest([1, 2, 3], media=[("other", 0, 2)]),
    ]
    assert len(set(variants)) == len(variants)


def test_parts_do_not_run_together() -> None:
    assert digest([], lora=("ab", "c")) != digest([], lora=("a", "bc"))
    assert digest([], salt="lora") != digest([], lora=("lora", ""))


def test_the_digest_is_the_same_in_every_process() -> None:
    code = (
        "from kvconnect.connectors.identity import prefix_digests;print(prefix_digests([5, 6], [2], salt='x')[0].hex())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split()[-1] == digest([5, 6], salt="x").hex()


def test_what_a_prompt_begins_with_has_the_key_of_a_prompt_that_ends_there() -> None:
    tokens = list(range(100))
    keys = keys_of(request(tokens), "ns", 32)
    assert [key.length for key in keys] == [32, 64, 96, 100]
    assert list(keys) == [key_of(request(tokens[: key.length]), "ns") for key in keys]
    assert [key.length for key in keys_of(request(tokens[:64]), "ns", 32)] == [32, 64]
    assert [key.length for key in keys_of(request(tokens), "ns", 0)] == [100]


def test_media_count_from_where_they_begin() -> None:
    def keys(media: list[tuple[str, int, int]]) -> list[bytes]:
        return prefix_digests(list(range(100)), [32, 64, 100], media=media)

    plain, early, late = keys([]), keys([("a", 40, 10)]), keys([("a", 40, 10), ("b", 70, 10)])
    assert plain[0] == early[0] == late[0]
    assert early[:2] == late[:2]
    assert len({plain[1], early[1], plain[2], early[2], late[2]}) == 5


def test_a_request_without_token_ids_has_no_key() -> None:
    import torch

    embeds = Request("r", None, SamplingParams(max_tokens=1), None, prompt_embeds=torch.zeros(4, 8))
    assert key_of(embeds, "ns") is None


@pytest.mark.parametrize(
    ("request_id", "label"),
    [
        ("cmpl-abc-0-1a2b3c4d", "cmpl-abc-0"),
        ("cmpl-abc-1-1a2b3c4d", "cmpl-abc-1"),
        ("chatcmpl-abc-1a2b3c4d", "chatcmpl-abc"),
        ("1_cmpl-abc-0-1a2b3c4d", "cmpl-abc-0"),
        ("cmpl-___prefill_addr_h:1___decode_addr_h:2_ff-0-1a2b3c4d", "cmpl-___prefill_addr_h:1___decode_addr_h:2_ff-0"),
        ("0-1a2b3c4d", None),
        ("17", None),
    ],
)
def test_the_shared_label_drops_what_differs_between_the_legs(request_id: str, label: str | None) -> None:
    assert shared_label(request_id) == label
