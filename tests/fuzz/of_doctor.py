"""Target: what a peer tells `kvconnect.doctor` of itself, up to the report that is printed."""

from __future__ import annotations

import functools

from kvconnect.blocks import heap_memory
from kvconnect.buffers import layouts
from kvconnect.config import Backend
from kvconnect.doctor import counterpart, host, paths, peer
from kvconnect.doctor.counterpart import Case
from kvconnect.doctor.findings import Finding
from kvconnect.doctor.intent import Intent
from kvconnect.doctor.report import Report
from kvconnect.errors import KVConnectError
from kvconnect.pipes.peer_memory import Beacon
from tests.fuzz.harness import Target
from tests.fuzz.of_control import HELLOS, LAYOUT, ME, plain, worker
from tests.fuzz.strategies import mutated

CASE = Case(2, 64, 512)
BEACON = Beacon()
MARKS = {"model": "m", "dtype": "fp8", "platform": "cpu"}
#: Four examinations: some lines for each thing that is compared, and texts of a peer's are cut.
MOST_TEXT, MOST_LINES = 1 << 16, 200


def doctors(*, here, case=CASE):
    """Return what a doctor of this host, or of another, answers with."""
    facts = {
        **host.facts(),
        "pipe": "auto",
        "host": "$host",
        "clock": "$clock",
        "beacon": "$beacon",
        "gpus": ["nvidia0"],
    }
    if not here:
        facts |= {"host": "b", "name": "b", "vllm": "0.1", "clock": "c"}
    pipes = {name: {**card, "host": "$host"} for name, card in worker(0)["pipes"].items()}
    pipes["cuda_ipc"] = next(iter(pipes.values()))
    told = {**worker(0), "pipes": pipes, "layout": layouts.write(case.layout()), counterpart.MARK: facts}
    return {**plain(ME), "num_parts": 1, "workers": [told]}


@functools.cache
def facts():
    return host.facts()


@functools.cache
def memory():
    return heap_memory(LAYOUT)


def examine(report, intent, body, case):
    """Fill a report, as `kvconnect.doctor.main` does."""
    try:
        met = peer.read(body)
        found, misfits = peer.case_of(met, case)
        assert found is None or found.layout().shape() == met.layout.shape()
        report.peer = {"address": "a:1", "kind": "doctor", "engine": met.hello.engine}
        report.findings += [*peer.compare(intent, met, report.host, MARKS), *misfits]
    except KVConnectError as error:
        report.findings.append(peer.unmet(error))
        return
    try:
        report.findings.append(paths.expected(paths.choose(intent, met, memory())))
    except KVConnectError as error:
        report.findings.append(Finding("path", "bad", str(error)))


def real(part):
    """Fill in what is of this host and this process."""
    if isinstance(part, dict):
        return {key: real(value) for key, value in part.items()}
    if isinstance(part, list):
        return [real(value) for value in part]
    known = {"$host": facts()["host"], "$clock": facts()["clock"], "$beacon": BEACON.card()}
    return known.get(part, part) if isinstance(part, str) else part


def run_doctor(body):
    if not isinstance(body, dict):
        return  # the control channel has looked
    body = real(body)
    report = Report(facts())
    for case in (None, CASE):
        examine(report, Intent(), body, case)
        examine(report, Intent(pipe=Backend("shm")), body, case)
    text = report.to_text()
    assert len(text) < MOST_TEXT, "a peer fills the screen"
    assert text.count("\n") < MOST_LINES, "likewise"
    assert text.replace("\n", "").isprintable(), "a peer writes to the terminal as it likes"
    assert Report.from_json(report.to_json()) == report


TARGETS = [
    Target(
        "doctor",
        mutated([doctors(here=True), doctors(here=False), *HELLOS]),
        run_doctor,
        per_byte=256,
        fixed_bytes=2 << 20,
    ),
]
