"""Piece by piece or staged: whichever was quicker for transfers like this one.

Each transfer is measured, and what it took is kept for each peer: seconds a run for
transfers of about its size in runs of about its length, seconds a byte for staged ones
of about its size. Where nothing is known yet, a transfer that is not large tries it out,
so that a bad guess costs little; the slower way is tried again now and then, since a link
or a pool changes.
The first transfer of either kind does not count: it also pays for connections and memory
that the next ones find there. Good news counts at once, bad news little by little.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import ClassVar, Final, Literal

Mode = Literal["runs", "staged"]
#: What is alike: a mode, and powers of two of a transfer's bytes and of a run's.
Bucket = tuple[Mode, int, int]

#: Runs of this length on average are read about as fast as contiguous memory.
LONG_RUN_BYTES: Final = 1 << 20
#: Transfers up to here may try what is not known to be quicker.
TRIAL_BYTES: Final = 32 << 20
#: So many choices after which the slower way is tried again.
AGAIN: Final = 256
_NEW: Final = 0.3  # share of a new measurement that is worse
_MAX_PEERS: Final = 1024


class Costs:
    """What transfers from one peer took. Thread-safe.

    Args:
        first: the mode that is taken for short runs while nothing is known.

    """

    def __init__(self, first: Mode) -> None:
        self._first: Mode = first
        self._lock = threading.Lock()
        self._units: dict[Bucket, float] = {}
        self._warm: set[Mode] = set()
        self._choices = 0

    def choose(self, runs: int, nbytes: int) -> Mode:
        """Return the mode for a transfer of ``nbytes`` bytes in ``runs`` runs."""
        first: Mode = "runs" if nbytes >= runs * LONG_RUN_BYTES else self._first
        other: Mode = "staged" if first == "runs" else "runs"
        with self._lock:
            self._choices += 1
            took = {mode: self._predict(mode, runs, nbytes) for mode in (first, other)}
            trial = nbytes <= TRIAL_BYTES
            if took[first] is None:
                return first
            if took[other] is None:
                return other if trial else first
            best, worst = sorted(took, key=lambda mode: took[mode] or 0.0)
            return worst if trial and self._choices % AGAIN == 0 else best

    def note(self, mode: Mode, runs: int, nbytes: int, took_s: float) -> None:
        """Keep what a transfer took."""
        key, units = _bucket(mode, runs, nbytes), _units(mode, runs, nbytes)
        with self._lock:
            if mode not in self._warm:
                self._warm.add(mode)
                return
            new, old = took_s / units, self._units.get(key)
            self._units[key] = new if old is None or new < old else old + _NEW * (new - old)

    def known(self) -> Mapping[Bucket, float]:
        """Return seconds a run or a byte of what is alike."""
        with self._lock:
            return dict(self._units)

    def _predict(self, mode: Mode, runs: int, nbytes: int) -> float | None:
        unit = self._units.get(_bucket(mode, runs, nbytes))
        return None if unit is None else unit * _units(mode, runs, nbytes)


def _units(mode: Mode, runs: int, nbytes: int) -> int:
    return max(1, runs if mode == "runs" else nbytes)


def _bucket(mode: Mode, runs: int, nbytes: int) -> Bucket:
    # What a transfer costs besides its bytes counts for little in large ones.
    size, run = min(nbytes, TRIAL_BYTES), nbytes // max(1, runs) if mode == "runs" else 0
    return mode, size.bit_length(), run.bit_length()


class _Known:
    lock = threading.Lock()
    peers: ClassVar[dict[tuple[str, str], Costs]] = {}


def costs(peer: str, kind: str) -> Costs:
    """Return what is known of reads from ``peer`` into memory of ``kind`` (``"DRAM"`` or ``"VRAM"``)."""
    with _Known.lock:
        if len(_Known.peers) > _MAX_PEERS:
            _Known.peers.clear()
        # Scattered reads are fast between CPUs and slow between GPUs, staged ones the reverse.
        return _Known.peers.setdefault((peer, kind), Costs("runs" if kind == "DRAM" else "staged"))
