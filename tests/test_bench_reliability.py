"""The table of faults says what the results file says, and hides nothing."""

from __future__ import annotations

from typing import Any

import pytest

from bench import report as files
from bench.reliability import report

ROW = {
    "case": "P killed",
    "engines": report.ENGINES,
    "asked": 4,
    "right": 4,
    "cut_short": 0,
    "fetched": 0,
    "failed": 0,
    "errors": [],
    "slowest_s": 1.5,
    "over": "P serves again",
    "recovered_s": 4.84,
    "free_after_s": 5.1,
    "leaked_blocks": 0,
}


def test_the_document_shows_exactly_what_the_results_say() -> None:
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert text == report.document(text, files.load(report.RESULTS)), "run `python -m bench.reliability.report`"


def test_nothing_leaked_and_no_answer_was_wrong_in_the_results() -> None:
    results = files.load(report.RESULTS)
    assert results is not None
    for row in results["rows"]:
        assert row["leaked_blocks"] == 0, row["case"]
        assert row["right"] + row["cut_short"] + row["failed"] == row["asked"], row["case"]


def test_a_row_says_what_became_of_the_requests() -> None:
    assert report.line(ROW) == (
        "| P killed | 4 of 4 answered, all right, 0 fetched, 4 computed by D, slowest after 1.5 s "
        "| 4.8 s (from when P serves again) | 5 s | 0 |"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"right": 3}, "1 WRONG"),
        ({"fetched": 4}, "all fetched"),
        ({"right": 2, "cut_short": 2, "fetched": 2}, "2 of 4 end at once, with as much as there was"),
        ({"right": 0, "failed": 4, "errors": ["http://h:1/v1 answered 400: {}"]}, "4 of 4 fail at once: HTTP 400 |"),
        ({"free_after_s": None, "engines": "halves"}, "P killed (halves)"),
        ({"leaked_blocks": 7}, "| 7 |"),
    ],
)
def test_what_is_not_as_it_should_be_is_shown(changes: dict[str, Any], said: str) -> None:
    assert said in report.line(ROW | changes)
