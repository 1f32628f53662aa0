"""What the demo reads from logs and metrics, and the table it prints."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from kvconnect.demo import client as api
from kvconnect.demo import report

LOG = """\
INFO 2026-11-21 [vllm] something else
INFO 2026-11-21 [kvconnect.connectors.worker] kvconnect.load {"request": "cmpl-abc-0-1a2b3c4d", "tokens": 96, "bytes": 1000, "ms": 1.5, "rank": 0, "pipe": "shm", "peer": "127.0.0.1:5"}
INFO 2026-11-21 [kvconnect.connectors.worker] kvconnect.load {"request": "cmpl-abc-0-1a2b3c4d", "tokens": 96, "bytes": 1000, "ms": 2.5, "rank": 1, "pipe": "shm", "peer": "127.0.0.1:5"}
INFO 2026-11-21 [kvconnect.connectors.worker] kvconnect.load {"request": "cmpl-other-0-1a2b3c4d", "tokens": 7, "bytes": 10, "ms": 0.1, "rank": 0, "pipe": "tcp", "peer": "127.0.0.1:5"}
"""  # noqa: E501 - log lines are as long as they are

METRICS = """\
# HELP vllm:prompt_tokens_by_source_total Tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="demo",source="local_compute"} 12.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="demo",source="external_kv_transfer"} 160.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="demo",source="external_kv_transfer"} 2.0
vllm:num_requests_running{engine="0",model_name="a, \\"quoted\\" name"} 3.0
process_open_fds 20.0
"""


def row(**changes: object) -> report.Row:
    values = {
        "name": "four blocks",
        "prompt_tokens": 128,
        "load": report.Load(128, 1_048_576, 2.34, "shm", "127.0.0.1:5"),
        "with_ms": 31.4,
        "without_ms": 63.0,
        "client_ms": 80.0,
        "equal": True,
    }
    return report.Row(**(values | changes))  # type: ignore[arg-type]


def test_the_parts_of_a_load_add_up_over_the_ranks(tmp_path: Path) -> None:
    log = tmp_path / "D.log"
    log.write_text(LOG)
    assert report.find_load(log, "abc") == report.Load(96, 2000, 2.5, "shm", "127.0.0.1:5")


def test_a_request_that_loaded_nothing_has_no_record(tmp_path: Path) -> None:
    log = tmp_path / "D.log"
    log.write_text(LOG)
    assert report.find_load(log, "absent") is None


def test_a_table_has_one_line_a_request_and_says_no_loudly() -> None:
    text = report.table([row(), row(name="chat", load=None, equal=False)]).splitlines()
    assert len(text) == 5
    assert text[3].split() == ["four", "blocks", "128", "128", "1,048,576", "2.3", "shm", "31", "63", "80", "yes"]
    assert text[4].split() == ["chat", "128", "0", "0", "-", "-", "31", "63", "80", "NO"]


def test_metrics_are_added_up_over_the_engines_of_a_server() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=METRICS))
    with httpx.Client(transport=transport) as client:
        found = api.metrics(client, "http://d")
    assert found[api.EXTERNAL_TOKENS] == 162
    assert found["vllm:num_requests_running"] == 3
    assert found["process_open_fds"] == 20


def test_an_error_inside_a_stream_is_an_error() -> None:
    body = 'data: {"error": {"message": "the engine died"}}\n\ndata: [DONE]\n\n'
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=body))
    with httpx.Client(transport=transport) as client, pytest.raises(httpx.HTTPError, match="the engine died"):
        api.stream(client, "http://d", api.Prompt("hi"))


def test_a_refusal_carries_the_servers_text() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(400, text="min_tokens must be less"))
    with httpx.Client(transport=transport) as client, pytest.raises(httpx.HTTPError, match="400: min_tokens"):
        api.send(client, "http://d", api.Prompt("hi"))
