"""Options, the processes that all cases share, and what is written at the end."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from bench import report, results_file
from bench.nixl import Nixl
from kvconnect.bench import results, rows, tables
from kvconnect.bench.entrants import backends, label
from kvconnect.bench.near import Near

SEED = 20260
CASE_LIMIT_S = 240


@dataclass
class Book:
    """What the run has measured so far."""

    rows: list[rows.Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True
    load: float = field(default_factory=lambda: os.getloadavg()[0])


_BOOK = pytest.StashKey[Book]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    group = parser.getgroup("kvconnect bench")
    group.addoption("--pipe", action="append", default=[], help="measure only this pipe, a name or JSON (repeatable)")
    group.addoption("--quick", action="store_true", help="two rounds of every case; nothing is written")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Leave the printing to the table at the end."""
    config.stash[_BOOK] = Book(is_whole=not (config.option.pipe or config.option.quick))
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every case with every registered pipe that works between two processes here."""
    if "backend" in metafunc.fixturenames:
        book = metafunc.config.stash[_BOOK]
        found = backends(metafunc.config.option.pipe, book.left_out)
        metafunc.parametrize("backend", found, ids=label)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the cases, always in the same way, and give each a limit that a slow machine keeps."""
    items.sort(key=lambda item: item.nodeid)
    random.Random(SEED).shuffle(items)  # noqa: S311 - an order, not a secret
    for item in items:
        item.add_marker(pytest.mark.timeout(CASE_LIMIT_S))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Note that this run is not a whole one."""
    for item in items:
        item.config.stash[_BOOK].is_whole = False


@pytest.fixture(scope="session")
def _near() -> Iterator[list[Near]]:
    running: list[Near] = []
    yield running
    for near in running:
        near.kill()


@pytest.fixture
def near(_near: list[Near], request: pytest.FixtureRequest) -> Iterator[Near]:
    """The two processes; new ones after a case that failed, whose ends cannot be trusted."""
    if not _near:
        _near.append(Near())
    failed = request.session.testsfailed
    yield _near[0]
    if request.session.testsfailed > failed:
        _near.pop().kill()


@pytest.fixture(scope="session")
def nixl() -> Iterator[Nixl | None]:
    """NIXL's agents, or ``None`` where NIXL is not installed."""
    if importlib.util.find_spec("nixl") is None:
        yield None
        return
    agents = Nixl()
    yield agents
    agents.kill()


@pytest.fixture
def book(request: pytest.FixtureRequest) -> Book:
    """Where cases put their rows."""
    return request.config.stash[_BOOK]


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Return how many rounds a case runs, given how many it wants."""
    return partial(min, 2) if request.config.option.quick else int


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Write the results of a whole run and print the table."""
    book = config.stash[_BOOK]
    if not book.rows:
        return
    order = {"tensor": 0, "ping-pong": 1, "blocks": 2, "sum": 3, "load": 4}
    book.rows.sort(key=lambda row: (order.get(row.case.split(" ")[0], 9), row.bytes, row.case, row.backend))
    found = results.build(book.rows, book.load, results_file.COMMAND, results_file.commit())
    terminalreporter.write_line("")
    terminalreporter.write_line(tables.render(found))
    for name, why in sorted(book.left_out.items()):
        terminalreporter.write_line(f"not measured: {name}: {why}")
    if book.is_whole and exitstatus == 0:
        tables.save(found, report.RESULTS)
        report.update()
        terminalreporter.write_line(f"written: {report.RESULTS}, {report.DOCUMENT}")
    else:
        terminalreporter.write_line("nothing written: only a whole run without failures is")
