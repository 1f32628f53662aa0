"""One engine that serves a batch of ordinary prompts whenever it is told to; see `test_ordinary_traffic`.

``python -m tests.vllm.traffic <model> <kv_transfer_config as JSON>``. Each line on standard
input is answered by a line with a `Cost` as JSON. The engine runs in this process, scheduler and
worker in one thread, so that all that the connector does can be told from what vLLM does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

REQUESTS, TOKENS = 48, 12


@dataclasses.dataclass(slots=True)
class Cost:
    """What one batch took, in seconds of time (`batch`, `calls`) and of a processor (`threads`)."""

    batch: float
    """From the first prompt to the last answer."""
    calls: float
    """In vLLM's calls to the connector, in which the engine does nothing else."""
    threads: float
    """Of the connector's own threads, which contend with the engine for cores and the interpreter's lock."""
    steps: int
    """Of the scheduler."""


class NoConnector(KVConnectorBase_V1, SupportsHMA):
    """A connector that does nothing: what vLLM's own calls to any connector cost."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None


class Stopwatch:
    """What a connector's methods took since the engine started; vLLM calls them from one thread."""

    def __init__(self, connector: type[KVConnectorBase_V1]) -> None:
        self.calls = 0.0
        self.steps = 0
        self._deep = 0
        # Only what the connector defines itself: the base class's own methods are vLLM's cost.
        for cls in connector.__mro__[: connector.__mro__.index(KVConnectorBase_V1)]:
            for name, method in list(vars(cls).items()):
                if callable(method) and not name.startswith("_") and not isinstance(method, type):
                    setattr(cls, name, self._timed(name, method))

    def _timed(self, name: str, method: Any) -> Any:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._deep:
                return method(*args, **kwargs)
            self.steps += name == "build_connector_meta"
            self._deep = 1
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.calls += time.perf_counter() - began
                self._deep = 0

        return timed


def threads_cpu_s() -> float:
    """Return the processor seconds that this connector's threads, and ZeroMQ's for them, have used."""
    ours = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("kvconnect")}
    total = 0
    for task in Path("/proc/self/task").iterdir():
        # vLLM itself uses no ZeroMQ when the engine is in this process.
        if int(task.name) in ours or (task / "comm").read_text().startswith("ZMQ"):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def main() -> None:
    """Serve until standard input ends."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    transfer = KVTransferConfig(**json.loads(sys.argv[2]))
    load_general_plugins()
    watch = Stopwatch(KVConnectorFactory.get_connector_class(transfer))
    llm = LLM(
        model=sys.argv[1], enforce_eager=True, dtype="float32", block_size=32, max_model_len=2048,
        max_num_batched_tokens=512, max_num_seqs=64, kv_cache_memory_bytes=256 << 20,
        kv_transfer_config=transfer,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    # The same prompts in every engine, none of them twice.
    names = random.Random(0)  # noqa: S311
    say("ready")
    for _ in sys.stdin:
        prompts = [f"{names.getrandbits(128):032x} {'word ' * (5 + i * 5 % 90)}" for i in range(REQUESTS)]
        calls, threads, steps = watch.calls, threads_cpu_s(), watch.steps
        began = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        batch = time.perf_counter() - began
        cost = Cost(batch, watch.calls - calls, threads_cpu_s() - threads, watch.steps - steps)
        say(json.dumps(dataclasses.asdict(cost)))


def say(text: str) -> None:
    """Write one line to whoever started this program."""
    sys.stdout.write(f"traffic: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
