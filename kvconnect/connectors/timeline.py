"""Where the time of a load goes: the phases between a request's first sight and the report to vLLM."""

from __future__ import annotations

import time
from collections.abc import Mapping

#: The scheduler's half hears of the request (``on_new_request``); all else counts from here.
SEEN = "seen"
#: It answers vLLM with tokens to fetch (``get_num_new_matched_tokens``).
CLAIMED = "claimed"
#: A step's plan carries the load (``build_connector_meta``).
PLANNED = "planned"
#: The worker's half is told (``start_load_kv``).
BEGUN = "begun"
#: By the buffer (`Transfer.phases`): its pipe has the read, and the bytes are in place.
LAUNCHED, MOVED = "launched", "moved"
#: The owner vouches for them, too: the load is over.
CONFIRMED = "confirmed"
#: vLLM collects the result (``get_transfer_results``).
REPORTED = "reported"

PHASES = (CLAIMED, PLANNED, BEGUN, LAUNCHED, MOVED, CONFIRMED, REPORTED)

#: When phases ended, by name: times of `time.monotonic`, which is one clock for all processes of a host.
Times = Mapping[str, float]


def since_seen(times: Times) -> dict[str, float]:
    """Return the milliseconds from first sight to the end of every phase that is known, in order."""
    seen = times.get(SEEN)
    if seen is None:
        return {}
    return {phase: round((times[phase] - seen) * 1e3, 3) for phase in PHASES if phase in times}


def now(*phases: str) -> dict[str, float]:
    """Return ``phases`` as ended now."""
    return dict.fromkeys(phases, time.monotonic())
