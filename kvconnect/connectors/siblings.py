"""At most one kvconnect connector of an engine answers for its requests.

vLLM's MultiConnector asks every child about every request and knows nothing of
what they have in common. Two of ours that lend through one kind of buffer would
return two tickets under the same names, which vLLM takes for a fatal clash; two
that fetch would race for the one entry of a ticket.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvconnect.errors import ConfigError

if TYPE_CHECKING:
    from kvconnect.buffers.base import EndSettings


#: The rank of a scheduler's connector.
SCHEDULER = -1


@dataclass(frozen=True)
class Post:
    """What one connector does, where two that overlap cannot be told apart.

    Args:
        engine_id: vLLM's; children of one MultiConnector share it.
        rank: worker's, or `SCHEDULER`.
        buffer: name of the lookup buffer.
        produces, consumes: its jobs.

    """

    engine_id: str
    rank: int
    buffer: str
    produces: bool
    consumes: bool

    @classmethod
    def of(cls, settings: EndSettings, rank: int) -> Post:
        """Describe the connector that has these settings."""
        buffer = settings.options.buffer.name
        return cls(settings.engine_id, rank, buffer, settings.produces, settings.consumes)

    def overlap(self, other: Post) -> str:
        """Return what both would do to the same requests; empty if nothing."""
        if (self.engine_id, self.rank, self.buffer) != (other.engine_id, other.rank, other.buffer):
            return ""
        if self.produces and other.produces:
            return "offer the KV of each prompt"
        return "fetch the KV of each prompt" if self.consumes and other.consumes else ""


_lock = threading.Lock()
#: Connectors that were built in this process and neither shut down nor forgotten, with the process's id.
_posts: weakref.WeakKeyDictionary[object, tuple[int, Post]] = weakref.WeakKeyDictionary()


def enter(connector: object, post: Post) -> None:
    """Take up a post.

    Raises:
        ConfigError: another live connector of the same engine has a post that overlaps.

    """
    with _lock:
        for other, (pid, taken) in _posts.items():
            job = post.overlap(taken)
            if job and pid == os.getpid():  # what a forked process inherited is not its own
                names = f"{type(other).__name__} and {type(connector).__name__}"
                raise ConfigError(
                    f"{names}, two connectors of one engine, would both {job}; leave one of them in "
                    "kv_connector_extra_config.connectors: kv_connector='KvConnect' takes the nearest pipe to each peer"
                )
        _posts[connector] = (os.getpid(), post)


def leave(connector: object) -> None:
    """Give the post up. Does nothing if there is none."""
    with _lock:
        _posts.pop(connector, None)
