"""``python -m kvconnect bench`` as users meet it, with a third party's pipes."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest

from kvconnect import cli
from kvconnect.bench import cases, plot, rows
from kvconnect.bench.timing import Race, Rounds
from tests.doctor.conftest import environment

pytestmark = pytest.mark.timeout(300)


def test_a_third_partys_pipe_is_measured_and_one_that_brings_other_bytes_fails(site, tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "kvconnect", "bench", "--quick", "--case", "tensor 64 KiB, recv_tensor_into"]
    command += ["--pipe", "chatty", "--pipe", "liar", "--json", str(results)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=environment(site))
    assert done.returncode == 1, done.stderr[-2000:]
    assert "failed: liar: tensor 64 KiB, recv_tensor_into: liar" in done.stdout
    assert "| tensor 64 KiB, recv_tensor_into | chatty |" in done.stdout
    data = json.loads(results.read_text())
    assert set(data) == {"schema", "command", "hardware", "versions", "commit", "rows"}
    assert data["schema"] == 1
    assert {row["backend"] for row in data["rows"]} == {"chatty", "memcpy", "socket", "gloo"}
    names = [field.name for field in dataclasses.fields(rows.Row)]
    assert all(list(row) == names for row in data["rows"])
    assert all(row["gb_per_s"] > 0 for row in data["rows"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--case", "tenser"], "--case 'tenser' is in no case's name; there are: tensor 4 KiB, recv_tensor;"),
        (["--pipe", "tpc"], "did you mean 'tcp'?"),
        (["--pipe", "{"], "--pipe is not valid JSON"),
        (["--pipe", '{"checksum": true}'], "--pipe must be a name or an object with a 'name'"),
        (["--plot", "x.jpg"], "--plot must name a .png or .svg file"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, told, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_without_matplotlib_the_cure_is_named_before_anything_is_measured(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert cli.main(["bench", "--plot", "x.svg"]) == 2
    assert "pip install 'kvconnect[bench]'" in capsys.readouterr().err


def test_every_case_has_a_name_of_its_own():
    names = [name for name, _ in cases.every()]
    assert len(set(names)) == len(names) == 2 * len(cases.SIZES) + 1 + 2 * len(cases.COUNTS)


def test_rounds_run_a_race_as_pytest_benchmark_does():
    race = Race(lambda i: 1.0 + i, {"a": lambda i: 2.0 + i}, rounds=3)
    race.run(Rounds())
    assert race.samples == {"case": [1.0, 2.0, 3.0], "a": [2.0, 3.0, 4.0]}


def some_rows():
    found = []
    for nbytes in (1 << 16, 1 << 20):
        race = Race(lambda _: 0.1, {"memcpy": lambda _: 0.01}, rounds=2)
        race.run(Rounds())
        found += rows.of_race(rows.Case(cases.tensor_name(nbytes, into=True), nbytes, nbytes), "shm", race)
    return [dataclasses.asdict(row) for row in found]


def test_a_picture_has_a_line_for_each_pipe_and_reference():
    (panel,) = plot.curves(some_rows()).items()
    assert panel[0] == "tensor, recv_tensor_into"
    assert [size for size, _ in panel[1]["shm"]] == [1 << 16, 1 << 20]
    assert set(panel[1]) == {"shm", "memcpy"}


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_pictures_are_written(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"p{suffix}"
    plot.draw({"rows": some_rows()}, path)
    assert path.stat().st_size > 1000
