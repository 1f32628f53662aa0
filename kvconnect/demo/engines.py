"""Servers as child processes: vLLM engines and the proxy, started, awaited and stopped.

Every wait is bounded, a server that fails is shown by the end of its log, and
what is stopped is the whole process group of one child, never anything by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

Say = Callable[[str], None]

#: Seconds an engine gets after SIGTERM before SIGKILL.
GRACE_S = 15.0
_TAIL_LINES = 40
_ERROR = re.compile(r"^(?:\(.*?\) )?((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception): .+)", re.MULTILINE)


class ServerError(Exception):
    """A server did not start, or ended; the text carries the end of its log."""


#: Servers listen below the ports that the kernel itself gives to connections and to "any port".
_LOWEST_PORT = 15_000
_handed_out: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port for a server that starts later; none twice.

    Asking the kernel for any free port is not enough: it may name the same one again
    before the server has bound it, or give it away while the server starts. vLLM
    binds with SO_REUSEPORT, so two engines on one port would share its requests
    without a word.

    Raises:
        ServerError: no port is free.

    """
    ports = list(range(_LOWEST_PORT, _first_ephemeral_port()))
    random.SystemRandom().shuffle(ports)  # other runs on this host draw from the same range
    for port in ports:
        if port not in _handed_out and _is_free(host, port):
            _handed_out.add(port)
            return port
    raise ServerError(f"no TCP port from {_LOWEST_PORT} up to the kernel's own is free on {host}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # As servers do, so that a connection of an earlier one in TIME_WAIT does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _first_ephemeral_port() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    except OSError:
        return 32_768
    return max(int(text.split()[0]), _LOWEST_PORT + 1_000)


def cuda_devices() -> int:
    """Count usable CUDA devices without creating a context on any."""
    import torch

    return torch.cuda.device_count()


@dataclass
class Server:
    """One child process that answers HTTP at ``url``; ``health`` answers 200 once it is ready."""

    name: str
    command: Sequence[str]
    port: int
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    health: str = "/health"
    process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    started_s: float = field(default=0.0, init=False)
    #: Seconds from start to the first healthy answer; 0 until then.
    ready_after_s: float = field(default=0.0, init=False)

    @property
    def url(self) -> str:
        """The server's base address."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Start the process in a session of its own; returns at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvconnect.demo.child", str(os.getpid()), *self.command],
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started_s = time.monotonic()

    def is_healthy(self, timeout_s: float = 2.0) -> bool:
        """Ask the health address once."""
        try:
            answer = httpx.get(self.url + self.health, timeout=timeout_s, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of the log."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(text.splitlines()[-lines:])

    def failure(self, what: str) -> ServerError:
        """Build the error that says ``what`` happened, names the log's first errors, and shows its end.

        A failed engine is reported by each of its processes in turn: the root cause comes first.
        """
        text = f"{self.name} {what}; the end of {self.log}:\n{self.tail()}"
        causes = dict.fromkeys(_ERROR.findall(self.tail(10_000)))
        if causes:
            text += "\nfirst errors:\n" + "\n".join(f"  {cause}" for cause in list(causes)[:3])
        return ServerError(text)

    def terminate(self) -> None:
        """Ask the process to end; it ends its own workers."""
        if self.process is not None:
            self.process.terminate()

    def finish(self, timeout_s: float) -> None:
        """Wait for the end, and end at once whatever of the process group is left by then."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        # The group outlives its leader when a worker hangs, so an ended leader is no proof.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(5.0)
        self.process = None


def start(servers: Iterable[Server], say: Say) -> None:
    """Start all, without waiting for any."""
    for server in servers:
        server.start()
        say(f"started {server.name} on port {server.port}, log {server.log}")


def wait_ready(servers: Sequence[Server], timeout_s: float, say: Say) -> None:
    """Wait until every server is healthy, with a progress line every ten seconds.

    Raises:
        ServerError: one ended or was not healthy in time.

    """
    began = time.monotonic()
    waiting, said_s = list(servers), 0.0
    with _Deaths(waiting) as deaths:
        while waiting:
            for server in [s for s in waiting if s.is_healthy()]:
                server.ready_after_s = time.monotonic() - server.started_s
                say(f"{server.name} is ready after {server.ready_after_s:.0f} s")
                waiting.remove(server)
            if not waiting:
                return
            dead = deaths.within(1.0)
            if dead is not None:
                raise dead.failure("ended while starting")
            passed = time.monotonic() - began
            if passed > timeout_s:
                raise waiting[0].failure(f"was not ready after {passed:.0f} s")
            if passed - said_s >= 10:
                said_s = passed
                say(f"{passed:4.0f} s: waiting for {', '.join(f'{s.name} ({_stage(s)})' for s in waiting)}")


def stop(servers: Sequence[Server], grace_s: float = GRACE_S) -> None:
    """End the servers, all at once: SIGTERM, then SIGKILL to what is left after ``grace_s``."""
    for server in servers:
        server.terminate()
    deadline = time.monotonic() + grace_s
    for server in servers:
        server.finish(max(0.0, deadline - time.monotonic()))


class _Deaths:
    """Tells, without polling, when one of the servers' processes ends."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self._selector = selectors.DefaultSelector()
        for server in servers:
            if server.process is not None:
                self._selector.register(os.pidfd_open(server.process.pid), selectors.EVENT_READ, server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()

    def within(self, timeout_s: float) -> Server | None:
        """Return a server that has ended, waiting at most ``timeout_s`` for one."""
        for key, _ in self._selector.select(timeout_s):
            server: Server = key.data
            return server
        return None


#: What a line of vLLM's log says about how far the start is; the last match counts.
_STAGES = (
    ("Initializing a V1 LLM engine", "starting the worker"),
    ("Starting to load model", "loading the model"),
    ("GPU KV cache size", "allocating the KV cache"),
    ("Starting vLLM server", "opening the server"),
)


def _stage(server: Server) -> str:
    text = server.tail(400)
    return next((stage for mark, stage in reversed(_STAGES) if mark in text), "importing vLLM")


@dataclass(frozen=True)
class EngineOptions:
    """What the engines of one run have in common.

    ``threads`` are OpenMP threads of one engine on the CPU; 0 shares the machine's
    cores among ``engines``. ``block_size`` applies on the CPU, where vLLM's own
    default of 128 tokens would make every short prompt a single partial block.
    """

    model: str
    engines: int = 2
    threads: int = 0
    block_size: int = 32
    max_model_len: int = 2048
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    kv_cache_bytes: int = 256 << 20
    gpu_memory_utilization: float = 0.5
    eager: bool = True
    extra: tuple[str, ...] = ()


def engine(  # noqa: PLR0913 - each is a line of the command
    name: str,
    options: EngineOptions,
    log_folder: Path,
    *,
    kv_transfer: Mapping[str, Any] | None = None,
    device: int | None = None,
    env: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    port: int | None = None,
) -> Server:
    """Describe one vLLM server; ``device`` is a CUDA device, None the CPU."""
    port = port or free_port()
    arguments = [
        *("--model", options.model, "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)),
        *("--max-num-batched-tokens", str(options.max_num_batched_tokens)),
        *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
    ]
    if options.eager:
        arguments.append("--enforce-eager")
    if kv_transfer is not None:
        arguments += ["--kv-transfer-config", json.dumps(dict(kv_transfer))]
    place = _cpu(options) if device is None else _cuda(options, device)
    return Server(
        name=name,
        command=("vllm.entrypoints.openai.api_server", *arguments, *place[0], *options.extra, *extra),
        port=port,
        log=log_folder / f"{name}.log",
        env=_COMMON_ENV | _sockets(log_folder) | place[1] | dict(env or {}),
    )


_COMMON_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def _sockets(folder: Path) -> dict[str, str]:
    """Keep vLLM's socket files, which it never removes, in the run's folder, if a socket's path may be that long."""
    return {"VLLM_RPC_BASE_PATH": str(folder.absolute())} if len(str(folder.absolute())) < _SOCKET_PATH else {}


#: 107 characters are what Linux allows; vLLM adds a UUID.
_SOCKET_PATH = 107 - 1 - 36


def _cpu(options: EngineOptions) -> tuple[list[str], dict[str, str]]:
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.engines)
    arguments = ["--dtype", "float32", "--block-size", str(options.block_size)]
    # With eager execution and a KV cache of a given size vLLM has nothing to warm up.
    arguments += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    # vLLM would bind the threads of every engine to the same cores.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return arguments, env


def _cuda(options: EngineOptions, device: int) -> tuple[list[str], dict[str, str]]:
    arguments = ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    return arguments, {"CUDA_VISIBLE_DEVICES": _visible(device)}


def _visible(device: int) -> str:
    """Translate an index into this process's devices to what ``CUDA_VISIBLE_DEVICES`` of a child must say."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[device].strip() if given else str(device)
