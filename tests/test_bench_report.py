"""The benchmark document shows what the results file says, and the file says whole things."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from bench import report
from kvconnect.bench import rows, tables
from kvconnect.bench.timing import CASE, Clock, Race, ratio

FORMAT = {"schema", "command", "hardware", "versions", "commit", "rows"}
LARGE = rows.Case("tensor 16 MiB, recv_tensor_into", 16 * rows.MIB, 16 * rows.MIB)
BLOCKS = rows.Case("blocks 16.8 MB, read", 16 * rows.MIB, 32768, is_blocks=True)


class FakeBenchmark:
    """Runs a case's rounds as pytest-benchmark's pedantic mode does."""

    def pedantic(self, function, *, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            function()


def race_of(case: float, **references: float) -> Race:
    race = Race(lambda _: case, {}, 1)
    race.samples = {CASE: [case] * 3} | {name: [seconds] * 3 for name, seconds in references.items()}
    return race


def results_of(found: list[rows.Row]) -> dict:
    head = {"schema": 1, "command": "make bench", "hardware": {"cpu": "some"}, "versions": {"torch": "2"}}
    return head | {"commit": "abc", "rows": [dataclasses.asdict(row) for row in found]}


def test_the_document_shows_exactly_what_the_results_file_says():
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert text == report.document(text, report.load()), "run `python -m bench.report`"


def test_the_results_file_has_the_agreed_format():
    results = report.load()
    if results is None:
        pytest.skip("no run was recorded yet")
    assert set(results) == FORMAT
    names = {field.name for field in dataclasses.fields(rows.Row)}
    assert all(set(row) == names for row in results["rows"])


def test_what_the_results_file_calls_met_follows_from_its_numbers():
    results = report.load()
    if results is None:
        pytest.skip("no run was recorded yet")
    for row in results["rows"]:
        if row["goal"] is None:
            assert row["met"] is None
        elif row["reference"] is None:
            assert row["met"] == (row["p50_us"] <= row["goal"])
        elif row["ratio"] != row["goal"]:  # a ratio is rounded in the file
            assert row["met"] == (row["ratio"] > row["goal"])


def test_a_saved_file_reads_back_equal_and_keeps_one_row_a_line(tmp_path):
    results = results_of(rows.of_race(LARGE, "shm", race_of(1.0, memcpy=0.8)))
    path = tmp_path / "cpu.json"
    tables.save(results, path)
    assert report.load(path) == json.loads(json.dumps(results))
    assert sum('"case"' in line for line in path.read_text().splitlines()) == len(results["rows"])


def test_a_reader_without_results_is_told_so(tmp_path):
    assert report.load(tmp_path / "none.json") is None
    assert "No run" in tables.render(None)


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        report.document("# no markers here", None)


def test_rendering_twice_changes_nothing():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.document(text, results_of(rows.of_race(LARGE, "shm", race_of(1.0, memcpy=0.8))))
    assert once == report.document(once, results_of(rows.of_race(LARGE, "shm", race_of(1.0, memcpy=0.8))))
    assert once.startswith("before")
    assert once.endswith("after\n")
    assert "old" not in once


def test_a_missed_goal_is_named_with_its_numbers():
    text = tables.render(results_of(rows.of_race(LARGE, "shm", race_of(1.0, memcpy=0.5))))
    assert "0 of 1 met" in text
    assert "shm, tensor 16 MiB, recv_tensor_into: 0.50 × memcpy, goal at least 0.75" in text


def test_every_reference_is_a_column_and_has_its_own_speed():
    text = tables.render(results_of(rows.of_race(BLOCKS, "tcp", race_of(0.01, socket=0.01, memcpy=0.002))))
    assert re.search(r"\| × socket \| × memcpy \|", text)
    assert "1.68 (10,000)" in text
    assert "8.39 (2,000)" in text


@pytest.mark.parametrize(
    ("case", "backend", "reference", "goal"),
    [
        (LARGE, "shm", "memcpy", 0.75),
        (LARGE, "tcp", "socket", 0.9),
        (LARGE, "tcp", "memcpy", None),
        (LARGE, "somebody-elses", "memcpy", None),
        (LARGE, "tcp", "nixl-read", None),
        (BLOCKS, "tcp", "nixl-read", 2.0),
        (BLOCKS, "shm", "nixl-write", 2.0),
        (BLOCKS, "shm", "memcpy", 0.75),
        (dataclasses.replace(LARGE, nbytes=16 * rows.MIB - 1), "shm", "memcpy", None),
    ],
)
def test_goals_hold_from_16_mib_on_for_the_pipes_they_name(case, backend, reference, goal):
    assert rows.goal(case, backend, reference) == goal


def test_a_ping_pong_is_held_against_microseconds_and_compared_with_references():
    race = race_of(20e-6, socket=10e-6)
    found = rows.of_ping_pong(rows.Case("ping-pong", 4096, 4096), "shm", {CASE: [20e-6], "socket": [10e-6]}, race)
    assert (found[0].reference, found[0].goal, found[0].met) == (None, 30.0, True)
    assert [(row.backend, row.reference, row.ratio) for row in found[1:]] == [
        ("shm", "socket", 0.5),
        ("socket", None, None),
    ]


def test_a_reference_that_every_pipe_measured_is_listed_once():
    twice = rows.of_race(LARGE, "shm", race_of(1.0, memcpy=0.5)) + rows.of_race(LARGE, "tcp", race_of(1.0, memcpy=0.6))
    assert [row.backend for row in rows.unique(twice)] == ["shm", "memcpy", "tcp"]


def test_ratios_pair_samples_of_the_same_round():
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 2.0


def test_every_contender_runs_once_a_round_in_orders_that_differ():
    ran: list[tuple[str, int]] = []

    def contender(name):
        def sample(index):
            ran.append((name, index))
            return 1.0

        return sample

    race = Race(contender(CASE), {"a": contender("a"), "b": contender("b")}, rounds=6)
    race.run(FakeBenchmark())
    measured = ran[3:]  # after one warm-up each
    for index in range(6):
        assert {name for name, i in measured[3 * index : 3 * index + 3] if i == index} == {CASE, "a", "b"}
    assert len({tuple(name for name, _ in measured[3 * i : 3 * i + 3]) for i in range(6)}) > 1
    assert {name: len(samples) for name, samples in race.samples.items()} == {CASE: 6, "a": 6, "b": 6}


def test_the_clock_ends_a_measurement_where_the_receiver_says():
    clock = Clock()
    start = clock()
    clock.took(1.5)
    assert clock() == start + 1.5
    assert clock() > start
