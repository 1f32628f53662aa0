"""What D's log says about its loads: when each step of a hand-over was over (``log_transfers``)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_RECORD = re.compile(r"kvconnect\.load (\{.*\})")
LAUNCHED = "launched"


@dataclass(frozen=True)
class Transfer:
    """One finished load of one rank.

    Args:
        request: vLLM's id of the request, which contains the ``X-Request-Id``.
        nbytes: that were moved.
        seen_s: when D's scheduler first heard of the request, on `time.monotonic`'s clock.
        at_ms: milliseconds after that, by what was over then, in order.

    """

    request: str
    nbytes: int
    seen_s: float
    at_ms: dict[str, float]


def read(log: Path) -> list[Transfer]:
    """Return the loads that a server's log tells of, in its order; lines of another form are left out."""
    found = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _RECORD.search(line)
        if match is None:
            continue
        record = json.loads(match[1])
        if "at_ms" in record:
            at_ms = {name: float(value) for name, value in record["at_ms"].items()}
            found.append(Transfer(record["request"], record["bytes"], float(record["seen"]), at_ms))
    return found


def of_request(transfers: Iterable[Transfer], request_id: str) -> Transfer | None:
    """Return the load of an ``X-Request-Id``; of several ranks' the one that was over last."""
    own = [transfer for transfer in transfers if request_id in transfer.request]
    return max(own, key=lambda transfer: max(transfer.at_ms.values()), default=None)


def launch_ms(transfers: Iterable[Transfer]) -> list[float]:
    """Return the milliseconds from D's first sight of each request to the launch of its read."""
    return [transfer.at_ms[LAUNCHED] for transfer in transfers if LAUNCHED in transfer.at_ms]


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return a percentile, rounded to microseconds if these are milliseconds; None of nothing."""
    return round(float(np.percentile(values, share)), 3) if values else None
