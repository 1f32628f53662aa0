"""``python -m bench.control``: what engines cost each other at the control channel, up to a thousand of each role.

Two parts. *One among many*, measured: one engine of either role and its peers, over real sockets on this
host (`bench.control.hub`). *All with all*, simulated: a thousand producers and a thousand consumers on a
network on which every message takes a set time (`bench.control.mesh`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench import results_file
from bench.control.engines import Loaded, Shape
from bench.control.hub import Hub, Usage
from bench.control.mesh import Mesh, Served
from bench.control.network import Costs, Network
from bench.report import ROOT
from kvconnect.bench import results, tables

_COMMAND = "python -m bench.control"
_MEASURED = ("kvconnect", "pyzmq", "msgpack")
_ROUNDS, _SINGLE, _IDLE_S = 5, 100, 30.0
#: Of a 70B model on eight GPUs.
_LARGE = Shape(layers=80, workers=8)


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    case: str
    measure: str
    unit: str
    value: float


class Report:
    """Collects figures, and prints each as it comes."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(self, case: str, measure: str, unit: str, value: float) -> None:
        """Take a figure in."""
        self.figures.append(Figure(case, measure, unit, float(f"{value:.4g}")))
        print(f"{case:32} {measure:60} {value:12.4g} {unit}", flush=True)


# -- one among many -----------------------------------------------------------------------


def hub(report: Report, role: str, peers: int) -> None:
    """Measure one engine of ``role`` among so many peers."""
    name = {"P": "one producer, {} consumers", "D": "one consumer, {} producers"}[role]
    case, measured = name.format(peers), Hub(role, peers, Shape())
    try:
        _meet(report, case, measured, peers)
        _serve(report, case, measured, peers)
        _rest(report, case, measured)
        measured.restart()
        done, took_s = measured.round()
        report.add(case, "restarted: until all have loaded from or into it again", "s", took_s)
        report.add(case, "restarted: loads that failed", "", _failed(done))
    finally:
        measured.close()


def _meet(report: Report, case: str, measured: Hub, peers: int) -> None:
    before = measured.usage()
    done, took_s = measured.round()
    after = measured.usage()
    report.add(case, "all meet it at once: until all have loaded", "s", took_s)
    report.add(case, "all meet it at once: loads that failed", "", _failed(done))
    report.add(case, "a first load: processor time of the one", "ms", 1e3 * (after.cpu_s - before.cpu_s) / peers)
    report.add(case, "memory for a peer", "kB", (after.rss_bytes - before.rss_bytes) / peers / 1e3)
    report.add(case, "descriptors for a peer", "", (after.descriptors - before.descriptors) / peers)
    report.add(case, "threads, all", "", after.threads)


def _serve(report: Report, case: str, measured: Hub, peers: int) -> None:
    before = measured.usage()
    done = [one for _ in range(_ROUNDS) for one in measured.round()[0]]
    after = measured.usage()
    if _failed(done):
        raise RuntimeError(f"loads failed that nothing disturbed: {Counter(one.failure for one in done)}")
    count = peers * _ROUNDS
    report.add(case, "a later load: processor time of the one", "ms", 1e3 * (after.cpu_s - before.cpu_s) / count)
    messages = (_messages(after) - _messages(before)) / count
    report.add(case, "a later load: requests at the control channel, pings included", "", messages)
    alone = [measured.single(number % peers) for number in range(_SINGLE)]
    report.add(case, "a later load by itself, p50", "ms", 1e3 * float(np.median([one.loaded_s for one in alone])))


def _rest(report: Report, case: str, measured: Hub) -> None:
    time.sleep(_IDLE_S / 2)  # what follows the last load has to be over
    before = measured.usage()
    time.sleep(_IDLE_S)
    after = measured.usage()
    report.add(case, "idle: share of a core", "%", 100 * (after.cpu_s - before.cpu_s) / _IDLE_S)
    report.add(case, "idle: requests a second", "", (_messages(after) - _messages(before)) / _IDLE_S)


def _messages(usage: Usage) -> int:
    return usage.asked.total() + usage.answered.total()


def _failed(done: Sequence[Loaded]) -> int:
    return sum(bool(one.failure) for one in done)


# -- all with all --------------------------------------------------------------------------


def mesh(report: Report, engines: int, rate: float, seconds: float) -> None:
    """Simulate so many producers and as many consumers, ``rate`` requests a second in all."""
    network = Network(Costs())
    simulated = Mesh(network, engines, engines, Shape())
    case = f"{engines} × {engines}, simulated"
    for label, restart in (("", False), ("all producers restarted at once: ", True)):
        if restart:
            for producer in simulated.producers:
                producer.stop()
                producer.start()
        before, bytes_before = Counter(network.asked), network.bytes.total()
        served = simulated.run(seconds, rate)
        requests = served.loaded + served.missed.total()
        for op, count in sorted((network.asked - before).items()):
            report.add(case, f"{label}requests of `{op}` for a load", "", count / requests)
        report.add(case, f"{label}bytes for a load", "kB", (network.bytes.total() - bytes_before) / requests / 1e3)
        _times(report, case, label, served)
        waits = [producer.server.thread.longest_s for producer in simulated.producers]
        report.add(case, f"{label}longest that a producer's thread was behind", "ms", 1e3 * max(waits))
    content(report, case, simulated)


def content(report: Report, case: str, simulated: Mesh) -> None:
    """Let a few requests look for their content at every producer."""
    before = Counter(simulated.network.asked)
    served = simulated.run(5.0, 1.0, tickets=False)
    asked = (simulated.network.asked - before)["match"]
    report.add(case, "without a ticket: requests of `match` for a load", "", asked / max(1, served.loaded))


def _times(report: Report, case: str, label: str, served: Served) -> None:
    report.add(case, f"{label}loads", "", served.loaded)
    report.add(case, f"{label}requests computed instead", "", served.missed.total())
    report.add(case, f"{label}look-up, p99", "ms", 1e3 * float(np.percentile(served.found_s, 99)))


def memory(report: Report, engines: int) -> None:
    """Measure what one consumer remembers of each of so many producers."""
    for name, shape in (("32 layers, 1 worker", Shape()), ("80 layers, 8 workers", _LARGE)):
        simulated = Mesh(Network(Costs()), engines, 1, shape)
        held = simulated.acquaint(simulated.consumers[0])
        report.add(f"one consumer knows {engines}", f"memory for a producer, {name}", "kB", held / engines / 1e3)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--peers", type=int, nargs="*", default=[10, 100, 1000], help="of the one engine (10 100 1000)")
    parser.add_argument("--engines", type=int, default=1000, help="of each role, simulated (1000)")
    parser.add_argument("--rate", type=float, default=5000.0, help="requests a second in all, simulated (5000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated (20)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/control.json")
    args = parser.parse_args()
    report, started = Report(), os.getloadavg()[0]
    for peers in args.peers:
        for role in "PD":
            hub(report, role, peers)
    memory(report, min(args.engines, 200))
    mesh(report, args.engines, args.rate, args.seconds)
    result = results.build([], started, _COMMAND, results_file.commit())
    result |= {"versions": results.versions(_MEASURED), "rows": [asdict(figure) for figure in report.figures]}
    tables.save(result, args.out)


if __name__ == "__main__":
    main()
