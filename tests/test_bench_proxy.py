"""The benchmark of the proxy runs, and its committed results are of the agreed format."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from bench.proxy import ProxyRow, rows_of
from bench.report import ROOT
from tools.docs.proxy import RESULTS

FORMAT = {"schema", "command", "hardware", "versions", "commit", "rows"}


def check(results: dict) -> None:
    assert set(results) == FORMAT
    assert "load_before" in results["hardware"]
    assert all(set(row) == {field.name for field in fields(ProxyRow)} for row in results["rows"])
    assert len(results["rows"]) == 8


def test_committed_results_have_the_agreed_format():
    results = json.loads(RESULTS.read_text("utf-8"))
    check(results)
    assert {row["requests_per_s"] for row in results["rows"]} == {200.0}
    for row in results["rows"]:
        assert (row["reference"] is None) == (row["backend"] != "proxy")


def test_what_the_proxy_adds_is_the_difference_of_percentiles():
    took = {"proxy": [0.003] * 99 + [0.009], "direct": [0.001] * 100}
    own, other = rows_of("whole", 1000, took, 200.0)
    assert (own.backend, own.reference, other.backend, other.reference) == ("proxy", "direct", "direct", None)
    assert own.over_p50_us == pytest.approx(2000)
    assert own.ratio == pytest.approx(1 / 3, abs=0.001)
    assert (own.requests, other.over_p50_us) == (100, None)


def test_it_runs(tmp_path):
    """Real servers, the real command; too few requests to say anything."""
    out = tmp_path / "proxy.json"
    command = [sys.executable, "-m", "bench.proxy", "--rounds", "1", "--seconds", "0.2", "--rate", "100", "--out", out]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    check(json.loads(out.read_text("utf-8")))
