"""What one end does for the other one's reads: progress the agent, gather portions, vouch for the blocks."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, Protocol

from kvconnect.errors import BusyError, HandshakeError
from kvconnect.paging import BlockIds
from kvconnect.pipes import turns
from kvconnect.pipes.base import Message
from kvconnect.pipes.flows import count, unpack
from kvconnect.pipes.nixl_place import card
from kvconnect.pipes.nixl_staging import Slot, StagedMemory, failed

#: What the other end may have running here at once; the rest of its requests is refused.
MAX_REQUESTS: Final = 1024


class Lender(Protocol):
    """What lending needs of its end of the pipe."""

    shared: StagedMemory
    timeout_s: float

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        """Call the other end; failures are in the future."""

    def check(self) -> None:
        """Raise if this end's block path is over."""


class Lending:
    """What this end does for the other one's reads: progress the agent, gather portions, vouch for the blocks."""

    def __init__(self, end: Lender) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._slots: dict[tuple[int, int], Slot | None] = {}
        self._telling = threading.Lock()
        self._told_memory = False

    def on_begin(self, body: dict[str, Any]) -> dict[str, Any]:
        """A read begins."""
        self._end.check()
        self._hot(count(body, "transfer"))
        return {}

    def _hot(self, transfer: int) -> None:
        with self._lock:
            if transfer not in self._running and len(self._running) >= MAX_REQUESTS:
                raise BusyError(f"{MAX_REQUESTS} transfers of the other end are running here already")
            self._running.add(transfer)
        self._end.shared.agent.watch((self, transfer), self._end.timeout_s)

    def on_gather(self, body: dict[str, Any]) -> dict[str, Any]:
        """A portion is to be gathered; `nixl.gathered` tells when it is."""
        end = self._end
        end.check()
        key, blocks = (count(body, "transfer"), count(body, "portion")), unpack(body.get("groups"))
        layout = end.shared.memory.layout
        layout.check(blocks)
        nbytes = layout.nbytes(blocks)
        if nbytes != body.get("nbytes") or nbytes > end.shared.serving.slot_bytes:
            raise HandshakeError(f"a portion has {nbytes} bytes here, {body.get('nbytes')} at the other end")
        with self._lock:
            if key in self._slots or len(self._slots) >= MAX_REQUESTS:
                raise BusyError("too many portions are asked for at once")
            self._slots[key] = None
        self._hot(key[0])
        turns.shared().add(partial(self._open, key, blocks, nbytes))
        return {}

    def _open(self, key: tuple[int, int], blocks: BlockIds, nbytes: int) -> bool:
        try:
            self._end.shared.serving.open()
        except Exception as error:  # noqa: BLE001 - the device's allocator may raise anything; the peer hears of it
            self._refuse(key, error)
            return False
        self._end.shared.serving.take(lambda slot: turns.shared().add(partial(self._gather, key, blocks, nbytes, slot)))
        return False

    def _gather(self, key: tuple[int, int], blocks: BlockIds, nbytes: int, slot: Slot) -> bool:
        shared = self._end.shared
        try:
            if key in self._slots:
                shared.stager.gather(shared.memory, blocks, slot.tensor[:nbytes])
        except Exception as error:  # noqa: BLE001 - kernels may raise anything; the peer hears of it
            shared.serving.give(slot)
            self._refuse(key, error)
            return False
        with self._lock:
            # Not before: a slot that is lent is given to somebody else when the transfer ends.
            wanted = key in self._slots
            if wanted:
                self._slots[key] = slot
        if not wanted:
            shared.serving.give(slot)
            return False
        body: dict[str, Any] = {"transfer": key[0], "portion": key[1], "address": slot.address}
        registration = shared.serving.registration
        # Several threads gather: none may tell of a portion before the memory that it lies in was told of.
        with self._telling:
            if not self._told_memory and registration is not None:
                self._told_memory = True
                body["memory"] = card(shared.agent.name, shared.place, registration)
            self._end.tell("nixl.gathered", body)
        return False

    def _refuse(self, key: tuple[int, int], error: Exception) -> None:
        self._end.tell("nixl.gathered", {"transfer": key[0], "portion": key[1], "error": str(failed(error))})
        self._give(key)

    def on_taken(self, body: dict[str, Any]) -> dict[str, Any]:
        """A portion was read."""
        self._give((count(body, "transfer"), count(body, "portion")))
        return {}

    def on_end(self, body: dict[str, Any]) -> dict[str, Any]:
        """A read is over; the answer vouches for what was read."""
        transfer = count(body, "transfer")
        self._drop(transfer)
        self._end.check()
        return {}

    def _drop(self, transfer: int) -> None:
        with self._lock:
            self._running.discard(transfer)
            keys = [key for key in self._slots if key[0] == transfer]
        self._end.shared.agent.unwatch((self, transfer))
        for key in keys:
            self._give(key)

    def _give(self, key: tuple[int, int]) -> None:
        with self._lock:
            slot = self._slots.pop(key, None)
        if slot is not None:
            self._end.shared.serving.give(slot)

    def drop_all(self) -> None:
        """The pipe is over."""
        with self._lock:
            transfers = {key[0] for key in self._slots} | self._running
        for transfer in transfers:
            self._drop(transfer)
