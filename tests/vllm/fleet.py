"""Real vLLM engines for the tests: two producers and two consumers over one pipe, started once.

Every engine is a real server in its own processes. Requests are greedy; the
*reference* for a prompt is the first consumer asked directly under a cache salt
of its own, which makes it compute everything itself (its metric is checked).
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kvconnect.demo import client as api
from kvconnect.demo import engines, model, report
from kvconnect.demo.client import Answer, Prompt
from kvconnect.demo.deployment import write_logging_config
from kvconnect.demo.engines import EngineOptions, Server
from tests.vllm.collector import Collector

T = TypeVar("T")

#: Tokens of a block on the CPU, and of one chunk of chunked prefill.
BLOCK, CHUNK = 32, 512
#: Blocks of the small engine: one sequence of the greatest length fits, two do not.
TINY_BLOCKS = 72


@dataclass(frozen=True)
class Plan:
    """Which engines a fleet has.

    ``plain`` ones have no connector; ``strangers`` have ``stranger_arguments`` beside everybody's,
    such that they fit nobody, and ``stranger_role``.
    With ``multi`` the connector is the only child of a MultiConnector.
    ``extra_config`` goes under ``kv_connector_extra_config`` of each, ``extra_of`` under that of one,
    by its name. With ``tiny`` the last consumer's KV cache has `TINY_BLOCKS` blocks, so that it
    preempts. ``failure_policy`` is vLLM's ``kv_load_failure_policy``. Engines of several workers
    are to be ``patient`` where cores are few, see `tests/vllm/patient`. Producers have the first of
    ``roles`` and run on the first of ``devices``, all others on the second: CUDA devices, one for each
    worker, or none for the CPU. ``model`` is a folder, if it is not the demo's ``variant``. All register at
    ``router``, an address ``"host:port"``, if there is one.
    """

    connector: str
    producers: int = 2
    consumers: int = 2
    plain: int = 0
    strangers: int = 0
    stranger_arguments: tuple[str, ...] = ("--block-size", str(2 * BLOCK))
    stranger_role: str = "kv_consumer"
    multi: bool = False
    variant: model.Variant = "llama"
    tiny: bool = True
    patient: bool = False
    devices: tuple[Sequence[int], Sequence[int]] = ((), ())
    roles: tuple[str, str] = ("kv_producer", "kv_consumer")
    model: str = ""
    router: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    lease_s: float = 8.0
    failure_policy: str = "recompute"
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    extra_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


class Fleet:
    """Running engines and what tests do with them. Thread-safe."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.model = plan.model or str(model.ensure(plan.variant))
        self._folder = folder
        #: Where the engines send their spans, if the plan says so.
        self.collector: Collector | None = None
        self.http = api.open_client(120.0)
        options = EngineOptions(
            self.model,
            engines=plan.producers + plan.consumers + plan.plain + plan.strangers,
            block_size=BLOCK,
            max_num_batched_tokens=CHUNK,
            extra=("--enable-prompt-tokens-details", "--shutdown-timeout", "0", *plan.arguments),
        )
        self.producers = [self._engine(f"P{i}", options, plan.roles[0]) for i in range(plan.producers)]
        small = ("--num-gpu-blocks-override", str(TINY_BLOCKS)) if plan.tiny else ()
        last = plan.consumers - 1
        self.consumers = [
            self._engine(f"D{i}", options, plan.roles[1], small if i == last else ()) for i in range(plan.consumers)
        ]

        self.plain = [self._engine(f"N{i}", options, None) for i in range(plan.plain)]
        self.strangers = [
            self._engine(f"S{i}", options, plan.stranger_role, plan.stranger_arguments) for i in range(plan.strangers)
        ]

    @property
    def engines(self) -> list[Server]:
        """All engines."""
        return [*self.producers, *self.consumers, *self.plain, *self.strangers]

    # -- life ------------------------------------------------------------------

    def start(self, timeout_s: float, say: Callable[[str], None] = lambda _: None) -> None:
        """Start all engines at once and wait; raises `engines.ServerError`."""
        engines.start(self.engines, say)
        engines.wait_ready(self.engines, timeout_s, say)

    def stop(self) -> None:
        """Stop all engines."""
        self.http.close()
        engines.stop(self.engines)

    # -- requests ------------------------------------------------------------------

    def ask(self, engine: Server, prompt: Prompt, *, rank: int | None = None, **how: Any) -> Answer:
        """Send a request to one engine; ``how`` as `client.send` has it.

        ``rank`` names the engine among data-parallel ones; vLLM chooses otherwise.
        """
        if rank is None:
            return api.send(self.http, engine.url, prompt, **how)
        with api.open_client(120.0) as http:
            http.headers["X-data-parallel-rank"] = str(rank)
            return api.send(http, engine.url, prompt, **how)

    def ticket(self, producer: Server, prompt: Prompt, **how: Any) -> Mapping[str, Any]:
        """Prefill on a producer, asked for a hand-over, and return its ``kv_transfer_params``."""
        params = self.ask(producer, prompt, kv_transfer_params=api.ASK, max_tokens=1, **how).kv_transfer_params
        assert params is not None, f"{producer.name} returned no ticket"
        return params

    def by_ticket(self, prompt: Prompt, p: int = 0, d: int = 0) -> Answer:
        """Hand over from producer ``p`` to consumer ``d`` by a ticket; the legs share no X-Request-Id."""
        return self.ask(self.consumers[d], prompt, kv_transfer_params=self.ticket(self.producers[p], prompt))

    def by_label(self, prompt: Prompt, p: int = 0, d: int = 0, request_id: str | None = None) -> Answer:
        """Hand over by a shared X-Request-Id and no ticket."""
        request_id = request_id or unique("shared")
        self.ask(self.producers[p], prompt, request_id=request_id, max_tokens=1)
        return self.ask(self.consumers[d], prompt, request_id=request_id)

    def by_content(self, prompt: Prompt, p: int = 0, d: int = 0) -> Answer:
        """Prefill at a producer and ask a consumer the same, with nothing that ties the two together."""
        self.ask(self.producers[p], prompt, max_tokens=1)
        return self.ask(self.consumers[d], prompt)

    def reference(self, prompt: Prompt) -> Answer:
        """Return what one engine alone answers."""
        return self.ask(self.consumers[0], replace(prompt, salt=unique("reference")))

    def together(self, calls: Iterable[Callable[[], T]], at_once: int = 64, limit_s: float = 300.0) -> list[T]:
        """Run calls in threads, ``at_once`` at a time; raises the first error."""
        with concurrent.futures.ThreadPoolExecutor(at_once, thread_name_prefix="fleet") as pool:
            return [future.result(limit_s) for future in [pool.submit(call) for call in calls]]

    # -- what happened ---------------------------------------------------------------

    def metric(self, engine: Server, name: str, default: float = 0.0) -> float:
        """Return one of an engine's metrics by name and labels (see `client.metrics`)."""
        return api.metrics(self.http, engine.url).get(name, default)

    def fetched(self, engine: Server, call: Callable[[], T]) -> tuple[T, int]:
        """Run ``call``; return its result and by how much the engine's own count of tokens from elsewhere grew."""
        before = self.metric(engine, api.EXTERNAL_TOKENS)
        result = call()
        return result, int(self.metric(engine, api.EXTERNAL_TOKENS) - before)

    def load(self, engine: Server, request_id: str) -> report.Load | None:
        """Return what the engine's log records of the request's load."""
        return report.find_load(engine.log, request_id)

    def forget(self, engine: Server) -> bool:
        """Empty the engine's own prefix cache; False while any of its blocks is in use or lent.

        Releases before 0.29 do not say; there it is always True.
        """
        response = self.http.post(engine.url + "/reset_prefix_cache")
        response.raise_for_status()
        return not response.content or bool(response.json()["success"])

    def zero_block(self, engine: Server, block: int) -> None:
        """Zero one KV block in every layer of an engine's memory."""
        rpc = {"method": "zero_kv_block", "args": [str(block)], "timeout": 30}
        self.http.post(engine.url + "/collective_rpc", json=rpc).raise_for_status()

    def digests(self, engine: Server) -> dict[int, str]:
        """Return a digest of each block's bytes in all layers of an engine's memory."""
        rpc = {"method": "digest_kv_blocks", "timeout": 60}
        response = self.http.post(engine.url + "/collective_rpc", json=rpc)
        response.raise_for_status()
        return {int(block): digest for block, digest in response.json()["results"][0].items()}

    def busy(self, engine: Server) -> str:
        """Return what keeps an engine from being idle with every block free; empty if nothing does.

        vLLM refuses to reset its prefix cache while a single block is referenced,
        which is a sharper test than its usage gauge.
        """
        found = api.metrics(self.http, engine.url)
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            if found.get(name):
                return f"{engine.name}: {name} is {found[name]:.0f}"
        return "" if self.forget(engine) else f"{engine.name}: some KV blocks are not free"

    def settle(self, within_s: float | None = None) -> list[str]:
        """Wait until every engine is idle with all blocks free; return what still is not in time.

        Ended leases are noticed in an engine's next step, so each producer is poked:
        by a hand-over, since an ordinary prompt would be lent out again for a lease.
        """
        deadline = time.monotonic() + (within_s or self.plan.lease_s + 10)
        left = [engine.name for engine in self.engines]
        while left and time.monotonic() < deadline:
            for p in range(len(self.producers)):
                self.by_ticket(Prompt(unique("poke"), max_tokens=1), p=p)
            left = [reason for engine in self.engines if (reason := self.busy(engine))]
        return left

    # -- text ------------------------------------------------------------------------

    def prompt(self, tokens: int, seed: int = 0, **options: Any) -> Prompt:
        """Return a prompt of exactly ``tokens`` token ids; another one for each ``seed``."""
        return Prompt(token_ids(self.model, tokens, seed), **options)

    def _env(self, devices: Sequence[int]) -> dict[str, str]:
        env = {"VLLM_LOGGING_CONFIG_PATH": str(write_logging_config(self._folder)), "VLLM_SERVER_DEV_MODE": "1"}
        if self.plan.patient:
            paths = [str(Path(__file__).parent / "patient"), os.environ.get("PYTHONPATH", "")]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if devices:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = seen.split(",") if seen else list(map(str, range(max(devices) + 1)))
            env["CUDA_VISIBLE_DEVICES"] = ",".join(names[device] for device in devices)
        return env | dict(self.plan.env)

    def _engine(self, name: str, options: EngineOptions, role: str | None, more: Sequence[str] = ()) -> Server:
        port = engines.free_port()
        extra = {"group": self._folder.name, "lease_s": self.plan.lease_s, "log_transfers": True}
        if self.plan.router:
            extra |= {"router_discovery": self.plan.router, "http_address": f"127.0.0.1:{port}"}
        transfer = {
            "kv_connector": self.plan.connector,
            "kv_role": role,
            "kv_connector_extra_config": extra | dict(self.plan.extra_config) | dict(self.plan.extra_of.get(name, {})),
            "kv_load_failure_policy": self.plan.failure_policy,
        }
        if self.plan.multi:
            children = {"kv_connector_extra_config": {"connectors": [transfer]}}
            transfer = {**transfer, "kv_connector": "MultiConnector", **children}
        devices = self.plan.devices[0 if name.startswith("P") else 1]
        return engines.engine(
            name,
            options,
            self._folder,
            kv_transfer=transfer if role else None,
            device=devices[0] if devices else None,
            env=self._env(devices),
            extra=("--worker-extension-cls", "kvconnect.demo.probe.KVProbe", *more),
            port=port,
        )


def unique(name: str) -> str:
    """Return a name that was never used before."""
    return f"{name}-{uuid.uuid4().hex}"


def token_ids(model_folder: str, tokens: int, seed: int) -> list[int]:
    """Return ``tokens`` ids of real text, starting elsewhere for each ``seed``."""
    text = _all_ids(model_folder)
    start = (seed * 7919) % (len(text) - tokens)
    return list(text[start : start + tokens])


@functools.cache
def _all_ids(model_folder: str) -> tuple[int, ...]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model_folder) / "tokenizer.json"))
    return tuple(tokenizer.encode("\n".join(model.training_text()), add_special_tokens=False).ids)
