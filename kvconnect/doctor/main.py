"""``python -m kvconnect doctor``: examine this host, a configuration, and the way to a peer."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvconnect import registry
from kvconnect.control import split
from kvconnect.doctor import host, intent, paths, peer
from kvconnect.doctor.counterpart import MARK, Blocks, Case, Counterpart, listening_at, other_device
from kvconnect.doctor.findings import Finding
from kvconnect.doctor.intent import Intent
from kvconnect.doctor.report import Report
from kvconnect.errors import ConfigError, KVConnectError, UnknownBackendError

#: For the measuring process, all pipes together.
_LIMIT_S = 300.0
_MOST_TOLD = 600


@dataclass(frozen=True)
class Order:
    """What is to be examined.

    Args:
        config: the KV transfer configuration.
        case: the paged case that was asked for, or ``None``: the peer's, or the default one.
        device: of this end's memory.
        marks: fields of this end's fingerprint.
        address: to listen on, and ``port``; ``None`` is the configuration's.
        pipes: besides the one that is taken, measure these only.

    """

    config: Mapping[str, object]
    case: Case | None
    device: str
    marks: Mapping[str, str | int]
    address: str | None
    port: int
    pipes: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command-line arguments; return 0 if all is well, 1 if something is slow or does not work.

    Raises:
        ConfigError: the command line is wrong.

    """
    logging.getLogger("kvconnect").addHandler(logging.NullHandler())  # the report says it, once
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    order = _order(options)
    if options.serve:
        return _serve(order)
    with _undisturbed_output():
        found = _alone(order, arguments) if options.peer is None else _examine(order, options.peer)
    if options.output is not None:
        Path(options.output).write_text(found.to_json(), encoding="utf-8")
    print(found.to_json() if options.json else found.to_text())
    return found.status


@contextlib.contextmanager
def _undisturbed_output() -> Iterator[None]:
    """Send what foreign libraries print (NIXL does) to standard error: standard output is the report's."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvconnect doctor", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peer", metavar="HOST:PORT", help="measure the way to a `doctor --serve`, or look at an engine")
    what.add_argument("--serve", action="store_true", help="be a peer: print an address and wait")
    parser.add_argument("--config", default="{}", help="vLLM's --kv-transfer-config: JSON, or a file with it")
    parser.add_argument("--host", help="address to listen on (default: the configuration's bind_host)")
    parser.add_argument("--port", type=int, default=0, help="control port of --serve (default: a free one)")
    parser.add_argument(
        "--pipe", action="append", default=[], metavar="NAME", help="measure no others besides the one taken"
    )
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="compare: model=…, dtype=…")
    parser.add_argument("--device", default="cpu", help="of the KV cache: cpu or cuda:N (default: %(default)s)")
    for name in ("layers", "piece_bytes", "load_bytes"):
        text = f"of the KV cache that is measured (default: {getattr(Case, name)}, or the peer's)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, dest=name, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON there, too")
    return parser


def _order(options: argparse.Namespace) -> Order:
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port must be a TCP port (0 to 65535), got {options.port}")
    for name in options.pipe:
        if name not in registry.pipes():
            raise UnknownBackendError("pipe", name, registry.pipes())
    if options.peer is not None:
        split(options.peer)
    _check_device(options.device)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Case)}
    given = {name: value for name, value in given.items() if value is not None}
    case = Case(**given) if given else None
    config = intent.load(options.config)
    marks = _marks(options.field, options.device)
    return Order(config, case, options.device, marks, options.host, options.port, options.pipe)


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not number.isdecimal()):
        raise ConfigError(f"--device must be 'cpu' or 'cuda:N', got {device!r}")


def _marks(given: Sequence[str], device: str) -> dict[str, str | int]:
    marks: dict[str, str | int] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"--field must look like 'NAME=VALUE', got {text!r}")
        marks[name] = int(value) if value.isdecimal() else value
    return {"platform": host.platform_field() if device == "cpu" else "cuda", **marks}


def _serve(order: Order) -> int:
    wanted, findings = intent.examine(order.config)
    if wanted is None:
        raise ConfigError(findings[-1].what)
    with _counterpart(order, wanted, order.port, order.device) as counterpart:
        print(f"python -m kvconnect doctor --peer {counterpart.endpoint}", flush=True)
        threading.Event().wait()  # until a signal
    return 0


def _counterpart(order: Order, wanted: Intent, port: int, device: str) -> contextlib.closing[Counterpart]:
    own = listening_at(wanted, order.address, port)
    return contextlib.closing(Counterpart(own, order.case or Case(), device, order.marks))


def _alone(order: Order, arguments: Sequence[str]) -> Report:
    """Examine this host against itself, by a second process.

    That one reads, since it is nobody's ancestor: the kernel lets parents read their children's
    memory where it does not let other processes, engines for instance.
    """
    found, wanted = _prepare(order)
    if wanted is None:
        return found
    try:
        counterpart = _counterpart(order, wanted, 0, other_device(order.device))
    except KVConnectError as error:
        cure = "correct the configuration, or the device"
        found.findings.append(Finding("peer", "bad", f"this end cannot be opened: {error}", cure))
        return found
    with counterpart as open_end, tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        command = [sys.executable, "-m", "kvconnect", "doctor", *arguments]
        command += ["--peer", open_end.endpoint, "--output", output.name]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_LIMIT_S)
            how, told = f"ended with status {done.returncode}", done.stderr
        except subprocess.TimeoutExpired:
            how, told = f"did not end within {_LIMIT_S:g} s", ""
        if text := output.read():
            return Report.from_json(text)
    what = f"the measuring process {how}: {told.strip()[-_MOST_TOLD:]}"
    found.findings.append(Finding("peer", "bad", what, "leave pipes out by --pipe, or configure one by name"))
    return found


def _prepare(order: Order) -> tuple[Report, Intent | None]:
    """Look at the configuration and at this host."""
    wanted, findings = intent.examine(order.config)
    found = Report(host.facts(), None, findings)
    if wanted is not None:
        found.findings += host.examine(wanted, order.device)
    return found, wanted


def _examine(order: Order, address: str) -> Report:
    found, wanted = _prepare(order)
    if wanted is None:
        return found
    wanted = peer.allowing(listening_at(wanted, order.address, 0), address)
    try:
        met = peer.meet(wanted, address)
        case, misfits = peer.case_of(met, order.case)
    except KVConnectError as error:
        found.findings.append(peer.unmet(error))
        return found
    kind = MARK if met.facts else "engine"
    found.peer = {"address": address, "kind": kind, "engine": met.hello.engine}
    found.findings += [*peer.compare(wanted, met, found.host, order.marks), *misfits]
    try:
        _measure(order, wanted, met, address, case, found)
    except KVConnectError as error:
        found.findings.append(Finding("path", "bad", str(error), "the decode engine would recompute every prompt"))
    return found


def _measure(order: Order, wanted: Intent, met: peer.Met, address: str, case: Case | None, found: Report) -> None:
    if case is None:
        blocks = Blocks(Case(1, 8, 8), order.device, stamped=False)
        found.findings.append(paths.expected(paths.choose(wanted, met, blocks.memory)))
        return
    survey = paths.Survey(wanted, met, address, Blocks(case, order.device, stamped=False), order.pipes)
    survey.run()
    found.findings += survey.findings
    found.paths += survey.paths
