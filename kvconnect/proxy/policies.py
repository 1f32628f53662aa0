"""Which server gets a request: functions of the servers that may get it and of the prompt's beginning.

A policy keeps nothing: what has to be remembered is in the servers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from kvconnect.proxy.servers import Server

#: ``choose(servers, prefix)``: one of ``servers``, of which there is at least one.
Policy = Callable[[Sequence[Server], str], Server]
PolicyName = Literal["round_robin", "least_loaded", "prefix_aware"]

#: How far above its share of all requests in flight a server goes for the sake of a prefix.
_ABOVE_SHARE = 1.25


def round_robin(servers: Sequence[Server], _prefix: str) -> Server:
    """Return the server that was not chosen for longest."""
    return min(servers, key=lambda server: server.chosen_s)


def least_loaded(servers: Sequence[Server], _prefix: str) -> Server:
    """Return the server with the fewest requests in flight, of several each in turn."""
    return min(servers, key=lambda server: (server.in_flight, server.chosen_s))


def prefix_aware(servers: Sequence[Server], prefix: str) -> Server:
    """Return the same server for the same prefix, as far as it has room.

    Rendezvous hashing with bounded loads: every proxy ranks the servers alike, a
    server that comes or goes moves only its own prefixes, and one that holds more
    than a quarter above its share, and one request, is passed over for the prefix's next.
    """
    if not prefix:
        return least_loaded(servers, prefix)
    share = (1 + sum(server.in_flight for server in servers)) / len(servers)
    with_room = (server for server in servers if server.in_flight < 1 + _ABOVE_SHARE * share)
    return max(with_room, key=lambda server: _weight(server.url, prefix))


def _weight(url: str, prefix: str) -> bytes:
    # "surrogatepass": JSON may hold halves of surrogate pairs.
    return hashlib.blake2b(f"{url} {prefix}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


POLICIES: Final[Mapping[PolicyName, Policy]] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "prefix_aware": prefix_aware,
}
