"""What the demo runs: a prefilling engine P, a decoding engine D, and the proxy before them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from kvconnect.demo import engines
from kvconnect.demo.engines import EngineOptions, Say, Server


@dataclass(frozen=True)
class Deployment:
    """The three servers."""

    prefill: Server
    decode: Server
    proxy: Server

    def start(self, timeout_s: float, say: Say) -> None:
        """Start all three and wait until they are ready; raises `engines.ServerError`."""
        pair = (self.prefill, self.decode)
        engines.start(pair, say)
        engines.wait_ready(pair, timeout_s, say)
        engines.start([self.proxy], say)
        engines.wait_ready([self.proxy], 60, say)

    def stop(self) -> None:
        """End all three."""
        engines.stop([self.proxy, self.decode, self.prefill])


def deploy(model: str, connector: str, folder: Path, pipe: str | None = None) -> Deployment:
    """Describe the servers; logs go to ``folder``. CUDA devices are used when there are any."""
    devices = engines.cuda_devices()
    places: list[int | None] = [0, min(1, devices - 1)] if devices else [None, None]
    # Two engines on one device share its memory.
    options = EngineOptions(model, gpu_memory_utilization=0.5 if devices > 1 else 0.3)
    # A group of its own, so that no other engine of this machine is asked for KV.
    extra = {"group": f"demo-{os.getpid()}", "log_transfers": True} | ({"pipe": pipe} if pipe else {})
    env = {
        "VLLM_LOGGING_CONFIG_PATH": str(write_logging_config(folder)),
        # The negative control needs a hand inside P: see `kvconnect.demo.probe`.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    common = {"kv_connector": connector, "kv_connector_extra_config": extra}
    prefill = engines.engine(
        "P",
        options,
        folder,
        kv_transfer=common | {"kv_role": "kv_producer"},
        device=places[0],
        env=env,
        extra=("--worker-extension-cls", "kvconnect.demo.probe.KVProbe"),
    )
    decode = engines.engine(
        "D",
        options,
        folder,
        kv_transfer=common | {"kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"},
        device=places[1],
        env=env,
    )
    port = engines.free_port()
    arguments = ("--prefill", prefill.url, "--decode", decode.url, "--host", "127.0.0.1", "--port", str(port))
    proxy = Server("proxy", ("kvconnect", "proxy", *arguments), port, folder / "proxy.log")
    return Deployment(prefill, decode, proxy)


def write_logging_config(folder: Path) -> Path:
    """Write a logging configuration for vLLM that lets kvconnect's own lines through, and return its path.

    vLLM configures its own logger only, and a library configures none.
    """
    handler = {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}
    logger = {"handlers": ["out"], "level": "INFO", "propagate": False}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s [%(name)s] %(message)s"}},
        "handlers": {"out": handler},
        "loggers": {"vllm": logger, "kvconnect": logger},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "logging.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def say(text: str) -> None:
    """Show progress; the only place of the demo that writes while it runs."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
