"""``python -m kvconnect bench``: measure registered pipes beside memcpy, sockets and gloo, between two processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvconnect import __version__, registry
from kvconnect.bench import cases, plot, results, tables
from kvconnect.bench.cases import Case, Setting
from kvconnect.bench.entrants import backends, label
from kvconnect.bench.near import Near
from kvconnect.bench.rows import Row
from kvconnect.bench.timing import Rounds
from kvconnect.config import Backend
from kvconnect.errors import ConfigError, KVConnectError

_QUICK_ROUNDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command-line arguments; return 0, or 1 if a case failed.

    Raises:
        ConfigError: the command line is wrong, or a pipe that it names cannot be had.

    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    chosen = [(name, case) for name, case in cases.every() if options.case in name]
    if not chosen:
        names = "; ".join(name for name, _ in cases.every())
        raise ConfigError(f"--case {options.case!r} is in no case's name; there are: {names}")
    if options.plot is not None:
        plot.check(options.plot)
    left_out: dict[str, str] = {}
    found = backends(options.pipe, left_out)
    for backend in found:
        registry.pipe(backend.name)
    load = os.getloadavg()[0]
    run = Run(partial(min, _QUICK_ROUNDS) if options.quick else int)
    with contextlib.closing(run):
        for backend in found:
            for name, case in chosen:
                run.measure(backend, name, case)
    data = results.build(
        run.rows, load, " ".join(["python -m kvconnect bench", *arguments]), f"kvconnect {__version__}"
    )
    if run.rows:
        print(tables.render(data))
    _write(data, options.json, options.plot)
    for name, why in sorted(left_out.items()):
        print(f"not measured: {name}: {why}")
    for failure in run.failures:
        print(f"failed: {failure}")
    return int(bool(run.failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvconnect bench", description=__doc__)
    text = "measure only this pipe, a name or JSON with options (repeatable; default: every one that can run)"
    parser.add_argument("--pipe", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose names contain this")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds of every case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there: a .png or .svg file")
    return parser


def _write(data: dict[str, object], json: Path | None, picture: Path | None) -> None:
    try:
        if json is not None:
            tables.save(data, json)
        if picture is not None and data["rows"]:
            plot.draw(data, picture)
    except OSError as error:
        raise ConfigError(f"the results cannot be written: {error}") from error


@dataclass
class Run:
    """What has been measured so far, and the processes that measure."""

    rounds: cases.RoundsOf
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _near: Near | None = None

    def measure(self, backend: Backend, name: str, case: Case) -> None:
        """Run one case; after one that failed the processes are new, since their ends cannot be trusted."""
        print(f"{label(backend)}: {name}", file=sys.stderr, flush=True)
        if self._near is None:
            self._near = Near()
        try:
            self.rows += case(Setting(self._near, backend, Rounds(), self.rounds))
        # Of the other process whatever it raised, as RuntimeError; the rest is the pipe's.
        except (KVConnectError, RuntimeError, EOFError, OSError, TimeoutError) as error:
            self.failures.append(f"{label(backend)}: {name}: {error}")
            self.close()

    def close(self) -> None:
        """End the processes."""
        near, self._near = self._near, None
        if near is not None:
            near.kill()
