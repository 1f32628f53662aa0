"""What a producer's own traffic pays for prompts that nobody takes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvconnect.demo import model
from tests.vllm.traffic import Cost

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

ROUNDS = 15
KINDS = {
    "idle": {"kv_connector": "NoConnector", "kv_connector_module_path": "tests.vllm.traffic", "kv_role": "kv_producer"},
    "kvconnect": {
        "kv_connector": "KvConnectShm",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"group": f"traffic-{os.getpid()}"},
    },
}


class Engine:
    """A child process with an engine, see `tests.vllm.traffic`."""

    def __init__(self, kind: str, folder: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (folder / f"{kind}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm.traffic", str(model.ensure()), json.dumps(KINDS[kind])],
                cwd=root,
                env=os.environ | quiet | {"PYTHONPATH": str(root)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                bufsize=0,
            )

    def answer(self, within_s: float) -> str:
        """Return the next line meant for us; the engine writes to standard output, too."""
        out = self.process.stdout
        assert out is not None
        deadline = time.monotonic() + within_s
        line = b""
        while time.monotonic() < deadline and select.select([out], [], [], deadline - time.monotonic())[0]:
            byte = out.read(1)
            assert byte, "the engine ended, see its log"
            line += byte
            if byte == b"\n":
                if line.startswith(b"traffic: "):
                    return line.decode().removeprefix("traffic: ").strip()
                line = b""
        raise TimeoutError(f"no answer within {within_s} s")

    def batch(self) -> Cost:
        """Serve one batch and return what it cost."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return Cost(**json.loads(self.answer(60)))

    def stop(self) -> None:
        """End the engine's whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            self.process.wait(10)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    folder = tmp_path_factory.mktemp("traffic")
    running = {kind: Engine(kind, folder) for kind in KINDS}
    try:
        for engine in running.values():
            assert engine.answer(240) == "ready"
        yield running
    finally:
        for engine in running.values():
            engine.stop()


def test_a_producer_loses_no_throughput_to_prompts_that_nobody_takes(
    engines: dict[str, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in engines.values():
        engine.batch()
    orders = itertools.cycle([list(engines.items()), list(engines.items())[::-1]])
    rounds = [{kind: engine.batch() for kind, engine in next(orders)} for _ in range(ROUNDS)]
    ours = [costs["kvconnect"] for costs in rounds]
    calls = statistics.median(cost.calls / cost.batch for cost in ours)
    threads = statistics.median(cost.threads / cost.batch for cost in ours)
    # Two engines differ by up to a tenth for as long as they live, by where their memory and threads came to lie,
    # so that this is shown and not judged.
    ratio = statistics.median(costs["idle"].batch / costs["kvconnect"].batch for costs in rounds)
    with capsys.disabled():
        sys.stdout.write(
            f"\nof a producer's time, median of {ROUNDS} batches: {calls:.4f} in calls to the connector, {threads:.4f} "
            f"in its threads; throughput {ratio:.3f} of that with a connector that does nothing\n"
        )
    # What calls and threads cannot show: batches made smaller, or blocks taken from the prompts that follow.
    assert [cost.steps for cost in ours] == [costs["idle"].steps for costs in rounds]
    # Both together are the most that throughput can lose, if the threads never found a free core. The goal, for models
    # that take longer than this one, is 0.02.
    assert calls + threads < 0.03
