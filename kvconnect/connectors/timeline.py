"""Where the time of a load goes: the phases between a request's first sight and the report to vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

#: The scheduler's half hears of the request (``on_new_request``); all else counts from here.
SEEN = "seen"
#: The buffer has answered whether the KV is to be had, when vLLM asks again.
FOUND = "found"
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

PHASES = (FOUND, CLAIMED, PLANNED, BEGUN, LAUNCHED, MOVED, CONFIRMED, REPORTED)

#: What a request waits for, in order, and between which of the times above. The scheduler's half sees these,
ADMISSION: Final = {"lookup": (SEEN, FOUND), "admit": (FOUND, PLANNED)}
#: and each worker's half these.
MOVE: Final = {
    "dispatch": (PLANNED, BEGUN),
    "open": (BEGUN, LAUNCHED),
    "transfer": (LAUNCHED, MOVED),
    "release": (MOVED, CONFIRMED),
    "report": (CONFIRMED, REPORTED),
}

#: When phases ended, by name: times of `time.monotonic`, which is one clock for all processes of a host.
Times = Mapping[str, float]


class Span(NamedTuple):
    """One phase of a load: times of `time.monotonic`."""

    phase: str
    begin: float
    end: float


def spans(of: Mapping[str, tuple[str, str]], times: Times) -> Iterator[Span]:
    """Return those phases ``of`` `ADMISSION` or `MOVE` whose ends are both known.

    A worker on another host has another clock, which may seem to run backwards: that says nothing.
    """
    for phase, (begin, end) in of.items():
        if begin in times and end in times and times[begin] <= times[end]:
            yield Span(phase, times[begin], times[end])


def moved(times: Times, *, failed: bool) -> dict[str, float]:
    """Return the times of a load that is over now.

    A buffer need not tell its phases: all of its time is the transfer's then. What failed did so in
    the phase that had not ended, which ends here; there are none after it.
    """
    ends = now(LAUNCHED, MOVED, CONFIRMED)
    if not failed:
        return {**ends, LAUNCHED: times[BEGUN], **times}
    missing = next((phase for phase in ends if phase not in times), CONFIRMED)
    return {**times, missing: ends[missing]}


def since_seen(times: Times) -> dict[str, float]:
    """Return the milliseconds from first sight to the end of every phase that is known, in order."""
    seen = times.get(SEEN)
    if seen is None:
        return {}
    return {phase: round((times[phase] - seen) * 1e3, 3) for phase in PHASES if phase in times}


def now(*phases: str) -> dict[str, float]:
    """Return ``phases`` as ended now."""
    return dict.fromkeys(phases, time.monotonic())
