"""What of the benchmark of real engines needs no engine: loads on servers that answer like one, logs, goals, tables."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bench.serving import goals, load, report, results, session, setups, timeline, transfers
from bench.serving.__main__ import batches
from bench.serving.contenders import CONTENDERS, FLOOR, LOWER_FLOOR, NIXL, P2P_NCCL, Fleet, Legs, fleet
from bench.serving.load import Load, Loader
from bench.serving.session import Session
from bench.serving.streams import Streams, StreamsError, gaps_ms
from kvconnect.demo import client as api
from kvconnect.demo.engines import Server

KV_BYTES = 1000


# -- a server that answers as vLLM does -----------------------------------------------


class FakeEngine(ThreadingHTTPServer):
    """Answers completions at once, gives tickets, streams a token every 5 ms, counts what it was told to fetch."""

    daemon_threads = True

    def __init__(self, log):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked, self.fetched, self.first_s, self.lock = [], 0, 0.0, threading.Lock()
        self.server = Server("fake", (), self.server_address[1], log)
        self.log = log
        threading.Thread(target=self.serve_forever, daemon=True, name="fake-engine").start()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        source = 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer",engine="0"}'
        self._send(
            f"{source} {self.server.fetched}\nvllm:time_to_first_token_seconds_sum {self.server.first_s}\n".encode()
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.headers.get("X-Request-Id")
        if body.get("stream"):
            self._stream(body["max_tokens"])
            return
        params = body.get("kv_transfer_params") or {}
        answer = {"choices": [{"index": 0, "text": ""}], "usage": {"prompt_tokens": len(body["prompt"])}}
        with self.server.lock:
            self.server.asked.append((time.monotonic(), name, tuple(body["prompt"]), params))
            if params.get("do_remote_decode"):
                answer["kv_transfer_params"] = {"ticket": name}
            if "ticket" in params:
                self.server.fetched += len(body["prompt"])
                self.server.first_s += 0.25
                write_load(self.server.log, f"cmpl-{name}-0-abcd", len(body["prompt"]) * KV_BYTES)
        self._send(json.dumps(answer).encode())

    def _send(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, tokens):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        pace = threading.Event()
        try:
            for _ in range(tokens):
                self.wfile.write(b'data: {"choices": [{"text": ""}]}\n\n')
                self.wfile.flush()
                pace.wait(0.005)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # the reader has gone, as it does when it has seen enough

    def log_message(self, *_):
        pass


def write_load(log, request, nbytes, **changes):
    at_ms = {"claimed": 1.0, "planned": 2.0, "begun": 3.0, "launched": 4.0, "moved": 9.0, "confirmed": 9.0}
    record = {"request": request, "tokens": 1, "bytes": nbytes, "ms": 6.0, "rank": 0, "pipe": "shm", "peer": "p:1"}
    record |= {"seen": time.monotonic(), "at_ms": at_ms | {"reported": 9.5}} | changes
    with log.open("a", encoding="utf-8") as file:
        file.write(f"INFO 2026-01-01 [kvconnect.connectors.worker] kvconnect.load {json.dumps(record)}\n")


@pytest.fixture
def engines(tmp_path):
    made = [FakeEngine(tmp_path / f"{name}.log") for name in "PD"]
    for engine in made:
        engine.log.touch()
    yield made
    for engine in made:
        engine.shutdown()
        engine.server_close()


def small():
    return setups.Setup(
        setups.EngineOptions("model", max_model_len=4000), "eager", "CPU", (None, None), (1, 1), KV_BYTES, (10, 99)
    )


@pytest.fixture
def make_session(engines):
    with api.open_client(10.0) as http:

        def make(name="shm"):
            contender = CONTENDERS[name]
            prefill = None if contender.legs is Legs.NONE else engines[0].server
            its = Fleet(prefill, engines[1].server)
            return Session(contender, small(), its, http, np.random.default_rng(7), "0.32.0")

        yield make


# -- one at a time --------------------------------------------------------------------


def test_a_hand_over_carries_the_ticket_and_one_id_through_both_legs(make_session, engines):
    done = make_session().hand_over(40)
    (_, asked, prompt, _), (_, fetched, same, params) = engines[0].asked[0], engines[1].asked[0]
    assert asked == fetched == done.request_id == params["ticket"]
    assert prompt == same
    assert done.first_s == pytest.approx(0.25)


def test_the_floor_is_asked_for_nothing_but_a_token(make_session, engines):
    done = make_session(FLOOR).hand_over(40)
    assert done.prefill_s == 0
    assert engines[0].asked == []
    assert engines[1].asked[0][3] == {}


def test_a_row_holds_the_phases_of_the_hand_over_in_the_middle(make_session):
    (row,) = session.measure(make_session(), [64], "fresh", 3)
    assert row["fetched_tokens"] == 3 * 64
    assert row["bytes"] == 64 * KV_BYTES
    assert row["total_ms"] == pytest.approx(row["prefill_ms"] + 250, abs=30)
    assert list(row["phases_ms"])[:2] == ["seen", "claimed"]
    assert list(row["phases_ms"])[-1] == "answered"
    assert row["phases_ms"]["launched"] == pytest.approx(row["phases_ms"]["seen"] + 4, abs=0.01)
    assert row["launch_ms"] == 4.0


def test_every_engine_of_a_pool_is_fragmented_but_for_those_that_only_hand_over(make_session, engines):
    make_session().fragment(5)
    assert [len(engine.asked) for engine in engines] == [5, 5]
    its = make_session(P2P_NCCL)
    its.fleet = Fleet(engines[0].server, engines[1].server, ("h:1", "h:2"))
    its.fragment(3)
    named = [sorted(name for _, name, _, _ in engine.asked[5:]) for engine in engines]
    assert named[0] == named[1]
    assert all("___prefill_addr_h:1___decode_addr_h:2_" in name for _, name, _, _ in engines[1].asked[5:])


# -- under load -----------------------------------------------------------------------

FEW = Load(
    rate=40, seconds=1.0, tokens=48, prompts=3, fresh_tokens=8, lead_s=0.2, streams=2, prefills=1, prefill_tokens=20
)


def test_arrivals_are_the_same_whenever_they_are_asked_for_and_come_at_the_rate():
    assert FEW.arrivals_s() == FEW.arrivals_s()
    many = Load(rate=62, seconds=100, tokens=1, prompts=1).arrivals_s()
    assert len(many) == pytest.approx(6200, rel=0.05)
    gaps = np.diff(many)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as of an exponential distribution
    assert max(many) < 100


def test_a_load_hands_over_every_arrival_and_times_the_streams_beside_it(make_session, engines):
    (once,), (row,) = load.measure(make_session(), FEW, 2, 393e9)
    assert len(once["itl_p99_ms_all"]) == 1  # kept, should the second repeat be cut off
    arrivals = len(FEW.arrivals_s())
    handed = [name for _, name, _, params in engines[1].asked if "ticket" in params]
    assert len(handed) == len(set(handed)) == 3 + 2 * arrivals  # prepared, then twice
    assert row["failed"] == 0
    assert row["itl_p50_ms"] == pytest.approx(5.2, abs=2)
    assert len(row["itl_p99_ms_all"]) == len(row["prefill_tokens_per_s_all"]) == 2
    assert len(row["itl_alone_p99_ms_all"]) == 2
    assert row["launch_p50_ms"] == row["launch_p99_ms"] == 4.0
    assert row["gb_per_s"] == pytest.approx(arrivals * 48 * KV_BYTES / 1e9, rel=0.3)


def test_no_two_arrivals_are_one_prompt_and_all_share_a_beginning_that_p_has(make_session, engines):
    loader = Loader(make_session(), FEW)
    loader.prepare()
    loader.repeat(taken=True)
    loader.close()
    prompts = [prompt for _, name, prompt, _ in engines[1].asked if name.startswith("load-1")]
    assert len(set(prompts)) == len(prompts) == len(FEW.arrivals_s())
    assert len({prompt[:40] for prompt in prompts}) == FEW.prompts
    ids = {name: moment for moment, name, _, _ in engines[0].asked}
    for moment, name, _, _ in engines[1].asked:
        if name.startswith("load-1"):
            assert moment - ids[name] > 0.1  # asked for ahead


def test_what_is_not_taken_is_not_asked_for_but_computed(make_session, engines):
    loader = Loader(make_session(), FEW)
    seen = loader.repeat(taken=False)
    loader.close()
    assert engines[1].asked == []
    assert seen.gb_per_s is None
    named = [params for _, name, _, params in engines[0].asked if name]
    assert len(named) == len(FEW.arrivals_s())
    assert all(params == {} for params in named)
    assert seen.gaps


def test_the_rate_of_what_is_done_in_bursts_is_the_slope_of_their_count():
    bursts = [moment for moment in np.arange(0, 10, 0.2) for _ in range(4)]
    assert load.rate(bursts, 100) == pytest.approx(4 / 0.2 * 100, rel=0.02)
    assert load.rate([1.0, 2.0], 100) is None


def test_streams_that_end_by_themselves_are_an_error(engines):
    body = {"model": "demo", "prompt": [1], "max_tokens": 20, "stream": True}
    with Streams(engines[1].server.port, body, 1, 10.0) as streams:
        threading.Event().wait(0.5)
        with pytest.raises(StreamsError):
            streams.stop()


def test_streams_that_nobody_serves_do_not_run():
    with pytest.raises(StreamsError):
        Streams(1, {}, 1, 10.0)


def test_gaps_are_of_one_stream_and_within_the_window():
    assert gaps_ms([[0.0, 1.0, 1.5, 3.0], [1.2, 1.3]], 0.9, 2.0) == pytest.approx([500, 100])


# -- contenders -----------------------------------------------------------------------


def kv_transfer(server):
    return json.loads(server.command[server.command.index("--kv-transfer-config") + 1])


def test_p2p_nccl_finds_both_addresses_in_the_id_that_vllm_makes_of_ours(tmp_path):
    made = fleet(CONTENDERS[P2P_NCCL], small(), tmp_path)
    served = f"cmpl-{made.request_id()}-0"  # what reaches the connector, without vLLM's random end
    # The patterns are the connector's own (0.23.0).
    decode = re.search(r"___decode_addr_(.*):(\d+)", served)
    prefill = re.search(r"___prefill_addr_(.*):(\d+)___", served)
    configs = [kv_transfer(server) for server in made.servers]
    assert (prefill[1], decode[1]) == ("127.0.0.1", "127.0.0.1")
    assert (int(prefill[2]), int(decode[2])) == tuple(config["kv_port"] for config in configs)
    assert [config["kv_role"] for config in configs] == ["kv_producer", "kv_consumer"]
    assert "kv_buffer_size" in configs[1]
    assert "kv_buffer_size" not in configs[0]
    assert all(server.env["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] == "1" for server in made.servers)


def test_only_what_0_23_needs_is_given_to_other_releases(tmp_path):
    for name in ("cuda_ipc", NIXL, FLOOR):
        for server in fleet(CONTENDERS[name], small(), tmp_path).servers:
            assert set(kv_transfer(server)) == {"kv_connector", "kv_role", "kv_connector_extra_config"}


def test_pools_are_as_large_as_the_setup_says_on_both_engines(tmp_path):
    setup = setups.llama_8b(tmp_path / "model", graphs=True, one_gpu=True)
    for server, nbytes in zip(
        fleet(CONTENDERS["cuda_ipc"], setup, tmp_path).servers, setup.kv_cache_bytes, strict=True
    ):
        assert server.command[server.command.index("--kv-cache-memory-bytes") + 1] == str(nbytes)
        assert "--enforce-eager" not in server.command
        assert server.env["CUDA_VISIBLE_DEVICES"] == "0"


def test_p_keeps_the_prompts_of_a_load_and_d_does_not(tmp_path):
    for setup, tokens, prompts in ((setups.llama_8b(tmp_path, graphs=False, one_gpu=False), 16_000, 16),):
        p_tokens, d_tokens = (nbytes // setup.kv_bytes_per_token for nbytes in setup.kv_cache_bytes)
        assert d_tokens < (prompts - 1) * tokens < prompts * tokens < p_tokens


def test_floors_start_together_and_all_others_by_themselves():
    names = [FLOOR, LOWER_FLOOR, "cuda_ipc", FLOOR, "nccl"]
    grouped = [[each.name for each in batch] for batch in batches([CONTENDERS[name] for name in names])]
    assert grouped == [[FLOOR, LOWER_FLOOR], ["cuda_ipc"], [FLOOR], ["nccl"]]


# -- logs -----------------------------------------------------------------------------


def test_loads_are_read_from_the_log_and_lines_of_another_form_are_left_out(tmp_path):
    log = tmp_path / "D.log"
    log.write_text('INFO kvconnect.load {"request": "old", "bytes": 1, "phases_ms": {}}\nINFO else\n', encoding="utf-8")
    write_load(log, "cmpl-bench-1-0-aa", 5)
    write_load(log, "cmpl-bench-1-0-aa", 5, rank=1, at_ms={"launched": 7.0, "reported": 20.0})
    write_load(log, "cmpl-bench-2-0-bb", 5, at_ms={"claimed": 1.0})
    found = transfers.read(log)
    assert [each.request[-2:] for each in found] == ["aa", "aa", "bb"]
    assert transfers.of_request(found, "bench-1").at_ms["reported"] == 20.0
    assert transfers.of_request(found, "bench-9") is None
    assert transfers.launch_ms(found) == [4.0, 7.0]


# -- goals, merging, tables -----------------------------------------------------------


def row(backend, ttft, *, tokens=16_000, pool="fresh", mode="eager", vllm="0.32.0", place="two GPUs", **more):
    nothing = dict.fromkeys(("reference", "ratio", "goal", "met"))
    what = {"case": f"hand-over of {tokens} tokens", "backend": backend, "mode": mode, "place": place, "vllm": vllm}
    what |= {"pool": pool, "prompt_tokens": tokens, "bytes": tokens * 131_072, "prefill_ms": 470.0}
    return what | {"ttft_ms": ttft, "total_ms": ttft + 470.0} | nothing | more


def under_load(backend, p99, **more):
    base = row(backend, 30.0, pool="under load", mode="CUDA graphs")
    del base["total_ms"], base["prefill_ms"]
    return (
        base
        | {"case": "load of 16000 tokens", "arrivals_per_s": 62.0, "itl_p99_ms": p99, "itl_p99_ms_all": [p99]}
        | more
    )


def compared(rows, field, reference):
    return [each for each in goals.judge(rows) if each.get("compares") == field and each["reference"] == reference]


def test_a_first_token_is_held_against_the_floor_of_its_own_pool_and_mode():
    rows = [row(FLOOR, 20.0), row(FLOOR, 99.0, pool="fragmented"), row(FLOOR, 5.0, mode="CUDA graphs")]
    (found,) = compared([*rows, row("cuda_ipc", 29.9)], "ttft_ms", FLOOR)
    assert found["goal"] == pytest.approx(20.0 + 1.3 * 16_000 * 131_072 / 393e9 * 1e3 + 3.0, abs=0.001)
    assert found["met"] is True
    (late,) = compared([*rows, row("cuda_ipc", 30.1)], "ttft_ms", FLOOR)
    assert late["met"] is False


def test_the_lower_floor_is_shown_and_sets_the_goal_only_where_the_other_is_not_known():
    (found,) = compared([row(FLOOR, 20.0), row(LOWER_FLOOR, 16.0), row("cuda_ipc", 28.0)], "ttft_ms", LOWER_FLOOR)
    assert found["goal"] is None
    assert found["ratio"] == pytest.approx(16 / 28, abs=0.001)
    (alone,) = compared([row(LOWER_FLOOR, 16.0), row("cuda_ipc", 28.0)], "ttft_ms", LOWER_FLOOR)
    assert (alone["goal"], alone["met"]) == (pytest.approx(25.937, abs=0.001), False)


def test_nixl_is_compared_by_its_better_layout():
    rows = [row(NIXL, 137.0), row(f"{NIXL} BLHNC", 100.0), row("cuda_ipc", 25.0)]
    (found,) = compared(rows, "ttft_ms", f"{NIXL} BLHNC")
    assert found["ratio"] == 4.0
    assert not compared(rows, "ttft_ms", NIXL)


def test_what_stands_on_one_gpu_is_not_compared_with_what_stands_on_two():
    rows = [row(FLOOR, 20.0), row(NIXL, 60.0), row("cuda_ipc", 30.0, place="one GPU")]
    assert goals.judge(rows) == rows


def test_totals_must_be_below_those_of_both_others_at_16_000_tokens_only():
    rows = [row(P2P_NCCL, 46.0, vllm="0.23.0"), row("cuda_ipc", 29.0, vllm="0.23.0")]
    (found,) = compared(rows, "total_ms", P2P_NCCL)
    assert (found["goal"], found["met"]) == (516.0, True)
    (short,) = compared([row(P2P_NCCL, 35.0, tokens=512), row("cuda_ipc", 29.0, tokens=512)], "total_ms", P2P_NCCL)
    assert short["goal"] is None
    assert not compared([row(P2P_NCCL, 46.0, vllm="0.23.0"), row("cuda_ipc", 29.0)], "total_ms", P2P_NCCL)


def test_one_gpu_has_no_goals():
    rows = [row(FLOOR, 20.0, place="one GPU"), row(NIXL, 60.0, place="one GPU"), row("cuda_ipc", 99.0, place="one GPU")]
    assert all(each["goal"] is None for each in goals.judge(rows))


def test_decodes_and_prefills_under_load_are_held_to_5_and_3_percent():
    ours = under_load("cuda_ipc", 10.6, prefill_tokens_per_s=970.0, prefill_alone_tokens_per_s=1000.0, link_share=0.31)
    rows = [under_load(FLOOR, 14.0), under_load(LOWER_FLOOR, 10.0), ours]
    assert [each["met"] for each in compared(rows, "itl_p99_ms", LOWER_FLOOR)] == [False]
    assert [each["met"] for each in compared(rows, "itl_p99_ms", FLOOR)] == [True]
    assert [each["met"] for each in compared(rows, "prefill_tokens_per_s", "nothing taken")] == [True]
    assert [each["met"] for each in compared(rows, "link_share", None)] == [True]


def run_of(*rows, command="one", vllm="0.32.0", commit="aaa"):
    head = {"schema": 1, "command": command, "hardware": {"cores": 32}, "versions": {"vllm": vllm}, "commit": commit}
    return head | {"rows": list(rows)}


def test_a_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path):
    path = tmp_path / "out.json"
    results.save(run_of(row(FLOOR, 20.0), row("cuda_ipc", 50.0)), path, append=True)
    later = run_of(
        row("cuda_ipc", 25.0), row(P2P_NCCL, 46.0, vllm="0.23.0"), command="two", vllm="0.23.0", commit="bbb"
    )
    results.save(later, path, append=True)
    written = json.loads(path.read_text(encoding="utf-8"))
    measured = {
        (each["backend"], each["ttft_ms"], each["commit"]) for each in written["rows"] if goals.is_measured(each)
    }
    assert measured == {(FLOOR, 20.0, "aaa"), ("cuda_ipc", 25.0, "bbb"), (P2P_NCCL, 46.0, "bbb")}
    (held,) = [each for each in written["rows"] if each["goal"] is not None]
    assert held["value"] == 25.0
    assert (written["command"], written["versions"]["vllm"]) == ("one · two", "0.32.0 · 0.23.0")


def test_saving_a_run_again_changes_nothing(tmp_path):
    path = tmp_path / "out.json"
    for _ in range(2):
        results.save(run_of(row(FLOOR, 20.0), row("cuda_ipc", 25.0)), path, append=True)
        written = path.read_text(encoding="utf-8")
    assert written.count('"compares": "ttft_ms"') == 1
    assert json.loads(written)["command"] == "one"
    results.save(run_of(row(FLOOR, 1.0)), path, append=False)
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 1


PHASES = {
    "seen": 3.0,
    "claimed": 4.0,
    "planned": 4.5,
    "begun": 4.9,
    "launched": 5.0,
    "moved": 11.0,
    "confirmed": 11.0,
    "reported": 12.0,
    "answered": 29.0,
}


def test_spans_follow_each_other_and_end_with_the_answer():
    found = timeline.spans(PHASES)
    assert [span.begin_ms for span in found[1:]] == [span.end_ms for span in found[:-1]]
    assert sum(span.ms for span in found) == pytest.approx(29.0)
    assert found[6].ms == 0.0


def test_the_picture_shows_the_longest_hand_overs_of_the_newest_release():
    rows = [
        row("cuda_ipc", 1.0, phases_ms=PHASES),
        row("cuda_ipc", 1.0, phases_ms=PHASES, mode="CUDA graphs"),
        row("cuda_ipc", 1.0, phases_ms=PHASES, vllm="0.23.0"),
        row("cuda_ipc", 1.0, phases_ms=PHASES, tokens=512),
        row("cuda_ipc", 1.0, phases_ms=PHASES, place="one GPU"),
        row(NIXL, 1.0),
    ]
    assert [each["mode"] for each in timeline.choose(rows)] == ["eager", "CUDA graphs"]
    assert timeline.choose([row(NIXL, 1.0)]) == []


def test_the_picture_names_every_step_and_its_milliseconds(tmp_path):
    pytest.importorskip("matplotlib")
    timeline.draw([row("cuda_ipc", 29.0, phases_ms=PHASES)], tmp_path / "a.svg")
    timeline.draw([row("cuda_ipc", 29.0, phases_ms=PHASES)], tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "claim at P (control)" in text
    assert "6.00" in text
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")


def test_the_document_shows_what_was_measured_and_what_was_missed():
    rows = [
        row(FLOOR, 20.0),
        row(NIXL, 137.0),
        row("cuda_ipc", 35.0, phases_ms=PHASES),
        row("cuda_ipc", 25.0, tokens=512),
    ]
    rows += [under_load(LOWER_FLOOR, 10.0), under_load("cuda_ipc", 10.2, itl_p99_ms_all=[10.1, 10.3])]
    text = report.render(results.merge(None, run_of(*rows)))
    assert "| cuda_ipc (0.32.0, eager) | fresh | 25.0 | 35.0 |" in text
    assert "≤ 29.9 ms (DecodeBenchConnector: 20.0) | 35.0 ms | **missed** |" in text
    assert "10.2 (10.1 to 10.3)" in text
    assert "| claim at P (control) | 1.00 |" in text
    assert report.render(None) == "No run was recorded yet."


def test_the_recorded_results_hold_the_comparisons_that_the_goals_give():
    data = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert goals.judge(data["rows"]) == data["rows"]
