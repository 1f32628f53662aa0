"""Which pipes join two workers, the best first."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvconnect import registry
from kvconnect.buffers import fields
from kvconnect.config import PATH, Backend, parse_options
from kvconnect.errors import ConfigError, HandshakeError, UnavailableBackendError, UnknownBackendError
from kvconnect.paging import PagedMemory
from kvconnect.pipes.base import Pipe, Verdict

logger = logging.getLogger(__name__)

_MAX_REASON = 400
#: Pipes of a peer; nobody has as many.
_MAX_PIPES = 256
_LIST = "choose another pipe: python -m kvconnect list"


@dataclass(frozen=True)
class AutoOptions:
    """Options of ``"pipe": {"name": "auto", …}``.

    Args:
        measure: where several pipes are equally near, have the first large load tell which is the
            fastest; otherwise the first that can be opened is taken.
        options: of the pipes that may be taken, by name: ``{"tcp": {"bind_host": "10.0.0.1"}}``.

    """

    measure: bool = True
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Backend) -> AutoOptions:
        """Read the options of the configured pipe; whoever names one wants no other.

        Raises:
            ConfigError: an unknown key or a wrong type; `UnknownBackendError` if it is a pipe's name.

        """
        if pipe.name != "auto":
            return cls(options={pipe.name: pipe.options})
        auto = parse_options(cls, pipe.options, f"{PATH}.pipe")
        for name, options in auto.options.items():
            if name not in registry.pipes():
                raise UnknownBackendError("pipe", name, registry.pipes())
            if not isinstance(options, Mapping):
                raise ConfigError(f"{PATH}.pipe.options.{name} must be an object, got {options!r}")
        return auto


class Candidate(NamedTuple):
    """A pipe that joins two workers."""

    name: str
    cls: type[Pipe]


def describe_pipes(wanted: str, memory: PagedMemory) -> dict[str, dict[str, Any]]:
    """Describe the pipe ``wanted`` – or every one that can be had, if ``"auto"`` – for ``memory``.

    Returns:
        ``pipes``, the descriptors by name, and ``refused``, why others that are for such memory cannot
        carry it: two fields of `WorkerEnd.describe`'s answer.

    Raises:
        UnknownBackendError, UnavailableBackendError: the pipe asked for cannot be had, or none can
            carry this memory.

    """
    if wanted != "auto":
        cls = registry.pipe(wanted)
        verdict = _carries(cls, memory)
        if not verdict:
            raise UnavailableBackendError("pipe", wanted, verdict.reason, verdict.cure or _LIST)
        return {"pipes": {wanted: dict(cls.descriptor(memory.device))}, "refused": {}}
    found, refused = {}, {}
    for name in registry.pipes():
        try:
            cls = registry.pipe(name)
        except ConfigError:
            continue  # not installed, or not for this machine
        verdict = _carries(cls, memory)
        if verdict:
            found[name] = dict(cls.descriptor(memory.device))
        elif _kind(memory) in cls.traits.devices:
            refused[name] = _told(verdict)
            logger.warning("pipe %s is passed over: %s", name, refused[name])
    if not found:
        reason = f"no pipe that is installed and can run here carries {_kind(memory)} memory"
        raise UnavailableBackendError("pipe", "auto", reason, _LIST)
    return {"pipes": found, "refused": refused}


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


def choose_pipe(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[list[Candidate], dict[str, str]]:
    """Find the pipes that both workers have and that join them.

    Args:
        ours: `WorkerEnd.describe`'s answer here.
        theirs: the peer's.

    Returns:
        those pipes, the nearest first and of equally near ones that with the fewest copies; and why each
        other one does not join them.

    Raises:
        HandshakeError: there is none; says why for each.

    """
    mine, other = _by_pipe(ours, "pipes"), _by_pipe(theirs, "pipes")
    shared = mine.keys() & other.keys()
    passed = {fields.shown(name): "only one side has it" for name in {*mine, *other} - shared}
    passed |= _refused(theirs, "the peer") | _refused(ours, "this engine")
    found = []
    for candidate in sorted((Candidate(name, registry.pipe(name)) for name in shared), key=_nearness):
        name = candidate.name
        verdict = _reaches(candidate.cls, fields.mapping(mine, name), fields.mapping(other, name))
        if verdict:
            found.append(candidate)
        else:
            passed[name] = fields.shown(_told(verdict), _MAX_REASON)
    if not found:
        raise HandshakeError(f"no pipe joins the two engines ({told(passed) or 'neither has any'})")
    return found, passed


def _refused(worker: Mapping[str, Any], who: str) -> dict[str, str]:
    refused = _by_pipe(worker, "refused") if "refused" in worker else {}
    return {
        fields.shown(name): f"{who} cannot use it, {fields.shown(reason, _MAX_REASON)}"
        for name, reason in refused.items()
    }


def _by_pipe(worker: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = fields.mapping(worker, name)
    if len(found) > _MAX_PIPES:
        raise HandshakeError(f"field {name!r} has {len(found)} pipes, more than {_MAX_PIPES}")
    return found


def told(passed: Mapping[str, str]) -> str:
    """Say why pipes were passed over, in one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in sorted(passed.items()))


def _told(verdict: Verdict) -> str:
    return f"{verdict.reason} ({verdict.cure})" if verdict.cure else verdict.reason


def _reaches(cls: type[Pipe], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Verdict:
    try:
        return cls.can_reach(ours, theirs) and cls.can_reach(theirs, ours)
    except Exception as error:  # noqa: BLE001 - descriptors are the peer's and pipes may be a third party's: other pipes may still do
        return Verdict(False, f"cannot be told: {type(error).__name__}: {error}")


def _nearness(candidate: Candidate) -> tuple[int, bool, bool, str]:
    traits = candidate.cls.traits
    return int(traits.reach), not traits.zero_copy, traits.one_sided is False, candidate.name
