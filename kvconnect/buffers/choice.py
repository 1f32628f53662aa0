"""Which pipe joins two workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kvconnect import registry
from kvconnect.buffers import fields
from kvconnect.errors import ConfigError, HandshakeError, UnavailableBackendError
from kvconnect.paging import PagedMemory
from kvconnect.pipes.base import Pipe, Verdict

logger = logging.getLogger(__name__)

_LIST = "choose another pipe: python -m kvconnect list"


def describe_pipes(wanted: str, memory: PagedMemory) -> dict[str, dict[str, Any]]:
    """Describe the pipe ``wanted`` – or every one that can be had, if ``"auto"`` – for ``memory``.

    Raises:
        UnknownBackendError, UnavailableBackendError: the pipe asked for cannot be had, or none can
            carry this memory.

    """
    if wanted != "auto":
        cls = registry.pipe(wanted)
        verdict = _carries(cls, memory)
        if not verdict:
            raise UnavailableBackendError("pipe", wanted, verdict.reason, verdict.cure or _LIST)
        return {wanted: dict(cls.descriptor(memory.device))}
    found = {}
    for name in registry.pipes():
        try:
            cls = registry.pipe(name)
        except ConfigError:
            continue  # not installed, or not for this machine
        verdict = _carries(cls, memory)
        if verdict:
            found[name] = dict(cls.descriptor(memory.device))
        elif _kind(memory) in cls.traits.devices:
            logger.warning("pipe %s is passed over: %s", name, verdict.reason)
    if not found:
        reason = f"no pipe that is installed and can run here carries {_kind(memory)} memory"
        raise UnavailableBackendError("pipe", "auto", reason, _LIST)
    return found


def _carries(cls: type[Pipe], memory: PagedMemory) -> Verdict:
    if _kind(memory) not in cls.traits.devices:
        carried = " and ".join(sorted(cls.traits.devices))
        reason = f"it carries {carried} memory, and this engine's KV cache is {_kind(memory)} memory"
        return Verdict(False, reason)
    try:
        return cls.accepts(memory)
    except Exception as error:  # noqa: BLE001 - a third party's may raise anything: other pipes may still do
        return Verdict(False, f"it cannot tell whether it carries this memory: {type(error).__name__}: {error}")


def _kind(memory: PagedMemory) -> str:
    return memory.device.partition(":")[0]


def choose_pipe(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, type[Pipe], dict[str, str]]:
    """Choose the nearest pipe that both workers have and that joins them.

    Args:
        ours: `WorkerEnd.describe`'s answer here.
        theirs: the peer's.

    Returns:
        its name, its class, and why each other one was passed over.

    Raises:
        HandshakeError: there is none; says why for each.

    """
    mine, other = fields.mapping(ours, "pipes"), fields.mapping(theirs, "pipes")
    shared = mine.keys() & other.keys()
    passed = dict.fromkeys({*mine, *other} - shared, "only one side has it")
    best: tuple[str, type[Pipe]] | None = None
    for name, cls in sorted(((name, registry.pipe(name)) for name in shared), key=_nearness):
        verdict = _reaches(cls, fields.mapping(mine, name), fields.mapping(other, name))
        if not verdict:
            passed[name] = verdict.reason
        elif best is None:
            best = (name, cls)
        else:
            passed[name] = f"{best[0]} is nearer"
    if best is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(passed.items()))
        raise HandshakeError(f"no pipe joins the two engines ({reasons or 'neither has any'})")
    return *best, passed


def _reaches(cls: type[Pipe], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Verdict:
    try:
        return cls.can_reach(ours, theirs) and cls.can_reach(theirs, ours)
    except Exception as error:  # noqa: BLE001 - descriptors are the peer's and pipes may be a third party's: other pipes may still do
        return Verdict(False, f"cannot be told: {type(error).__name__}: {error}")


def _nearness(item: tuple[str, type[Pipe]]) -> tuple[int, bool, bool, str]:
    name, cls = item
    return int(cls.traits.reach), not cls.traits.zero_copy, not cls.traits.one_sided, name
