"""Who may talk to an engine, and whom it talks to: the configuration's rules of access.

With keys both ends of every control connection prove themselves. Without, nobody
outside this host is served unless the configuration says that this is meant, and
an address that came with a request or a peer's message is contacted only if it is
of this host, of a configured peer, of an engine of this host's group, or allow-listed.
"""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Mapping
from typing import Any

from kvconnect.buffers.address import advertised, fixed_producers, is_loopback, listen_address
from kvconnect.buffers.directory import Directory
from kvconnect.clock import SYSTEM, Clock
from kvconnect.config import PATH, Config
from kvconnect.control import ControlClient, ControlServer, split
from kvconnect.errors import ConfigError
from kvconnect.keys import Keys


class Access:
    """What one end of an engine opens its control servers and clients with."""

    def __init__(self, options: Config, clock: Clock = SYSTEM) -> None:
        """Read the keys; servers and clients count their deadlines by ``clock``.

        Raises:
            ConfigError: a key file or an allow-list entry is of no use.

        """
        self._options, self._clock, self._keys = options, clock, keys_of(options)
        self._check = None if self._keys is not None else Contacts(options).check

    def server(self, name: str, *, fixed_port: bool = True) -> tuple[ControlServer, str]:
        """Open a server; return it and the address that peers are told.

        Raises:
            ConfigError: it cannot be bound, others could reach it unauthenticated, or there is no address to tell.

        """
        host, port = listen_address(self._options)
        self._refuse_open(f"{PATH}.{'bind_host' if host == self._options.bind_host else 'kv_ip'}", host)
        server = ControlServer(host, port if fixed_port else 0, name, self._clock, self._keys)
        try:
            told = advertised(self._options, host, server.port)
        except ConfigError:
            server.close()
            raise
        return server, f"{self._keys.name}@{told}" if self._keys is not None and self._keys.name else told

    def client(self, name: str) -> ControlClient:
        """Open a client."""
        return ControlClient(name, self._clock, self._keys, self._check)

    def check_pipe(self, options: Mapping[str, Any], path: str = f"{PATH}.pipe") -> None:
        """Raise `ConfigError` if a pipe's ``bind_host``, at any depth, opens it to others unauthenticated."""
        for name, value in options.items():
            if isinstance(value, Mapping):
                self.check_pipe(value, f"{path}.{name}")
            elif name == "bind_host" and isinstance(value, str):
                self._refuse_open(f"{path}.{name}", value)

    def _refuse_open(self, path: str, host: str) -> None:
        if self._keys is None and not self._options.insecure and not is_loopback(host):
            raise ConfigError(
                f"{path} is {host!r}, which other hosts can reach, and nobody is asked for a key: set "
                f"{PATH}.key_file to the same secret at every engine, or, on a network that you trust, insecure: true"
            )


class Contacts:
    """Addresses that may be contacted although nobody there proves who they are."""

    def __init__(self, options: Config) -> None:
        """Read ``options``; raise `ConfigError` if an ``allowed_peers`` is malformed."""
        self._group = options.group
        self._directory: Directory | None = None
        own = {options.bind_host, options.advertise_host, options.kv_ip} - {None, "0.0.0.0", "::", "*"}  # noqa: S104 - compared
        self._hosts = {_plain(host) for host in own if host}
        self._hosts |= {_host(endpoint) for endpoint in fixed_producers(options)}
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._patterns: list[str] = []
        for i, entry in enumerate(options.allowed_peers):
            if "/" not in entry:
                self._patterns.append(_plain(entry))
                continue
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError as error:
                raise ConfigError(f"{PATH}.allowed_peers[{i}] is no network: {error}; write '10.0.0.0/8'") from error

    def check(self, endpoint: str) -> None:
        """Raise `ConfigError` unless ``endpoint`` may be contacted; may read the host's directory."""
        host = _host(endpoint)
        if not (is_loopback(host) or host in self._hosts or self._is_allowed(host) or self._is_neighbour(host)):
            raise ConfigError(
                f"{host} is not contacted, since nobody there has to prove who they are: add it, its network or a "
                f"pattern to {PATH}.allowed_peers, or set {PATH}.key_file to the same secret at every engine"
            )

    def _is_allowed(self, host: str) -> bool:
        if any(fnmatch.fnmatchcase(host, pattern) for pattern in self._patterns):
            return True
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            return False  # a name: what it leads to is whoever runs its domain's choice
        return any(number in network for network in self._networks)

    def _is_neighbour(self, host: str) -> bool:
        """Whether an engine of this host's group, and of this user, listens there."""
        if self._directory is None:
            self._directory = Directory(self._group)
        return host in map(_host, self._directory.scan())


def keys_of(options: Config) -> Keys | None:
    """Return the keys that the configuration names, if it names any; raise `ConfigError`."""
    if options.key_file is not None:
        return Keys.from_shared(options.key_file, f"{PATH}.key_file")
    if options.secret_key_file is not None:
        secret, peers = f"{PATH}.secret_key_file", f"{PATH}.peer_keys"
        return Keys.from_pair(options.secret_key_file, options.peer_keys, secret, peers)
    return None


def _host(endpoint: str) -> str:
    return _plain(split(endpoint)[1])


def _plain(host: str) -> str:
    return host.strip("[]").lower()
