"""What is asked of engines of several workers, on CPUs and on GPUs."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from kvconnect.demo.client import Answer, Prompt
from kvconnect.demo.engines import Server
from tests.vllm.fleet import Fleet


def loads(server: Server) -> list[dict[str, Any]]:
    """Return what a server's log records of all loads, each worker's part by itself."""
    text = server.log.read_text(errors="replace")
    return [json.loads(record) for record in re.findall(r"kvconnect\.load (\{.*\})", text)]


def differences(server: Server) -> list[str]:
    """Return the lines of a server's log that say why it fetches nothing from a peer."""
    return [line for line in server.log.read_text(errors="replace").splitlines() if " mismatch; " in line]


def each_worker_fetches_its_part(fleet: Fleet, prompt: Prompt, route: Callable[[Prompt], Answer]) -> None:
    """Hand a prompt over between engines of two workers each."""
    consumer = fleet.consumers[0]
    before = len(loads(consumer))
    answer, fetched = fleet.fetched(consumer, lambda: route(prompt))
    assert fetched >= len(prompt.content) - 1
    parts = loads(consumer)[before:]
    assert sorted(part["rank"] for part in parts) == [0, 1]
    assert len({part["bytes"] for part in parts}) == 1
    assert answer.texts == fleet.reference(prompt).texts


def is_refused(fleet: Fleet, producer: Server, consumer: Server, reason: str, seed: int) -> None:
    """Two hand-overs between engines that do not fit: all is computed, and the ``reason`` is said once of each peer."""
    for prompt in (fleet.prompt(150, seed, max_tokens=4), fleet.prompt(150, seed + 1, max_tokens=4)):
        params = fleet.ticket(producer, prompt)
        call = functools.partial(fleet.ask, consumer, prompt, kv_transfer_params=params)
        answer, fetched = fleet.fetched(consumer, call)
        assert fetched == 0
        assert answer.texts == fleet.reference(prompt).texts
    said = differences(consumer)
    assert said
    assert all(reason in line for line in said)
    # Engines that lend to each other are all peers: it is said once of each.
    peers = [re.findall(r"peer (\S+): mismatch", line) for line in said]
    assert all(peers.count(peer) == 1 for peer in peers)
