"""Ray Serve's own prefill/decode app, as the example starts it: two prefill and two decode replicas on CPUs."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvconnect.demo import client as api
from kvconnect.demo import engines, model
from kvconnect.demo.client import Answer, Prompt
from kvconnect.demo.deployment import say
from kvconnect.demo.engines import EngineOptions
from tests.ray import served

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(served.START_S + 900),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is in a virtual environment of its own: make test-ray"),
]

REPLICAS = {"prefill": 2, "decode": 2}


def prompts() -> list[Prompt]:
    """Return texts of all lengths up to a whole context, none of which begins like another, and two chats."""
    text = "\n".join(model.training_text())
    lengths = (20, 90, 150, 300, 600, 900, 1500, 2500, 3500, 4500)
    found = [Prompt(text[7000 * n :][:length]) for n, length in enumerate(lengths)]
    return found + [Prompt([{"role": "user", "content": text[at:][:400]}], chat=True) for at in (90_000, 95_000)]


def alone(folder: Path, asked: list[Prompt]) -> list[Answer]:
    """Return what one engine without a connector answers."""
    engine = engines.engine("alone", EngineOptions(str(model.ensure()), engines=1), folder)
    with api.open_client(120.0) as http:
        try:
            engines.start([engine], say)
            engines.wait_ready([engine], 420.0, say)
            return [api.send(http, engine.url, prompt) for prompt in asked]
        finally:
            engines.stop([engine])


def test_ray_serve_hands_over_between_all_replicas_answers_as_one_engine_and_leaves_nothing_behind(tmp_path) -> None:
    asked = prompts()
    wanted = [answer.text for answer in alone(tmp_path, asked)]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kvc-ray-") as folder:
        with served.serving(Path(folder), tmp_path, *REPLICAS.values()) as run:
            with ThreadPoolExecutor(len(asked)) as pool:
                answers = list(pool.map(run.ask, asked))
            assert [answer.text for answer in answers] == wanted

            # By vLLM's own count all prompt tokens came from P, at every decode replica.
            expected = sum(answer.prompt_tokens for answer in answers)
            fetched = run.fetched(expected)
            assert fetched.total() == expected
            assert len(fetched) == REPLICAS["decode"]
            offered = run.counts("ray_vllm_kvconnect_entries_total", event="offered")
            assert len(offered) == REPLICAS["prefill"]
            assert offered.total() >= len(asked)

            # Streaming, and with another salt, so that nothing is cached at D.
            streamed = [run.stream(replace(prompt, salt="streamed")) for prompt in asked]
            assert [answer.text for answer in streamed] == wanted
            assert run.fetched(2 * expected).total() == 2 * expected

            rows = [served.measure(run, characters, requests=10) for characters in (150, 600, 2500)]
            assert all(row["fetched_tokens"] == row["prompt_tokens"] for row in rows)
        assert run.left == []
    if path := os.environ.get("KVCONNECT_RAY"):
        served.save(run, REPLICAS, rows, load, Path(path))
