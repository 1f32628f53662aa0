"""Which pipe engines would take, what it does, and why it is slow where it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from kvconnect import registry
from kvconnect.buffers.choice import AutoOptions, Candidate, choose_pipe, describe_pipes
from kvconnect.config import Backend
from kvconnect.control import split
from kvconnect.doctor import host, peer
from kvconnect.doctor.counterpart import Blocks, settings
from kvconnect.doctor.findings import Finding, Path
from kvconnect.doctor.intent import Intent
from kvconnect.doctor.measure import Ceiling, Contender, Owner, Reader, known, memory_copy, race
from kvconnect.doctor.peer import Met
from kvconnect.errors import KVConnectError
from kvconnect.paging import PagedMemory
from kvconnect.pipes.base import Reach

#: Less of a ceiling than this is named slow. TCP over loopback reaches a fifth of a memcpy.
_LEAST = {"memcpy": 0.05}
_LEAST_OF_LINK = 0.5
#: Another pipe that is so much faster should have been the one.
_FASTER = 2.0
#: Why a pipe may be slow though it works, by name, and what to do.
_KNOWN = {
    "nixl": (
        "UCX without a fast transport (no RDMA, no GPUDirect) copies each piece by itself",
        "check UCX_TLS and UCX_NET_DEVICES, set the pipe's option mode to 'staged', or use a block-outermost layout",
    ),
    "tcp": (
        "its bytes pass the kernel's sockets, and sums of them are compared",
        "use shm within a host; between hosts use nixl with RDMA, or the option checksum: false",
    ),
    "shm": ("its bytes go through a ring if the peer's memory cannot be read", "see peer.process_vm"),
    "nccl": (
        "NCCL has fallen back to sockets",
        "check NCCL_DEBUG=INFO for NET/Socket, and NCCL_IB_DISABLE, NCCL_P2P_DISABLE",
    ),
}


def choose(intent: Intent, met: Met, memory: PagedMemory) -> Sequence[Candidate]:
    """Return the pipes that engines would choose among, the best first, before anything is opened.

    Raises:
        KVConnectError: no pipe joins the two; says why for each.

    """
    return choose_pipe(describe_pipes(intent.pipe.name, memory), met.worker)[0]


def expected(found: Sequence[Candidate]) -> Finding:
    """Say which pipe would be taken, of a peer that is not to be disturbed by measuring."""
    first = found[0]
    rivals = [other.name for other in found[1:] if other.cls.traits.reach == first.cls.traits.reach]
    what = f"{first.name} would be taken"
    if rivals:
        what += f", unless a large load shows {' or '.join(rivals)} to be faster"
    return Finding("path", "note", f"{what}; not measured", "run `doctor --serve` beside the engine to measure")


class Survey:
    """Measures every pipe that joins this end to a doctor."""

    def __init__(self, intent: Intent, met: Met, address: str, blocks: Blocks, only: Sequence[str]) -> None:
        """``only``: besides the pipe that is taken, measure no others than these, unless it is empty."""
        self._intent, self._met, self._blocks, self._only = intent, met, blocks, only
        self._owner = Owner(address, met.hello.incarnation)
        self._here = peer.is_here(met, host.facts())
        self._ceiling = self._find_ceiling(address)
        self.paths: list[Path] = []
        self.findings: list[Finding] = []

    def run(self) -> None:
        """Measure what is taken and the others; fill `paths` and `findings`."""
        with contextlib.ExitStack() as readers:
            try:
                choose(self._intent, self._met, self._blocks.memory)
                taken = self._enter(self._intent.pipe, readers, taken=True)
                joins, reasons = choose_pipe(describe_pipes("auto", self._blocks.memory), self._met.worker)
                contenders = [taken, *self._others(taken.reader.via, joins, readers, reasons)]
                bounds = race(contenders, self._blocks.case, self._ceiling)
                if taken.error is not None:
                    raise taken.error
            except KVConnectError as error:
                cure = "see what is said of each pipe; the decode engine would recompute every prompt"
                self.findings.append(Finding("path", "bad", str(error), cure))
                return
        reasons |= {one.reader.via: f"it joins the two, and fails: {one.error}" for one in contenders if one.error}
        self.paths = [one.path(self._blocks.case, self._ceiling, bounds) for one in contenders if one.error is None]
        self.findings += self._verdicts(joins, reasons)

    def _enter(self, pipe: Backend, readers: contextlib.ExitStack, *, taken: bool) -> Contender:
        # Taken over from the peer, so that what does not match is a finding and not the end of all.
        marks = self._met.hello.fingerprint
        reader = Reader(settings(self._intent.config, pipe, marks, produces=False), self._blocks, self._owner)
        readers.callback(reader.close)
        return Contender.enter(reader, self._blocks.case, taken=taken)

    def _others(
        self, taken: str, joins: Sequence[Candidate], readers: contextlib.ExitStack, reasons: dict[str, str]
    ) -> Iterator[Contender]:
        """Open what joins the two besides the pipe that is ``taken``; add to ``reasons`` why one cannot be."""
        options = AutoOptions.of(self._intent.pipe).options
        for name in (one.name for one in joins if one.name != taken):
            if not self._only or name in self._only:
                try:
                    yield self._enter(Backend(name, options.get(name, {})), readers, taken=False)
                except KVConnectError as error:
                    reasons[name] = f"it joins the two, and fails: {error}"

    def _find_ceiling(self, address: str) -> Ceiling | None:
        if self._here:
            return memory_copy(self._blocks.memory.device, self._blocks.case.load_bytes)
        link = host.link_speed(split(address)[1])
        return None if link is None else known(*link)

    # -- what it means --------------------------------------------------------------

    def _verdicts(self, joins: Sequence[Candidate], reasons: Mapping[str, str]) -> Iterator[Finding]:
        taken = self.paths[0]
        for name, reason in sorted(reasons.items()):
            if name != taken.pipe and (name in self._only or not _of_one_process(name)):
                yield Finding(f"path.{name}", "bad" if name in self._only else "note", f"not taken: {reason}")
        slow = list(self._slowness(taken, joins, reasons))
        yield from slow
        if not slow:
            yield Finding("path", "ok", f"{taken.pipe} is taken: {_figures(taken)}")
        for path in self.paths:
            if path is not taken:
                share = "" if path.ratio is None or path.ratio >= self._least else ", far below the ceiling"
                yield Finding(f"path.{path.pipe}", "note", f"not taken: {_figures(path)}{share}")

    @property
    def _least(self) -> float:
        return _LEAST.get(self._ceiling.name, _LEAST_OF_LINK) if self._ceiling is not None else 0.0

    def _slowness(self, taken: Path, joins: Sequence[Candidate], reasons: Mapping[str, str]) -> Iterator[Finding]:
        """Say what makes the path slow that would be taken, one finding for each."""
        figures = f"{taken.pipe} is taken: {_figures(taken)}"
        faster = max(self.paths, key=_speed)
        # By both measures: on a busy host either may mislead.
        found = min(_speed(faster) / _speed(taken), faster.gb_per_s / taken.gb_per_s) > _FASTER
        if taken.ratio is not None and taken.ratio < self._least:
            why, cure = _KNOWN.get(taken.pipe, ("that is the pipe's own doing", ""))
            if found:
                cure = f"{_set(faster.pipe)}: {_times(faster, taken)} as fast in the same run"
            elif not cure:
                cure = "take another pipe, or ask its author: `python -m kvconnect list` says who that is"
            yield Finding("path", "slow", f"{figures}, far below what this machine can do; {why}", cure)
        elif found:
            what = f"{figures}; {faster.pipe} moved {_times(faster, taken)} as much in the same run"
            yield Finding("path", "slow", what, _set(faster.pipe))
        nearer = [one.name for one in joins if self._here and one.cls.traits.reach < _reach(taken.pipe)]
        if nearer:
            why = "; ".join(f"{name}: {reasons[name]}" for name in nearer if name in reasons)
            what = f"both ends are on one host, and {taken.pipe} is taken though {' and '.join(nearer)} would reach"
            yield Finding("path.nearer", "slow", f"{what} ({why})" if why else what, _set("auto"))


def _set(pipe: str) -> str:
    return f'use "kv_connector": "KvConnect" with "pipe": "{pipe}" at both ends'


def _reach(pipe: str) -> Reach:
    return registry.pipe(pipe).traits.reach


def _of_one_process(pipe: str) -> bool:
    """Whether it is of no interest that the pipe does not reach another process."""
    try:
        return _reach(pipe) is Reach.PROCESS
    except KVConnectError:
        return False


def _times(fast: Path, slow: Path) -> str:
    return f"{_speed(fast) / _speed(slow):.3g} ×"


def _speed(path: Path) -> float:
    """Return how fast it was, next to what ran beside it where there was something."""
    return path.gb_per_s if path.ratio is None else path.ratio


def _figures(path: Path) -> str:
    figures = f"{path.gb_per_s:.3g} GB/s, one block in {path.p50_us:.0f} µs (p99 {path.p99_us:.0f} µs)"
    if path.ratio is None:
        return figures
    return f"{figures}, {path.ratio:.2g} of {path.ceiling} in the same run"
