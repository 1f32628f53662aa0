"""An engine without a model, as a command: what it says and hears are lines of JSON.

A producer says a ticket for each of its offers; a consumer hears tickets and says, for each, how its load ended.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from typing import Any

from kvconnect.buffers.base import Claim, Want
from kvconnect.config import Config
from kvconnect.errors import KVConnectError
from tests.buffers.engines import Engine, key

BLOCKS = (1, 2, 3)
#: Where lines go. Whatever else is printed, and media print at will, goes to stderr.
_SAID = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def produce(options: dict[str, Any]) -> None:
    """Offer three blocks twice, and serve them until told to end."""
    with closing(Engine("P", produces=True, **options)) as p:
        for number in (1, 2):
            say(p.offer(number, (BLOCKS,)))
        sys.stdin.readline()


def consume(options: dict[str, Any]) -> None:
    """Load what each ticket names, and compare every byte."""
    with closing(Engine("D", consumes=True, **options)) as d, closing(Engine("P", produces=True)) as same:
        for number, line in enumerate(sys.stdin, 1):
            answer = d.find(f"r{number}", Want(key(number), ticket=json.loads(line)))
            say(load(d, answer, same) if isinstance(answer, Claim) else f"{answer.cause}: {answer.detail}")


def load(d: Engine, claim: Claim, same: Engine) -> str:
    """Return what became of it; ``same`` has the memory of the producer."""
    try:
        d.read(claim).wait(10)
    except KVConnectError as error:
        return str(error)
    theirs = [same.block(number) for number in BLOCKS]
    return "loaded" if all(d.block(10 + i).equal(block) for i, block in enumerate(theirs)) else "other bytes"


def say(what: Any) -> None:
    print(json.dumps(what), flush=True, file=_SAID)


if __name__ == "__main__":
    role, extra = sys.argv[1], Config.parse(json.loads(sys.argv[2]))
    {"produce": produce, "consume": consume}[role]({**vars(extra), "pipe": extra.pipe})
