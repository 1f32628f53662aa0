"""What the demo found out, and the table that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Load:
    """One finished load, as the decoding engine's log tells it (all ranks together)."""

    tokens: int
    nbytes: int
    ms: float
    pipe: str
    peer: str


@dataclass(frozen=True)
class Row:
    """One request, answered with hand-over and by one engine alone."""

    name: str
    prompt_tokens: int
    load: Load | None
    #: D's own first-token time, from handing it the request; milliseconds.
    with_ms: float
    without_ms: float
    #: What the client of the proxy waited for its first token: P's prefill included.
    client_ms: float
    equal: bool


_RECORD = re.compile(r"kvconnect\.load (\{.*\})")


def find_load(log: Path, request_id: str) -> Load | None:
    """Return the load that a server's log records for an X-Request-Id, or ``None``.

    vLLM's id of the request contains the X-Request-Id; each rank logs its own part.
    """
    parts = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _RECORD.search(line)
        if match is not None and request_id in (record := json.loads(match[1]))["request"]:
            parts.append(record)
    if not parts:
        return None
    return Load(
        tokens=parts[0]["tokens"],
        nbytes=sum(part["bytes"] for part in parts),
        ms=max(part["ms"] for part in parts),
        pipe="+".join(sorted({part["pipe"] for part in parts})),
        peer=parts[0]["peer"],
    )


_HEADERS = (
    "request",
    "prompt\ntokens",
    "fetched\nfrom P",
    "bytes on\nthe wire",
    "ms on\nthe wire",
    "pipe",
    "D first token\nwith, ms",
    "D first token\nwithout, ms",
    "client first\ntoken, ms",
    "output equals\none engine",
)


def table(rows: Sequence[Row]) -> str:
    """Format the rows, numbers to the right."""
    cells = [[_cells(header, 1) for header in _HEADERS], [_cells(header, 0) for header in _HEADERS]]
    cells += [_row(row) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADERS))]
    text = [_line(line, widths) for line in cells]
    text.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def _cells(header: str, from_end: int) -> str:
    """Return one of a header's two lines; a short header stands on the lower one."""
    lines = ["", *header.split("\n")][-2:]
    return lines[1 - from_end]


def _row(row: Row) -> list[str]:
    fetched = ["0", "0", "-", "-"]
    if (load := row.load) is not None:
        fetched = [str(load.tokens), f"{load.nbytes:,}", f"{load.ms:.1f}", load.pipe]
    times = [f"{row.with_ms:.0f}", f"{row.without_ms:.0f}", f"{row.client_ms:.0f}"]
    return [row.name, str(row.prompt_tokens), *fetched, *times, "yes" if row.equal else "NO"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = {0, 5, 9}
    padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded).rstrip()
