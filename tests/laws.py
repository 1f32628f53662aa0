"""``python -m tests.laws``: every law of `kvconnect.testing`, and what breaks it on purpose and is caught.

With ``--all``, each broken pipe and buffer is tried with every law, which takes an hour or so, most of it for
pipes between two processes: laws besides its own that catch it, too, are in the last column.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvconnect.pipes.base import Reach
from kvconnect.testing import block_laws, buffer_laws, pipe_laws, process_laws
from tests.buffers import test_laws_catch as buffers
from tests.buffers import test_shared_laws_catch as shared
from tests.pipes import test_laws_catch as pipes
from tests.pipes import test_process_laws_catch as processes

Row = tuple[str, Callable[..., object], Any]


def rows() -> Iterator[Row]:
    """Yield what a law is about, the law, and the class that it catches."""
    for kind, caught in (
        ("pipe: tensors", pipes.CAUGHT),
        ("pipe: blocks", pipes.CAUGHT_BLOCKS),
        ("pipe: two processes", processes.CAUGHT),
    ):
        yield from ((kind, law, broken) for broken, law in caught)
    yield from (("buffer", getattr(buffer_laws, name), broken) for broken, name in buffers.BROKEN)
    yield from (("buffer: processes", law, broken) for broken, law in shared.CAUGHT)
    try:
        from tests.connectors import test_laws_catch as connectors
    except pytest.skip.Exception:
        return  # vLLM is not installed
    yield from (("connector", law, broken) for broken, law in connectors.CAUGHT)


def others(row: Row) -> str:
    """Try what can be tried quickly with every law of its kind; name those that catch it besides its own."""
    kind, own, broken = row
    if kind == "buffer":
        absent = [law for trait, law in buffer_laws.ABSENT.items() if not getattr(broken.traits, trait)]
        laws = [*(law for law in buffer_laws.LAWS if not buffer_laws.lacks(law, broken.traits)), *absent]
        catches = buffers.catches
    elif kind in {"pipe: tensors", "pipe: blocks"}:
        laws, catches = [*pipe_laws.LAWS, *block_laws.LAWS, pipes.many_pipes], pipes.catches
    elif kind == "pipe: two processes" and broken.traits.reach is not Reach.PROCESS:
        laws = [*process_laws.LAWS, *processes.OF_TRAITS, *pipe_laws.LAWS, *block_laws.LAWS, pipes.many_pipes]
        between = {*process_laws.LAWS, *processes.OF_TRAITS}

        def catches(law: Callable[..., object], broken: Any) -> bool:
            return (processes if law in between else pipes).catches(law, broken)

    else:
        return "not tried"
    caught = [law.__name__ for law in laws if law is not own and catches(law, broken)]
    return ", ".join(caught) or "none"


def table(everything: bool = False) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| of | law | caught |" + (" also by |" if everything else "")
    yield "|---|---|---|" + ("---|" if everything else "")
    for row in rows():
        kind, law, broken = row
        also = f" {others(row)} |" if everything else ""
        yield f"| {kind} | {law.__name__} | {broken.__name__} |{also}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws", description=__doc__)
    parser.add_argument("--all", action="store_true", help="try each with every law")
    everything = parser.parse_args().all
    if everything:
        pipes.hurry(pytest.MonkeyPatch())
        processes.hurry(pytest.MonkeyPatch())
        buffers.hurry(pytest.MonkeyPatch())
    for line in table(everything):
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
