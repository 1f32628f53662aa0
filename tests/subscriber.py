"""A subscriber to an engine's KV events, as routers have one: it knows what is where from what it has heard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

LIMIT_S = 20.0
Where = dict[str, dict[Any, Any]]
#: For tests in which nobody but vLLM itself has a reason to step.
IDLE_STEPS = pytest.mark.skipif(
    not hasattr(KVConnectorBase_V1, "has_pending_push_work"),
    reason="before 0.24 an engine without requests takes no steps, and publishes with its next request",
)


class Subscriber:
    """Hears of one publisher at ``endpoint``, of which nothing is missed from when it was `connected` on.

    Without one it listens at `endpoint` itself, to as many publishers as connect to it. ZeroMQ tells those that it
    wants to hear them only while it listens: what they publish before is lost.
    """

    def __init__(self, endpoint: str = "") -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set_hwm(0)
        self._socket.subscribe(b"")
        if endpoint:
            self._socket.connect(endpoint)
        else:
            self._socket.bind("tcp://127.0.0.1:*")
        self._of_one = bool(endpoint)
        self.endpoint = endpoint or self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._next: int | None = None
        #: All that was heard, in its order.
        self.events: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(linger=0)

    def listen(self, pause_s: float = 0.0) -> None:
        """Hear what there is, or the first of what comes within a pause."""
        while self._socket.poll(1000 * pause_s):
            _, sequence, payload = self._socket.recv_multipart()
            number, pause_s = int.from_bytes(sequence, "big"), 0.0
            assert self._next in {None, number} or not self._of_one, "a batch was missed"
            self._next = number + 1
            self.events += self._decoder.decode(payload).events

    def until(self, heard: Callable[[], Any], step: Callable[[], object] = lambda: None) -> Any:
        """Listen, while the engine does ``step``, until something was ``heard``; return it."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := heard()):
            assert time.monotonic() < deadline, self.events[-10:]
            step()
            self.listen(0.01)
        return found

    def connected(self, step: Callable[[], object]) -> None:
        """Have the publisher publish until something of it arrives, and forget that: who comes late misses some."""
        self.until(lambda: self.events, step)
        self.listen(0.2)
        self.events.clear()

    def where(self) -> Where:
        """Return, for each medium, the blocks that are there by now: their hashes, and what `describe` says of each."""
        there: Where = {}
        for event in self.events:
            if isinstance(event, BlockStored):
                blocks = there.setdefault(str(event.medium), {})
                assert event.parent_block_hash in {None, *blocks}, "a block is announced before what it follows"
                blocks.update(describe(event))
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    there.get(str(event.medium), {}).pop(block, None)
            else:
                assert isinstance(event, AllBlocksCleared)
                there.clear()
        return there

    def of(self, kind: type, medium: str = "STORAGE") -> list[Any]:
        """Return the events of one kind about one medium."""
        return [event for event in self.events if isinstance(event, kind) and event.medium == medium]


def describe(event: BlockStored) -> dict[Any, Any]:
    """Take an event apart into its blocks: each one's tokens, the block before it, and what else distinguishes it."""
    size = event.block_size
    assert len(event.token_ids) == size * len(event.block_hashes)
    before = [event.parent_block_hash, *event.block_hashes]
    extra = event.extra_keys or [None] * len(event.block_hashes)
    common = (event.lora_id, event.lora_name, event.group_idx, event.kv_cache_spec_kind)
    return {
        block: (event.token_ids[size * i : size * (i + 1)], before[i], extra[i], common)
        for i, block in enumerate(event.block_hashes)
    }
