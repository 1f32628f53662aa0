"""What each leg of a request gets."""

from __future__ import annotations

import gzip
import json

import pytest

from kvconnect.proxy import legs
from tests.proxy.servers import TICKET, Call, says

ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_ticket_of_the_prefill_answer_goes_verbatim_into_the_decode_request(stage, path):
    sent = {"model": "m", "prompt": "hello", "max_tokens": 16, "temperature": 0.25, "vllm_xargs": {"a": [1, "b"]}}
    answer = stage.post(sent, path)
    assert answer.status_code == 200
    assert answer.json()["id"] == "d"
    assert answer.headers["x-from"] == "decode"
    assert "x-kvconnect-fallback" not in answer.headers
    (p,), (d,) = stage.prefill[0].seen, stage.decode[0].seen
    assert (p.path, d.path) == (path, path)
    assert p.body == sent | {"max_tokens": 1, "stream": False, "kv_transfer_params": ASKED}
    assert d.body == sent | {"kv_transfer_params": TICKET}


def test_the_prefill_leg_asks_for_one_token_of_one_answer(stage):
    sent = {
        "prompt": ["a", "b"],
        "max_tokens": 9,
        "max_completion_tokens": 8,
        "min_tokens": 4,
        "n": 3,
        "best_of": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stage.post(sent, "/v1/chat/completions")
    (p,), (d,) = stage.prefill[0].seen, stage.decode[0].seen
    assert p.body == {
        "prompt": ["a", "b"],
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "stream": False,
        "kv_transfer_params": ASKED,
    }
    assert d.body == sent | {"kv_transfer_params": TICKET}


def test_a_clients_own_kv_transfer_params_reach_no_engine(stage):
    theirs = {"remote_host": "169.254.169.254", "do_remote_prefill": True}
    stage.post({"prompt": "x", "kv_transfer_params": theirs})
    stage.prefill[0].behave = says(200, {"id": "p"})
    stage.post({"prompt": "x", "kv_transfer_params": theirs})
    assert [seen.body["kv_transfer_params"] for seen in stage.prefill[0].seen] == [ASKED, ASKED]
    assert [seen.body.get("kv_transfer_params") for seen in stage.decode[0].seen] == [TICKET, None]


@pytest.mark.parametrize("ticket", [None, "text", [1]])
def test_a_prefill_answer_without_a_ticket_is_no_failure(stage, ticket):
    stage.prefill[0].behave = says(200, {"id": "p", "kv_transfer_params": ticket})
    answer = stage.post({"prompt": "x"})
    assert answer.status_code == 200
    assert "x-kvconnect-fallback" not in answer.headers
    assert stage.decode[0].seen[0].body == {"prompt": "x"}


def test_a_prefill_answer_that_is_not_json_is_no_failure(stage):
    async def behave(call: Call) -> None:
        await call.start(200)
        await call.piece(b"\xff<html>", more=False)

    stage.prefill[0].behave = behave
    assert stage.post({"prompt": "x"}).json()["id"] == "d"


def test_both_legs_carry_the_clients_request_id(stage):
    stage.post({"prompt": "x"}, headers={"X-Request-Id": "client-7"})
    assert stage.prefill[0].seen[0].header("x-request-id") == "client-7"
    assert stage.decode[0].seen[0].header("x-request-id") == "client-7"


def test_without_one_each_request_gets_a_request_id_of_its_own(stage):
    stage.post({"prompt": "x"})
    stage.post({"prompt": "x"})
    ids = [seen.header("x-request-id") for seen in stage.prefill[0].seen]
    assert ids == [seen.header("x-request-id") for seen in stage.decode[0].seen]
    assert len(set(ids)) == 2
    assert all(ids)


def test_end_to_end_headers_reach_both_legs_and_hop_by_hop_ones_neither(stage):
    headers = {
        "Authorization": "Bearer secret",
        "X-Session": "7",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "only for the proxy",
        "Keep-Alive": "timeout=5",
        "TE": "trailers",
        "Proxy-Authorization": "Basic x",
        "Upgrade": "h2c",
    }
    stage.post({"prompt": "x"}, headers=headers)
    for seen in (stage.prefill[0].seen[0], stage.decode[0].seen[0]):
        assert seen.header("authorization") == "Bearer secret"
        assert seen.header("x-session") == "7"
        assert seen.header("content-type") == "application/json"
        assert not {"x-hop", "keep-alive", "te", "proxy-authorization", "upgrade"} & {key for key, _ in seen.headers}
        assert seen.header("host") != f"127.0.0.1:{stage.port}"
        names = [key for key, _ in seen.headers]
        assert len(names) == len(set(names))


def test_the_decode_servers_headers_come_back_once_each_and_hop_by_hop_ones_do_not(stage):
    async def behave(call: Call) -> None:
        headers = ((b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"keep-alive", b"timeout=5"))
        await call.json(200, {"id": "d"}, *headers)

    stage.decode[0].behave = behave
    answer = stage.post({"prompt": "x"})
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "keep-alive" not in answer.headers
    assert len(answer.headers.get_list("date")) <= 2  # the test's own uvicorn adds one


def test_an_encoded_answer_is_passed_on_in_its_encoding(stage):
    text = gzip.compress(json.dumps({"id": "zipped"}).encode())

    async def behave(call: Call) -> None:
        await call.start(200, (b"content-encoding", b"gzip"), (b"content-length", b"%d" % len(text)))
        await call.piece(text, more=False)

    stage.decode[0].behave = behave
    answer = stage.post({"prompt": "x"}, headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json() == {"id": "zipped"}
    assert stage.decode[0].seen[0].header("accept-encoding") == "gzip"
    assert stage.prefill[0].seen[0].header("accept-encoding") == "identity"


def test_the_query_string_goes_along(stage):
    stage.post({"prompt": "x"}, "/v1/completions?debug=1")
    assert stage.prefill[0].seen[0].path == stage.decode[0].seen[0].path == "/v1/completions?debug=1"


def test_servers_of_a_leg_are_used_in_turn(make_stage):
    stage = make_stage(prefill=2, decode=3)
    for _ in range(6):
        stage.post({"prompt": "x"})
    assert [len(engine.seen) for engine in stage.prefill] == [3, 3]
    assert [len(engine.seen) for engine in stage.decode] == [2, 2, 2]


def test_models_are_the_decode_servers(stage):
    stage.decode[0].behave = says(200, {"data": [{"id": "m"}]})
    answer = stage.client.get("/v1/models", headers={"Authorization": "Bearer secret"})
    assert answer.json() == {"data": [{"id": "m"}]}
    assert stage.decode[0].seen[0].path == "/v1/models"
    assert stage.decode[0].seen[0].header("authorization") == "Bearer secret"
    assert not stage.prefill[0].seen


def nested(depth):
    return b'{"prompt": "x", "a": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, nested(201), nested(960)])
def test_a_body_that_is_no_json_object_is_refused_here(stage, content):
    answer = stage.client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "the request body must be a JSON object, nested 200 deep at most",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
    assert not stage.prefill[0].seen
    assert not stage.decode[0].seen


def test_json_that_is_not_too_deep_arrives_whole(stage):
    assert stage.client.post("/v1/completions", content=nested(198)).status_code == 200
    assert json.dumps(stage.decode[0].seen[0].body["a"]).encode() == nested(198)[21:-1]
    wide = {"prompt": "x", "messages": [{"content": [{"text": "a"}]} for _ in range(300)]}
    assert stage.post(wide).status_code == 200


def test_a_ticket_that_is_nested_too_deeply_is_none(stage):
    async def behave(call: Call) -> None:
        await call.start(200)
        await call.piece(b'{"kv_transfer_params": ' + nested(960) + b"}", more=False)

    stage.prefill[0].behave = behave
    assert stage.post({"prompt": "x"}).json()["id"] == "d"
    assert stage.decode[0].seen[0].body == {"prompt": "x"}


def test_a_body_beyond_the_limit_is_refused_here(make_stage):
    stage = make_stage(max_body_bytes=1000)
    assert stage.post({"prompt": "x" * 1000}).status_code == 413
    assert stage.post({"prompt": "x" * 900}).status_code == 200
    assert len(stage.prefill[0].seen) == 1


def test_other_paths_and_methods_are_not_served(stage):
    assert stage.client.post("/v1/embeddings", json={}).status_code == 404
    assert stage.client.get("/v1/completions").status_code == 405
    assert not stage.decode[0].seen


def test_large_integers_and_floats_survive_both_legs(stage):
    sent = {"prompt": [1, 2**53 + 1], "seed": 2**63 - 1, "temperature": 0.1}
    stage.post(sent)
    assert {key: stage.decode[0].seen[0].body[key] for key in sent} == sent


def test_a_large_request_arrives_whole(stage):
    sent = {"prompt": "".join(map(str, range(500_000)))}
    assert stage.post(sent).status_code == 200
    assert stage.prefill[0].seen[0].body["prompt"] == stage.decode[0].seen[0].body["prompt"] == sent["prompt"]


def test_leg_bodies_do_not_change_the_request_they_are_made_from():
    body = {"prompt": "x", "n": 2, "kv_transfer_params": {"a": 1}}
    legs.prefill_body(body)
    legs.decode_body(body, {"b": 2})
    assert body == {"prompt": "x", "n": 2, "kv_transfer_params": {"a": 1}}


def test_a_servers_cookie_goes_to_its_client_and_into_no_other_request(stage):
    for engine in (stage.prefill[0], stage.decode[0]):
        engine.behave = says(200, {"kv_transfer_params": TICKET}, (b"set-cookie", b"session=alice; Path=/"))
    answer = stage.post({"prompt": "x"})
    assert answer.headers["set-cookie"] == "session=alice; Path=/"
    stage.client.cookies.clear()
    stage.post({"prompt": "y"})
    stage.post({"prompt": "z"}, headers={"Cookie": "own=1"})
    for engine in (stage.prefill[0], stage.decode[0]):
        assert [seen.header("cookie") for seen in engine.seen] == [None, None, "own=1"]
