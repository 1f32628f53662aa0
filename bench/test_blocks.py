"""Paged blocks: 32 layers, one 32 KiB piece in each for a block, random ids on both sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import trustme

from bench import rows
from bench.conftest import Book, label
from bench.memory import BLOCK_BYTES, PIECE_BYTES, Selection, draw
from bench.near import REFERENCES, Near
from bench.nixl import INITIATORS, Nixl
from bench.timing import Race, clock
from kvconnect.config import Backend

#: Blocks → rounds: 16.8 MB and 268 MB.
COUNTS = {16: 31, 256: 11}


def _title(blocks: int) -> str:
    return f"{blocks * BLOCK_BYTES / 1e6:.3g} MB"


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("blocks", COUNTS, ids=_title)
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
    key = near.end(backend.name, backend.options)
    pipe = near.attached(key)
    rng = np.random.default_rng(blocks)
    # One list of ids a round, the same for everyone in it.
    chosen = [draw(rng, blocks) for _ in range(COUNTS[blocks])]
    near.check_blocks(pipe, op, chosen[-1])
    nbytes = blocks * BLOCK_BYTES
    references: dict[str, Callable[[int], float]] = {"memcpy": lambda _: near.memcpy(nbytes, 1, into=True)}
    for name in REFERENCES:
        references[name] = partial(_packed, near, near.end(name), nbytes)
    if nixl is not None:
        references |= _nixl(nixl, chosen)
    race = Race(lambda i: near.blocks(pipe, op, chosen[i]), references, rounds(COUNTS[blocks]), seed=blocks)
    race.run(benchmark)
    # The pipe's tensor path may belong to its block path now.
    near.release(key)
    case = rows.Case(f"blocks {_title(blocks)}, {op}", nbytes, PIECE_BYTES, is_blocks=True)
    book.rows += rows.of_race(case, label(backend), race)


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
    blocks = max(COUNTS)
    options: dict[str, Any] = {"tls": certificates} if what == "tls" else {"checksum": True}
    keys = [near.end("tcp", options), near.end("tcp", {"checksum": False})]
    checked, unchecked = (near.attached(key) for key in keys)
    rng = np.random.default_rng(blocks)
    chosen = [draw(rng, blocks) for _ in range(COUNTS[blocks])]
    for pipe in (checked, unchecked):
        near.check_blocks(pipe, op, chosen[-1])
    references: dict[str, Callable[[int], float]] = {"tcp unchecked": lambda i: near.blocks(unchecked, op, chosen[i])}
    race = Race(lambda i: near.blocks(checked, op, chosen[i]), references, rounds(COUNTS[blocks]), seed=blocks)
    race.run(benchmark)
    for key in keys:
        near.release(key)
    nbytes = blocks * BLOCK_BYTES
    case = rows.Case(f"blocks {_title(blocks)}, {op}", nbytes, PIECE_BYTES, is_blocks=True)
    book.rows += rows.of_race(case, f"tcp {what}", race)


def _packed(near: Near, end: str, nbytes: int, _round: int) -> float:
    return near.tensors(end, nbytes, 1, into=True)


def _nixl(nixl: Nixl, chosen: list[Selection]) -> dict[str, Callable[[int], float]]:
    """NIXL moving the same pieces of the same blocks, in both directions."""
    found: dict[str, Callable[[int], float]] = {}
    for name in INITIATORS:
        nixl.check(name, chosen[-1], chosen[-1].nbytes)
        for op in ("read", "write"):
            found[f"{name}-{op}"] = partial(_pieces, nixl, name, op, chosen)
    return found


def _pieces(nixl: Nixl, name: str, op: str, chosen: list[Selection], index: int) -> float:
    return nixl.pieces(name, op, chosen[index])
