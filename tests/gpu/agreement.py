"""Whether an engine that got its KV from elsewhere chooses the tokens that it would have chosen alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvconnect.demo.client import ASK, Prompt
from kvconnect.demo.engines import Server
from tests.vllm.fleet import Fleet

#: Where the first two choices' log probabilities are as near as this, either may come first.
SURE = 0.05
#: Of all tokens, those of which one engine alone is not `SURE`.
UNSURE_SHARE = 0.02
#: Logits are this many times the demo model's, so that few are as near: 1 % instead of 6.
SHARPER = 8.0

#: A token, and by how much its log probability is above the second choice's.
Choice = tuple[str, float]


@dataclass(frozen=True)
class Agreement:
    """What a comparison of many answers found; tokens behind a prompt's first different one are not compared."""

    prompts: int
    tokens: int
    #: Tokens of which one engine alone is not `SURE`.
    unsure: int
    #: Prompts in which one of those came out different.
    excluded: int
    #: Tokens that are different although one engine alone is sure of them.
    wrong: Sequence[str]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[Choice], Sequence[Choice]]]) -> Agreement:
        """Compare answers with those of one engine alone."""
        prompts = tokens = unsure = excluded = 0
        wrong = []
        for got, alone in pairs:
            for place, ((token, _), (wanted, gap)) in enumerate(zip(got, alone, strict=True)):
                tokens += 1
                unsure += gap <= SURE
                if token == wanted:
                    continue
                excluded += gap <= SURE
                if gap > SURE:
                    wrong.append(f"prompt {prompts}, token {place}: {token!r} instead of {wanted!r}, gap {gap:.3f}")
                break
            prompts += 1
        return cls(prompts, tokens, unsure, excluded, wrong)

    def keep(self, name: str) -> None:
        """Write it where results are kept, if they are (``KVCONNECT_RESULTS``, a folder)."""
        if folder := os.environ.get("KVCONNECT_RESULTS"):
            (Path(folder) / f"agreement-{name}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    def check(self) -> None:
        """Fail unless every token is right of which one engine alone is sure, and these are almost all."""
        assert not self.wrong
        assert self.excluded <= UNSURE_SHARE * self.prompts
        assert self.unsure <= UNSURE_SHARE * self.tokens


def ask(fleet: Fleet, engine: Server, prompt: Prompt, **changes: object) -> list[Choice]:
    """Return an engine's tokens for a prompt."""
    body = prompt.body(**changes) | {"logprobs": 2, "return_tokens_as_token_ids": True}
    response = fleet.http.post(engine.url + prompt.path, json=body)
    response.raise_for_status()
    found = response.json()["choices"][0]["logprobs"]
    return [(token, gap(list(top.values()))) for token, top in zip(found["tokens"], found["top_logprobs"], strict=True)]


def gap(logprobs: Sequence[float]) -> float:
    """Return by how much the first choice is more likely than the second."""
    first, second, *_ = sorted(logprobs, reverse=True)
    return first - second


def handed_over(fleet: Fleet, prompt: Prompt, producer: Server, consumer: Server) -> list[Choice]:
    """Return the consumer's tokens, from the producer's KV."""
    params = fleet.ask(producer, prompt, kv_transfer_params=ASK, max_tokens=1).kv_transfer_params
    return ask(fleet, consumer, prompt, kv_transfer_params=params)


def sharper_model(folder: Path, of: str) -> str:
    """Copy a model into ``folder`` with the logits `SHARPER` times as large; return the copy's folder."""
    target = folder / "sharper"
    shutil.copytree(of, target)
    file = target / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= SHARPER
    save_file({name: weight.to(torch.float32) for name, weight in weights.items()}, file, metadata={"format": "pt"})
    return str(target)
