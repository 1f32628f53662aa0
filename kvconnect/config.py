"""Configuration: frozen dataclasses and the only parser of ``kv_connector_extra_config``.

Units are in the names (``_s``, ``_bytes``). Unknown keys fail with their path and
the nearest known key.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from kvconnect.errors import ConfigError, nearest

T = TypeVar("T")

#: Where vLLM's users write these options.
PATH = "kv_connector_extra_config"


@dataclass(frozen=True)
class Backend:
    """A pipe or buffer by its registered name, with options of its own."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


#: Python's parser of JSON knows Infinity and NaN, and whole numbers that no float holds.
_FINITE: Final = 1e300
#: What a poller of the kernel's can sleep, in seconds, and a little less.
_LONGEST_S: Final = 1_000_000
_PERIODS: Final = (
    "lease_s",
    "connect_timeout_s",
    "lookup_timeout_s",
    "transfer_timeout_s",
    "release_timeout_s",
    "pipe_idle_s",
)


@dataclass(frozen=True)
class Config:
    """Everything under ``kv_connector_extra_config``. All keys are optional.

    Args:
        pipe: transport: ``"auto"``, a registered name, or ``{"name": …, option: …}``. The options of
            ``"auto"`` are ``measure`` (false: of equally near pipes the first that opens is taken) and
            ``options``, of the pipes that it may take: ``{"tcp": {"bind_host": …}}``.
        buffer: lookup buffer, likewise.
        bind_host: address that this engine's control and data servers listen on.
        advertise_host: address that peers are told, if it differs (NAT).
        port: control port of the scheduler; 0 takes a free one.
        peers: producers' control addresses ``"host:port"``, for requests without a ticket.
        group: engines of one host with the same group find each other without any port setting.
        key_file: a file with a secret that all engines share (16 characters or more, readable by its
            owner only). Who does not hold it is neither answered nor asked.
        secret_key_file: instead, a file with this engine's own CURVE secret key
            (``python -m kvconnect keygen``); its addresses are then ``"<public key>@host:port"``.
        peer_keys: with it, the public keys of all engines that it talks to.
        insecure: listen on other addresses than loopback although there is no key.
        allowed_peers: without keys, hosts that may be contacted besides loopback, this engine's own,
            those of `peers` and of this host's group: names or addresses with ``*`` as a wildcard,
            or networks (``"10.0.0.0/8"``).
        lease_s: how long an unclaimed entry, or a claim that is not renewed, keeps its blocks.
        connect_timeout_s: for reaching a peer and exchanging hellos, and for measuring each of several pipes.
        lookup_timeout_s: for asking peers whether they hold a request's KV.
        transfer_timeout_s: for moving one request's blocks.
        release_timeout_s: for the owner's confirmation afterwards.
        pipe_idle_s: when a pipe over which nothing was loaded is closed, since it costs memory, descriptors and
            pings; the next load opens another. ``null``: never.
        unasked_share: largest share of a producer's blocks that entries nobody asked for may hold.
        lend_capacity_bytes: the most that lent blocks may hold of each worker's KV memory; nothing but the pool
            bounds them, unless it is set.
        lend_policy: what gives way when a prompt does not fit into it: the oldest entries that nobody has claimed
            (``"evict"``), or that prompt, which its taker computes (``"refuse"``).
        load_capacity_bytes: the most that loads under way may hold of each worker's KV memory, but for a single
            load; bounded only by what decoding requests may soon need, unless it is set.
        content_lookup: look for requests without a ticket at the known producers.
        log_transfers: one INFO line a transfer (it is DEBUG otherwise), for demonstrations and debugging.
        checksum: compare the sum of the blocks that have arrived with that of the owner's blocks, whatever
            the pipe, before they are used; where they differ, the request is recomputed. (The pipe ``tcp``
            has checksums of what is on the wire besides; they are on unless it has TLS or is told otherwise.)
        router_discovery: ``"host:port"`` of a vllm-router's ``--vllm-discovery-address``: this engine registers
            there by itself, again and again.
        http_address: with it, ``"host:port"`` of this engine's API server as the router reaches it.
        kv_ip, kv_port, kv_rank, kv_parallel_size: vLLM's older fields. With a ``kv_ip`` that
            is not loopback, the engine of rank r listens on ``kv_ip`` at ``kv_port + r``, and
            consumers look at the other ranks there.

    """

    pipe: Backend = Backend("auto")
    buffer: Backend = Backend("remote")
    bind_host: str = "127.0.0.1"
    advertise_host: str | None = None
    port: int = 0
    peers: tuple[str, ...] = ()
    group: str = "default"
    key_file: str | None = None
    secret_key_file: str | None = None
    peer_keys: tuple[str, ...] = ()
    insecure: bool = False
    allowed_peers: tuple[str, ...] = ()
    lease_s: float = 30.0
    connect_timeout_s: float = 5.0
    lookup_timeout_s: float = 2.0
    transfer_timeout_s: float = 60.0
    release_timeout_s: float = 10.0
    pipe_idle_s: float | None = 600.0
    unasked_share: float = 0.25
    lend_capacity_bytes: int | None = None
    lend_policy: Literal["evict", "refuse"] = "evict"
    load_capacity_bytes: int | None = None
    content_lookup: bool = True
    log_transfers: bool = False
    checksum: bool = False
    router_discovery: str | None = None
    http_address: str | None = None
    kv_ip: str | None = None
    kv_port: int | None = None
    kv_rank: int | None = None
    kv_parallel_size: int | None = None

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Config:
        """Read ``kv_connector_extra_config``.

        Raises:
            ConfigError: an unknown key, a wrong type or a value out of range; names path and cure.

        """
        return parse_options(cls, extra, PATH)

    def __post_init__(self) -> None:
        """Check ranges; raise `ConfigError`."""
        path = PATH
        for name in _PERIODS:
            period = getattr(self, name)
            if period is not None and not 0 < period <= _LONGEST_S:
                raise ConfigError(f"{path}.{name} must be greater than 0 and at most {_LONGEST_S} (s), got {period}")
        if not 0 <= self.unasked_share <= 1:
            raise ConfigError(f"{path}.unasked_share must be between 0 and 1, got {self.unasked_share}")
        for name in ("port", "kv_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(f"{path}.{name} must be a TCP port (0 to 65535), got {port}")
        addresses = {f"peers[{i}]": peer for i, peer in enumerate(self.peers)}
        own = {"router_discovery": self.router_discovery, "http_address": self.http_address}
        addresses |= {name: address for name, address in own.items() if address is not None}
        for name, address in addresses.items():
            host, _, number = address.rpartition(":")
            if not host or not number.isdecimal() or not 0 < int(number) <= 65535:
                raise ConfigError(f"{path}.{name} must look like 'host:port', got {address!r}")
        if (self.router_discovery is None) != (self.http_address is None):
            raise ConfigError(f"{path}.router_discovery and {path}.http_address belong together: set both or none")
        self._check_capacities()
        self._check_keys()
        if self.kv_rank is not None and self.kv_parallel_size is not None and self.kv_rank >= self.kv_parallel_size:
            raise ConfigError(
                f"{path}.kv_rank is {self.kv_rank}, but ranks run from 0 to kv_parallel_size - 1 "
                f"= {self.kv_parallel_size - 1}"
            )

    def _check_capacities(self) -> None:
        for name in ("lend_capacity_bytes", "load_capacity_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{PATH}.{name} must not be negative, got {getattr(self, name)}")

    def _check_keys(self) -> None:
        if self.key_file is not None and self.secret_key_file is not None:
            raise ConfigError(f"{PATH}.key_file and {PATH}.secret_key_file exclude each other: remove one")
        if bool(self.peer_keys) != (self.secret_key_file is not None):
            raise ConfigError(f"{PATH}.secret_key_file and {PATH}.peer_keys belong together: set both or none")


def parse_backend(path: str, value: Any) -> Backend:
    """Read ``"name"`` or ``{"name": …, option: …}``."""
    if isinstance(value, str) and value:
        return Backend(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return Backend(value["name"], {k: v for k, v in value.items() if k != "name"})
    raise ConfigError(f"{path} must be a name or an object with a 'name', got {value!r}")


def chosen(kind: Literal["pipe", "buffer"], extra: Mapping[str, Any], config: Config, preset: str | None) -> Backend:
    """Return the pipe, or the buffer, to use: the configured one, or that which the connector stands for.

    Args:
        kind: which of both.
        extra: what ``config`` was parsed from.
        config: the parsed configuration.
        preset: the name that the connector's class stands for, or ``None``.

    Raises:
        ConfigError: the two contradict each other.

    """
    configured: Backend = getattr(config, kind)
    if preset is None:
        return configured
    if kind not in extra:
        return Backend(preset)
    if configured.name != preset:
        raise ConfigError(
            f"{PATH}.{kind} is {configured.name!r}, but this connector stands for {preset!r}; "
            f"remove the option or use kv_connector='KvConnect'"
        )
    return configured


def parse_options(cls: type[T], options: Mapping[str, Any], path: str, also: Iterable[str] = ()) -> T:
    """Read ``options`` into the frozen dataclass ``cls`` (a backend's own options, say).

    Who misspells a key is told of those in ``also``, too, which somebody else reads.

    Raises:
        ConfigError: an unknown key or a wrong type; names path and cure.

    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in hints:
            known = {*hints, *also}
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}.{key} is not a known option; {hint}")
        values[key] = _convert(f"{path}.{key}", value, hints[key])
    return cls(**values)


def _convert(path: str, value: Any, kind: Any) -> Any:
    if kind is Backend:
        return parse_backend(path, value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        return tuple(_convert(f"{path}[{i}]", item, typing.get_args(kind)[0]) for i, item in enumerate(value))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, typing.get_args(kind)))}, got {value!r}")
        return value
    kind = typing.get_origin(kind) or kind  # what a mapping holds is its owner's to check
    if kind is float:
        return _number(path, value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {_NOUN.get(kind, kind)}, got {value!r}")
    return value


def _number(path: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{path} must be a number, got {value!r}")
    if not abs(value) < _FINITE:
        raise ConfigError(f"{path} must be a finite number, got {value!r}")
    return float(value)


_NOUN = {int: "a whole number", str: "a string", bool: "true or false", Mapping: "an object"}
