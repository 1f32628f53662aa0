"""The other end: who answers at an address, and what of it does not match this end. It is not disturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvconnect.buffers import fields, layouts
from kvconnect.buffers.access import Access
from kvconnect.buffers.address import is_loopback
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.peers import worker_of
from kvconnect.control import wait_for
from kvconnect.doctor.counterpart import MARK, Case, settings
from kvconnect.doctor.findings import Finding
from kvconnect.doctor.intent import Intent
from kvconnect.errors import ConfigError, HandshakeError, KVConnectError
from kvconnect.paging import PagedLayout
from kvconnect.pipes.peer_memory import PeerMemory

_VERSIONS = ("kvconnect", "vllm", "torch")
#: Of what a peer has; an engine's fingerprint has fewer fields.
_MOST_NAMED = 32
#: Namespaces of processes of one host, which pipe needs them to be shared, what for, and how they are.
_NAMESPACES = {
    "netns": (
        "shm",
        "meets over the network namespace's sockets",
        "give the containers one network (one pod, hostNetwork, --network=host)",
    ),
    "ipcns": ("cuda_ipc", "opens its peer's handles within one", "share the host's (hostIPC, --ipc=host)"),
    "pidns": ("shm", "reads its peer's memory within one", "share one (hostPID, --pid=host, shareProcessNamespace)"),
}


@dataclass(frozen=True)
class Met:
    """A peer that has answered.

    Args:
        hello: its engine's.
        worker: its first worker's description.
        facts: `kvconnect.doctor.host.facts` of it, if it is a doctor; empty if it is an engine.
        identity: its process's `kvconnect.pipes.host.identity`, as far as its pipes tell.
        layout: of its paged memory.

    """

    hello: Hello
    worker: Mapping[str, Any]
    facts: Mapping[str, Any]
    identity: Mapping[str, Any]
    layout: PagedLayout


def allowing(intent: Intent, address: str) -> Intent:
    """Return ``intent`` with ``address`` among those that may be contacted, since the user has named it."""
    peers = (*intent.config.peers, address)
    return dataclasses.replace(intent, config=dataclasses.replace(intent.config, peers=peers))


def meet(intent: Intent, address: str) -> Met:
    """Ask for the hello of whoever answers at ``address``, as a worker does: nothing is held against it.

    Raises:
        KVConnectError: nobody answers, or not in these words; the text says why.

    """
    me = Hello.of(settings(intent.config, intent.pipe, {}, produces=False), secrets.token_hex(8), rank=0)
    timeout_s = intent.config.connect_timeout_s
    client = Access(intent.config).client("kvconnect-doctor-client")
    try:
        return read(wait_for(client.call(address, "hello", me.to_wire(), timeout_s), timeout_s + 1))
    finally:
        client.close()


def read(answer: Mapping[str, Any]) -> Met:
    """Read the hello that a peer has answered with; raise `HandshakeError` naming the malformed field."""
    hello = Hello.from_wire(answer)
    worker = worker_of(hello, 0)
    pipes = fields.mapping(worker, "pipes")
    identity = next((fields.mapping(pipes, name) for name in sorted(pipes)), {})
    facts = fields.mapping(worker, MARK) if MARK in worker else {}
    return Met(hello, worker, facts, facts or identity, layouts.read(worker))


def unmet(error: KVConnectError) -> Finding:
    """Say why a peer could not be met, and the likely cure."""
    text = str(error)
    if isinstance(error, HandshakeError) and "protocol" in text:
        cure = "install the same kvconnect at both ends"
    elif "key" in text:
        cure = "give both ends the same key_file, or each other's peer_keys"
    else:
        cure = (
            "start `python -m kvconnect doctor --serve` there, or name a producer (a consumer does not listen); "
            "check host, port, firewall (a NetworkPolicy) and keys"
        )
    return Finding("peer", "bad", text, cure)


def compare(intent: Intent, met: Met, ours: Mapping[str, Any], marks: Mapping[str, str | int]) -> list[Finding]:
    """Compare field by field.

    Args:
        intent: what is to be started here.
        met: the peer.
        ours: this process's `kvconnect.doctor.host.facts`.
        marks: fields of this end's fingerprint, as far as they are known.

    """
    return [
        *_versions(met, ours),
        *_fields(met, marks),
        *_pipe(intent, met),
        *_place(intent, met, ours),
    ]


def _versions(met: Met, ours: Mapping[str, Any]) -> Iterator[Finding]:
    for name in _VERSIONS:
        theirs = met.facts.get(name)
        if theirs is None:
            continue
        if theirs == ours[name]:
            yield Finding(f"peer.version.{name}", "ok", f"{theirs or 'not installed'} at both ends")
        else:
            what = f"{name}: ours {ours[name] or 'none'}, theirs {fields.shown(theirs) or 'none'}"
            yield Finding(
                f"peer.version.{name}", "note", f"{what}; fields decide whether they fit", "install one version"
            )


def _fields(met: Met, marks: Mapping[str, str | int]) -> Iterator[Finding]:
    theirs = met.hello.fingerprint
    for name, value in marks.items():
        if name not in theirs:
            yield Finding(f"peer.field.{name}", "note", f"ours {value!r}, the peer does not say")
        elif theirs[name] == value:
            yield Finding(f"peer.field.{name}", "ok", f"{value!r} at both ends")
        else:
            what = f"{name} differs: ours {value!r}, theirs {theirs[name]!r:.200}: every hand-over will be recomputed"
            yield Finding(f"peer.field.{name}", "bad", what, "start both engines alike")
    unknown = [f"{fields.shown(name)} {theirs[name]!r:.80}" for name in theirs if name not in marks]
    if unknown:
        what = f"the peer's {_some(unknown)}; {met.hello.num_parts} workers: not compared"
        yield Finding("peer.fields", "note", what, "say what this end will have: --field NAME=VALUE")


def _pipe(intent: Intent, met: Met) -> Iterator[Finding]:
    ours, theirs = intent.pipe.name, fields.shown(met.facts.get("pipe", "auto"))
    if "auto" not in (ours, theirs) and ours != theirs:
        what = f"pipe differs: ours {ours!r}, theirs {theirs!r}"
        yield Finding("peer.pipe", "bad", what, "configure the same pipe, or 'auto', at both ends")


def _place(intent: Intent, met: Met, ours: Mapping[str, Any]) -> Iterator[Finding]:
    if is_here(met, ours):
        yield Finding("peer.host", "ok", "on this host")
        yield from _same_host(intent, met, ours)
        return
    yield Finding("peer.host", "ok", f"on another host, {fields.shown(met.facts.get('name', met.hello.engine))}")
    if is_loopback(intent.config.bind_host) and intent.config.advertise_host is None:
        what = f"this end listens on {intent.config.bind_host}, which the peer's host cannot reach"
        yield Finding(
            "peer.address", "bad", what, "set bind_host to an address of this host, and key_file at both ends"
        )


def is_here(met: Met, ours: Mapping[str, Any]) -> bool:
    """Whether the peer runs on this host."""
    return bool(met.identity.get("host") == ours["host"])


def _same_host(intent: Intent, met: Met, ours: Mapping[str, Any]) -> Iterator[Finding]:
    wanted = {name for name in met.worker["pipes"] if intent.pipe.name in ("auto", name)}
    for name, (pipe, need, cure) in _NAMESPACES.items():
        theirs = met.identity.get(name)
        if theirs is not None and theirs != ours[name] and pipe in wanted:
            yield Finding(f"peer.{name}", "slow", f"another {name.removesuffix('ns')} namespace: {pipe} {need}", cure)
    if "cuda_ipc" in wanted:
        yield from _hidden_gpus(met, ours)
    if met.facts and met.facts.get("clock") != ours["clock"]:
        what = "another time namespace: each load waits for a question more, since promises cannot be timed"
        yield Finding("peer.clock", "slow", what, "do not give the containers time namespaces of their own")
    if "shm" not in wanted:
        return
    if (reason := _unreadable(met)) is not None:
        cure = "run both as one user with CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope=0"
        what = f"shm cannot copy straight from the peer's memory and goes through a ring: {reason}"
        yield Finding("peer.process_vm", "slow", what, cure)
    elif met.facts:
        yield Finding("peer.process_vm", "ok", "its memory can be read in one copy (process_vm_readv)")


def _hidden_gpus(met: Met, ours: Mapping[str, Any]) -> Iterator[Finding]:
    theirs = met.facts.get("gpus", [])
    hidden = [name for name in theirs if name not in ours["gpus"]] if isinstance(theirs, list) else []
    if hidden:
        what = (
            f"the peer can use {_some(map(fields.shown, hidden))}, which this container cannot open: cuda_ipc may fail"
        )
        cure = (
            "give both containers the GPUs of both (one container, a shared claim), and choose by CUDA_VISIBLE_DEVICES"
        )
        yield Finding("peer.gpus", "slow", what, cure)


def _unreadable(met: Met) -> str | None:
    """Return why this process may not read the memory of a doctor on this host; ``None`` if it may, or is none."""
    if "beacon" not in met.facts:
        return None
    try:
        PeerMemory(fields.mapping(met.facts, "beacon")).close()
    except KVConnectError as error:
        return str(error)
    return None


def case_of(met: Met, wanted: Case | None) -> tuple[Case | None, list[Finding]]:
    """Return what can be measured with the peer's layout, and how it differs from the one that is ``wanted``.

    Raises:
        KVConnectError: the peer's doctor has a layout that no doctor has.

    """
    layers = met.layout.layers
    sizes = sorted({layer.block_bytes for layer in layers})
    findings = []
    if wanted is not None:
        for name, ours, theirs in (
            ("layers", [wanted.layers], [len(layers)]),
            ("piece_bytes", [wanted.piece_bytes], sizes),
        ):
            if ours != theirs:
                what = f"{name} differs: ours {ours[0]}, theirs {_some(map(str, theirs))}"
                cure = "start both engines with one model, KV dtype, block size and parallel shape"
                findings.append(Finding(f"peer.layout.{name}", "bad", what, cure))
    if not met.facts:
        return None, findings
    pool = met.layout.num_blocks[0] if layers else 0
    with contextlib.suppress(ConfigError):
        case = Case(len(layers), sizes[0] if sizes else 0, max(1, pool // 2) * len(layers) * (sizes[0] if sizes else 0))
        if case.layout().shape() == met.layout.shape() and case.pool <= pool:
            return case, findings
    raise HandshakeError("the peer's memory is laid out as no doctor's is: install the same kvconnect at both ends")


def _some(what: Iterable[str]) -> str:
    """Return the first few of what a peer has, as one text."""
    return ", ".join(itertools.islice(what, _MOST_NAMED))
