"""Paged blocks: 32 layers, one 32 KiB piece in each for a block, random ids on both sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trustme

from bench.conftest import Book
from bench.nixl import INITIATORS, Nixl
from kvconnect.bench import cases, rows
from kvconnect.bench.memory import Selection
from kvconnect.bench.near import Near
from kvconnect.bench.timing import Race, Sample, clock
from kvconnect.config import Backend


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("blocks", cases.COUNTS, ids=cases.blocks_title)
def test_blocks(
    benchmark: Any,
    near: Near,
    nixl: Nixl | None,
    book: Book,
    rounds: Callable[[int], int],
    backend: Backend,
    blocks: int,
    op: str,
) -> None:
    more = _nixl(nixl, cases.selections(blocks)) if nixl is not None else {}
    book.rows += cases.blocks(cases.Setting(near, backend, benchmark, rounds), blocks, op, more)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Option ``tls`` of the tcp pipe, for both ends."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    blobs = {"key": (issued := authority.issue_cert("bench")).private_key_pem, "ca": authority.cert_pem}
    for name, blob in (blobs | {"cert": issued.cert_chain_pems[0]}).items():
        blob.write_to_path(str(folder / name))
    return {name: str(folder / name) for name in ("cert", "key", "ca")}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("what", ["checksum", "tls"])
def test_safety(
    benchmark: Any,
    near: Near,
    book: Book,
    rounds: Callable[[int], int],
    certificates: dict[str, str],
    what: str,
    op: str,
) -> None:
    """What checksums and TLS cost: the tcp pipe with them against itself without."""
    blocks = max(cases.COUNTS)
    options: dict[str, Any] = {"tls": certificates} if what == "tls" else {"checksum": True}
    keys = [near.end("tcp", options), near.end("tcp", {"checksum": False})]
    checked, unchecked = (near.attached(key) for key in keys)
    chosen = cases.selections(blocks)
    for pipe in (checked, unchecked):
        near.check_blocks(pipe, op, chosen[-1])
    references: dict[str, Sample] = {"tcp unchecked": lambda i: near.blocks(unchecked, op, chosen[i])}
    race = Race(lambda i: near.blocks(checked, op, chosen[i]), references, rounds(cases.COUNTS[blocks]), seed=blocks)
    race.run(benchmark)
    for key in keys:
        near.release(key)
    book.rows += rows.of_race(cases.blocks_case(blocks, op), f"tcp {what}", race)


def _nixl(nixl: Nixl, chosen: list[Selection]) -> dict[str, Sample]:
    """NIXL moving the same pieces of the same blocks, in both directions."""
    found: dict[str, Sample] = {}
    for name in INITIATORS:
        nixl.check(name, chosen[-1], chosen[-1].nbytes)
        for op in ("read", "write"):
            found[f"{name}-{op}"] = partial(_pieces, nixl, name, op, chosen)
    return found


def _pieces(nixl: Nixl, name: str, op: str, chosen: list[Selection], index: int) -> float:
    return nixl.pieces(name, op, chosen[index])
