"""Several servers a leg: who gets what, who is left out, and what is sent twice."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.proxy.servers import TICKET, WAIT_S, Call, FakeEngine, Served, answers, says, until

ROOT = Path(__file__).resolve().parents[2]
NEVER_S = 3600.0


def taken(engines: list[FakeEngine]) -> list[int]:
    return [len(engine.seen) for engine in engines]


@contextlib.contextmanager
def refusing():
    """Give a socket whose connections are refused until it listens, and its URL."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound, f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextlib.contextmanager
def busy_with(stage, engine: FakeEngine, body: dict):
    """Have one request in flight at an engine that does not answer it."""
    behave, engine.behave = engine.behave, engine.hang()
    with httpx.Client(base_url=stage.client.base_url, timeout=WAIT_S, trust_env=False) as client:

        async def begins(call: Call) -> None:
            await call.start(200)
            await call.piece(b"x")
            await call.until_gone()

        engine.behave = begins
        with client.stream("POST", "/v1/completions", json=body):
            engine.behave = behave
            yield


# -- policies ------------------------------------------------------------------------------


def test_each_leg_has_a_policy_of_its_own(make_stage):
    stage = make_stage(prefill=3, decode=2, prefill_policy="prefix_aware", prefix_characters=20)
    for number in range(6):
        stage.post({"prompt": f"You are a helpful assistant. {number}"})
    assert sorted(taken(stage.prefill)) == [0, 0, 6]
    assert taken(stage.decode) == [3, 3]


def test_messages_that_begin_alike_are_prefilled_by_one_server(make_stage):
    stage = make_stage(prefill=3, prefill_policy="prefix_aware", prefix_characters=60)
    system = {"role": "system", "content": "You are a helpful assistant and know everything about it."}
    for number in range(5):
        stage.post({"messages": [system, {"role": "user", "content": str(number)}]}, "/v1/chat/completions")
    assert sorted(taken(stage.prefill)) == [0, 0, 5]


def test_a_server_that_is_busy_gets_nothing_while_another_is_idle(make_stage):
    stage = make_stage(decode=2, decode_policy="least_loaded")
    busy, idle = stage.decode
    with busy_with(stage, busy, {"prompt": "long"}):
        for _ in range(4):
            stage.post({"prompt": "x"})
        assert (len(busy.seen), len(idle.seen)) == (1, 4)
        assert stage.metric("server_in_flight", leg="decode", server=stage.settings.decode[0]) == 1
    until(lambda: stage.metric("server_in_flight", leg="decode", server=stage.settings.decode[0]) == 0)


# -- health --------------------------------------------------------------------------------


def up(stage, leg: str, at: int) -> bool:
    return bool(stage.metric("server_up", leg=leg, server=getattr(stage.settings, leg)[at]))


@pytest.mark.parametrize("sick", [says(503, {}), says(404, {}), "hangs"])
def test_a_server_that_fails_its_checks_is_left_out_until_it_passes_one(make_stage, sick, caplog):
    caplog.set_level("INFO", "kvconnect.proxy")
    stage = make_stage(decode=2, health_interval_s=0.02, health_timeout_s=0.2, health_failures=2)
    stage.decode[0].health = stage.decode[0].hang() if sick == "hangs" else sick
    until(lambda: not up(stage, "decode", 0))
    for _ in range(4):
        assert stage.post({"prompt": "x"}).status_code == 200
    assert taken(stage.decode) == [0, 4]
    stage.decode[0].health = None
    until(lambda: up(stage, "decode", 0))
    for _ in range(4):
        stage.post({"prompt": "x"})
    assert taken(stage.decode) == [2, 6]
    lines = [record.getMessage() for record in caplog.records if stage.settings.decode[0] in record.getMessage()]
    assert len(lines) == 2, "once when it is left out, once when it is back"


def test_one_failed_check_is_none(make_stage):
    stage = make_stage(health_interval_s=0.02, health_failures=3)
    answered = []

    async def now_and_then(call: Call) -> None:
        answered.append(503 if len(answered) % 2 else 200)
        await call.json(answered[-1], {})

    stage.decode[0].health = now_and_then
    until(lambda: len(answered) > 8 or not up(stage, "decode", 0))
    assert up(stage, "decode", 0)


def test_a_server_that_refuses_connections_is_left_out_at_once_and_back_when_it_listens(make_stage):
    engine = FakeEngine(answers)
    with refusing() as (bound, url):
        stage = make_stage(decode_urls=(url,), health_interval_s=0.05, health_failures=10**6)
        for _ in range(5):
            assert stage.post({"prompt": "x"}).json()["id"] == "d"
        assert stage.metric("retries_total", leg="decode", cause="unreachable") == 1
        assert not up(stage, "decode", 0)
        bound.listen()
        with Served(engine, listener=bound):
            until(lambda: up(stage, "decode", 0))
            for _ in range(4):
                stage.post({"prompt": "x"})
            assert len(engine.seen) == 2


def test_if_all_are_left_out_they_are_tried_all_the_same(make_stage):
    stage = make_stage(prefill=2, decode=2, health_interval_s=0.02, health_failures=1)
    for engine in (*stage.prefill, *stage.decode):
        engine.health = says(500, {})
    until(lambda: not any(up(stage, leg, at) for leg in ("prefill", "decode") for at in (0, 1)))
    for _ in range(4):
        answer = stage.post({"prompt": "x"})
        assert (answer.status_code, answer.json()["id"]) == (200, "d")
    assert taken(stage.prefill) == taken(stage.decode) == [2, 2]


# -- retries -------------------------------------------------------------------------------


def test_a_decode_server_that_was_never_reached_leaves_the_ticket_to_the_next(make_stage):
    with refusing() as (_, url):
        stage = make_stage(decode_urls=(url,), health_interval_s=NEVER_S)
        assert stage.post({"prompt": "x"}).status_code == 200
    assert stage.decode[0].seen[0].body["kv_transfer_params"] == TICKET
    assert len(stage.prefill[0].seen) == 1


def test_a_ticket_that_a_busy_decode_server_has_read_is_not_sent_again(make_stage):
    stage = make_stage(decode=2)
    stage.decode[0].behave = says(503, {"error": "busy"})
    answer = stage.post({"prompt": "x"})
    assert (answer.status_code, answer.json()["id"]) == (200, "d")
    assert stage.decode[0].seen[0].body == {"prompt": "x", "kv_transfer_params": TICKET}
    assert stage.decode[1].seen[0].body == {"prompt": "x"}
    assert stage.metric("retries_total", leg="decode", cause="busy") == 1
    assert stage.metric("leg_requests_total", leg="decode", outcome="ok") == 1


def test_a_prefill_server_that_is_busy_is_passed_over_for_the_next(make_stage):
    stage = make_stage(prefill=2)
    stage.prefill[0].behave = says(503, {"error": "busy"})
    answer = stage.post({"prompt": "x"})
    assert "x-kvconnect-fallback" not in answer.headers
    assert stage.decode[0].seen[0].body["kv_transfer_params"] == TICKET
    assert stage.prefill[0].seen[0].body == stage.prefill[1].seen[0].body


@pytest.mark.parametrize(("retries", "asked"), [(0, 1), (2, 3), (9, 4)])
def test_as_many_servers_are_asked_as_is_allowed_and_the_last_ones_refusal_is_passed_on(make_stage, retries, asked):
    stage = make_stage(decode=4, retries=retries)
    for engine in stage.decode:
        engine.behave = says(503, {"error": "busy"}, (b"retry-after", b"7"))
    answer = stage.post({"prompt": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert sum(taken(stage.decode)) == asked
    assert stage.metric("retries_total", leg="decode", cause="busy") == asked - 1


@pytest.mark.parametrize("status", [400, 429, 500, 502, 504])
def test_what_a_decode_server_answers_otherwise_is_passed_on_and_sent_to_no_other(make_stage, status):
    stage = make_stage(decode=2)
    stage.decode[0].behave = says(status, {"error": "no"})
    assert stage.post({"prompt": "x"}).status_code == status
    assert taken(stage.decode) == [1, 0]


def test_a_decode_server_that_dies_after_its_first_byte_is_replaced_by_none(make_stage):
    """Its process is killed: the client's stream breaks, and later requests are served by the other one."""
    command = [sys.executable, "-m", "tests.proxy.endless"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            stage = make_stage(decode_urls=(process.stdout.readline().strip(),), health_interval_s=NEVER_S)
            with stage.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
                pieces = answer.iter_raw()
                assert next(pieces) == b"data: 1\n\n"
                process.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.RemoteProtocolError):
                    next(pieces)
        finally:
            process.kill()
    assert not stage.decode[0].seen
    for _ in range(3):
        assert stage.post({"prompt": "y"}).json()["id"] == "d"
    assert stage.metric("leg_requests_total", leg="decode", outcome="broken") == 1


# -- limits --------------------------------------------------------------------------------


def test_a_request_beyond_the_limit_is_told_when_to_come_again(make_stage):
    stage = make_stage(max_in_flight=1)
    with busy_with(stage, stage.decode[0], {"prompt": "long"}):
        answer = stage.post({"prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["type"] == "OverloadedError"
        assert len(stage.prefill[0].seen) == 1
        assert stage.client.get("/v1/models").status_code == 200
        assert stage.client.get("/health").status_code == 200
        assert stage.metric("requests_in_flight") == 1
    until(lambda: stage.metric("requests_in_flight") == 0)
    assert stage.post({"prompt": "x"}).status_code == 200
    assert stage.metric("refusals_total", status="503") == 1


def test_the_prefixes_of_a_server_that_is_left_out_go_to_another_one_and_stay_there(make_stage):
    stage = make_stage(prefill=3, prefill_policy="prefix_aware", health_interval_s=0.02, health_failures=1)
    stage.post({"prompt": "x"})
    home = taken(stage.prefill).index(1)
    stage.prefill[home].health = says(503, {})
    until(lambda: not up(stage, "prefill", home))
    for _ in range(3):
        assert "x-kvconnect-fallback" not in stage.post({"prompt": "x"}).headers
    assert sorted(taken(stage.prefill)) == [0, 1, 3]
