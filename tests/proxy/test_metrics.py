"""What ``/metrics`` says of what happened."""

from __future__ import annotations

import asyncio
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.report import ROOT
from tests.proxy.servers import Call, answers, gives_ticket, says, until


def series(stage) -> set[tuple]:
    text = stage.client.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {(each.name, *sorted(each.labels.items())) for family in families for each in family.samples}


def test_both_legs_are_counted_by_outcome(stage):
    stage.post({"prompt": "x"})
    stage.decode[0].behave = says(400, {})
    stage.post({"prompt": "x"})
    stage.decode[0].behave = says(500, {})
    stage.post({"prompt": "x"})
    stage.client.get("/v1/models")
    assert stage.metric("leg_requests_total", leg="prefill", outcome="ok") == 3
    for outcome in ("ok", "client_error", "server_error"):
        assert stage.metric("leg_requests_total", leg="decode", outcome=outcome) == 1
    assert stage.metric("leg_requests_total", leg="models", outcome="server_error") == 1
    assert stage.metric("first_byte_seconds_count") == 1


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_they_tell_which_leg_was_slow(stage, leg):
    engine = getattr(stage, leg)[0]

    async def slow(call: Call) -> None:
        await asyncio.sleep(0.4)
        await (gives_ticket if leg == "prefill" else answers)(call)

    engine.behave = slow
    stage.post({"prompt": "x"})
    seconds = {each: stage.metric("leg_seconds_sum", leg=each) for each in ("prefill", "decode")}
    assert seconds.pop(leg) >= 0.4
    assert max(seconds.values()) < 0.4
    assert stage.metric("first_byte_seconds_sum") >= 0.4


def test_fallbacks_are_counted_by_cause(make_stage):
    stage = make_stage(prefill_timeout_s=0.2)
    stage.prefill[0].behave = says(500, {})
    stage.post({"prompt": "x"})
    stage.prefill[0].behave = stage.prefill[0].hang()
    stage.post({"prompt": "x"})
    assert stage.metric("fallbacks_total", cause="status") == 1
    assert stage.metric("fallbacks_total", cause="timeout") == 1
    assert stage.metric("leg_requests_total", leg="prefill", outcome="timeout") == 1


def test_a_leg_that_its_client_gave_up_is_cancelled_and_holds_nothing(stage):
    stage.decode[0].behave = stage.decode[0].hang()
    with pytest.raises(Exception, match="timed out"):
        stage.post({"prompt": "x"}, timeout=0.5)
    until(lambda: stage.metric("leg_requests_total", leg="decode", outcome="cancelled") == 1)
    assert stage.metric("requests_in_flight") == 0
    assert stage.metric("server_in_flight", leg="decode", server=stage.settings.decode[0]) == 0


def test_no_request_adds_a_series(stage):
    stage.post({"prompt": "x"})
    stage.post([])
    before = series(stage)
    for number in range(5):
        body = {"model": f"m{number}", "prompt": f"p{number}", "user": f"u{number}"}
        stage.post(body, f"/v1/completions?q={number}", headers={"X-Request-Id": f"r{number}"})
        stage.post([number])
        stage.client.get(f"/nowhere/{number}")
    assert series(stage) == before


def test_the_page_names_each_metric_and_no_other(stage):
    page = (ROOT / "docs" / "proxy.md").read_text("utf-8")
    families = text_string_to_metric_families(stage.client.get("/metrics").text)
    own = {f"{each.name}_total" if each.type == "counter" else each.name for each in families}
    own = {name for name in own if name.startswith("kvconnect") and not name.endswith("_created")}
    assert set(re.findall(r"kvconnect_proxy_\w+", page)) == own
