"""One NIXL agent for all pipes of a process, on one thread.

`kvconnect.pipes.nixl_thread` says why that thread polls.

What NIXL calls one-sided still needs the target's progress: to set a connection up
on every transport, and for each byte on those without hardware for it (UCX over
TCP). A target that nobody progresses never answers the first read (measured). So
a pipe says with `Agent.watch` that its peer is reading, and the thread progresses
the agent meanwhile.

Everything NIXL does runs on that thread, so that its agent needs no locks. A
transfer over shared memory is copied there, inside the call that posts it, without
the GIL; requests are therefore kept small and take turns.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import logging
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final

from kvconnect.config import Backend
from kvconnect.errors import BrokenError, ConfigError, KVConnectError, UnavailableBackendError
from kvconnect.paging import IoVec
from kvconnect.pipes.base import YES, Verdict
from kvconnect.pipes.nixl_peers import Peers
from kvconnect.pipes.nixl_place import Card, Place, Registration, card
from kvconnect.pipes.nixl_thread import PollingThread, Then, ours

log = logging.getLogger(__name__)

#: What a note begins with: whose it is.
TOKEN_BYTES: Final = 8

#: Requests that are prepared and not under way.
_MAX_KEPT: Final = 256

Listener = Callable[[str, bytes], None]
#: A peer, two kinds of memory, and the pieces in each.
Key = tuple[str, Place, Place, bytes, bytes]


@dataclass(eq=False)
class Read:
    """One request: fetch ``remote`` pieces of a peer into ``local`` ones, pair by pair of equal length.

    It cannot be called off. To release a running request, or to disconnect from its
    peer, stops nothing on a transport that needs the target's progress: a target that
    had been frozen answered later, and the bytes were written (measured, UCX over TCP).
    So a request is over when NIXL says that it is done or has failed, and ``on_over``
    is called then, once, on the agent's thread. Whoever cannot wait so long lets it
    write to memory that nobody needs.

    Args:
        peer: name of the remote agent.
        local, remote: the pieces, and what kind of memory they are in.
        on_over: called after the last access to local memory.
        owner: of the local memory; held as long.
        again: the same pieces will be read again: what NIXL prepares for it is kept, which saves
            20 µs each time.

    """

    peer: str
    local: tuple[Place, IoVec]
    remote: tuple[Place, IoVec]
    on_over: Then
    owner: object
    again: bool = False
    handle: Any = None

    @functools.cached_property
    def key(self) -> Key:
        """What is equal for requests that are the same but for their time."""
        (here, local), (there, remote) = self.local, self.remote
        return self.peer, here, there, local.tobytes(), remote.tobytes()


class Agent(PollingThread):
    """A NIXL agent and its thread. Get it with `Agent.shared`; its methods may be called from any thread."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _agents: ClassVar[dict[tuple[Any, ...], Agent]] = {}
    _inherited: ClassVar[bool] = False

    def __init__(self, backends: Sequence[Backend], place: Place) -> None:
        self.pid = os.getpid()
        self.name = f"kvconnect-{self.pid}-{secrets.token_hex(8)}"
        #: How many pipes use each remote agent, and how many requests to it are under way.
        self._peers: Peers
        self._kept: OrderedDict[Key, Any] = OrderedDict()
        self._listeners: dict[bytes, Listener] = {}
        self._registered: dict[tuple[Any, ...], Registration] = {}
        self._numbered = itertools.count()
        self._nixl: Any = None
        super().__init__("kvconnect-nixl")
        try:
            self.call(lambda: self._make(backends, place))
        except BaseException:
            self.stop()
            raise

    @classmethod
    def shared(cls, backends: Sequence[Backend], place: Place) -> Agent:
        """Return this process's agent for these backends; the first call makes it (half a second).

        Args:
            backends: of NIXL, with their parameters.
            place: the kind of memory that it is wanted for; CUDA has to be there when it is made.

        Raises:
            ConfigError: NIXL has no such backend, or it does not take these parameters.
            UnavailableBackendError: see `usable`.

        """
        verdict = cls.usable()
        if not verdict:
            raise UnavailableBackendError("pipe", "nixl", verdict.reason, verdict.cure)
        key = (os.getpid(), *((one.name, tuple(sorted(one.options.items()))) for one in backends))
        with cls._lock:
            agent = cls._agents.get(key)
            if agent is None:
                agent = cls._agents[key] = cls(backends, place)
            return agent

    @classmethod
    def usable(cls) -> Verdict:
        """Say whether this process may have an agent: not if one that it was forked from had.

        UCX's own threads do not survive a fork: an agent made in such a child answers
        everything but moves no byte (measured).
        """
        if cls._inherited:
            return Verdict(False, "this process was forked from one that uses NIXL", "start workers with 'spawn'")
        return YES

    # -- from any thread ----------------------------------------------------------------

    def read(self, request: Read) -> None:
        """Begin a request when it is its turn."""
        self.soon_long(lambda: self._post(request))

    def listen(self, token: bytes, listener: Listener) -> None:
        """Have ``listener`` called, on the agent's thread, with the sender and the rest of each note for ``token``.

        Whoever wants to hear makes sure that the agent is progressed (`watch`).
        """
        self._listeners[token] = listener

    def unlisten(self, token: bytes) -> None:
        """Take `listen` back."""
        self._listeners.pop(token, None)

    def register(self, place: Place, iov: IoVec, owner: object) -> Registration:
        """Register memory, or return what the same memory was registered as.

        Args:
            place: where it is.
            iov: its pieces.
            owner: what keeps it alive; held until the last `deregister`.

        Raises:
            BrokenError: NIXL refuses it.

        """
        return self.call(lambda: self._register(place, iov, owner))

    def deregister(self, registration: Registration, *, delay_s: float = 0.0) -> None:
        """Give memory back, unless others use it still; not before ``delay_s``."""
        if delay_s:
            self.after(delay_s, lambda: self._deregister(registration))
        else:
            self.soon(lambda: self._deregister(registration))

    def card(self, place: Place, registration: Registration) -> dict[str, Any]:
        """Return what peers need to reach registered memory."""
        return card(self.name, place, registration, [one.number for one in list(self._registered.values())])

    def meet(self, card: Card) -> Peer:
        """Learn how to reach (more of) a peer's memory.

        Raises:
            BrokenError: the metadata is not that of an agent of this name, or what it replaces is being read.

        """
        return self.call(lambda: self._meet(card))

    # -- on the agent's thread ------------------------------------------------------------

    def notify(self, name: str, token: bytes, note: bytes) -> bool:
        """Send a small message to who listens for ``token`` at a peer; return whether NIXL takes it.

        It arrives in microseconds if the peer's agent is progressed, and without a
        change of threads. Not every backend has notifications.
        """
        if name == self.name:
            self._jobs.append(partial(self._hear, name, token + note))
            return True
        try:
            self._nixl.send_notif(name, token + note)
        except Exception as error:  # noqa: BLE001 - NIXL's own; there is another way
            log.debug("NIXL does not notify: %s", error)
            return False
        return True

    def _hear(self, name: str, note: bytes) -> None:
        listener = self._listeners.get(note[:TOKEN_BYTES])
        if listener is not None:
            listener(name, note[TOKEN_BYTES:])

    def _make(self, backends: Sequence[Backend], place: Place) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-untyped]

        place.enter()
        self._nixl = nixl_agent(self.name, nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._peers = Peers(self.name, self._nixl, self._release_kept)
        for backend in backends:
            if backend.name not in self._nixl.get_plugin_list():
                known = ", ".join(sorted(self._nixl.get_plugin_list()))
                raise ConfigError(f"pipe.backends: NIXL has no backend {backend.name!r} (it has {known})")
            parameters = {key: str(value) for key, value in backend.options.items()}
            try:
                self._nixl.create_backend(backend.name, parameters)
            except Exception as error:  # NIXL's own errors and its plugins' have no base in common
                raise ConfigError(f"pipe.backends: NIXL cannot make {backend.name!r}: {error}") from error

    def _register(self, place: Place, iov: IoVec, owner: object) -> Registration:
        key = (place, iov.tobytes())
        found = self._registered.get(key)
        if found is None:
            place.enter()
            self.eager = self.eager or place.kind == "VRAM"
            rows = [(int(address), int(nbytes), place.device, "") for address, nbytes in iov]
            descriptors = self._nixl.register_memory(rows, place.kind)
            metadata = self._nixl.get_partial_agent_metadata(descriptors, inc_conn_info=True)
            found = self._registered[key] = Registration(key, next(self._numbered), descriptors, metadata, owner)
        found.users += 1
        return found

    def _deregister(self, registration: Registration) -> None:
        registration.users -= 1
        if registration.users == 0:
            del self._registered[registration.key]
            self._release_kept()  # some of it may be of this memory
            try:
                self._nixl.deregister_memory(registration.descriptors)
            except Exception as error:  # noqa: BLE001 - NIXL's own; nothing is left to be done for this memory
                log.warning("memory could not be deregistered: %s", error)
            registration.owner = None

    def _meet(self, card: Card) -> Peer:
        self._peers.meet(card)
        return Peer(self, card.agent, card.number)

    def _leave(self, peer: Peer) -> None:
        self._peers.leave(peer.name, peer.number)

    def _post(self, request: Read) -> None:
        try:
            if not self._peers.is_met(request.peer):
                raise BrokenError("the pipe was closed")
            request.local[0].enter()
            request.handle = self._prepared(request)
            self._peers.reading(request.peer)
            over = _is_over(self._nixl.transfer(request.handle))
        except Exception as error:  # noqa: BLE001 - NIXL's own; handed to whoever asked
            self._over(request, ours(error))
            return
        if over:
            self._over(request, None)
        else:
            self.follow(
                lambda: _is_over(self._nixl.check_xfer_state(request.handle)), lambda error: self._over(request, error)
            )

    def _prepared(self, request: Read) -> Any:
        kept = self._kept.pop(request.key, None) if request.again else None
        if kept is not None:
            return kept
        (mine, local), (theirs, remote) = request.local, request.remote
        return self._nixl.initialize_xfer(
            "READ",
            self._nixl.get_xfer_descs(mine.rows(local), mine.kind),
            self._nixl.get_xfer_descs(theirs.rows(remote), theirs.kind),
            request.peer,
        )

    def _over(self, request: Read, error: KVConnectError | None) -> None:
        handle, request.handle, request.owner = request.handle, None, None
        if handle is not None:
            if request.again and error is None:
                self._kept[request.key] = handle
                if len(self._kept) > _MAX_KEPT:
                    _release(self._kept.popitem(last=False)[1])
            else:
                _release(handle)
            self._peers.read(request.peer)
        request.on_over(error)

    def _release_kept(self, peer: str | None = None) -> None:
        """Release what was kept of reads from ``peer``, or from all."""
        for key in [key for key in self._kept if peer in (None, key[0])]:
            _release(self._kept.pop(key))

    def progress(self) -> bool:
        """Answer what peers read, and take their notes."""
        try:
            notes = self._nixl.get_new_notifs()
        except Exception as error:  # noqa: BLE001 - NIXL's own; whoever waits has a deadline
            log.debug("NIXL could not be progressed: %s", error)
            return False
        for name, some in notes.items():
            # In one order with what other threads ask for.
            self._jobs.extend(partial(self._hear, name, note) for note in some)
        return bool(notes)

    # -- one for each process --------------------------------------------------------------

    @classmethod
    def stop_all(cls) -> None:
        """End the threads before the interpreter takes their agents down."""
        for agent in cls._agents.values():
            if agent.pid == os.getpid():
                agent.stop()

    @classmethod
    def forget_all(cls) -> None:
        """In a forked child: the parent's agents must neither be used nor be destroyed here."""
        cls._lock = threading.Lock()
        for agent in cls._agents.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(agent))
        cls._inherited = cls._inherited or bool(cls._agents)
        cls._agents = {}


@dataclass(frozen=True)
class Peer:
    """A remote agent, as one pipe met it."""

    agent: Agent
    name: str
    number: int

    def leave(self) -> None:
        """Say that this pipe needs it no more."""
        self.agent.soon(lambda: self.agent._leave(self))  # noqa: SLF001 - one small room


def _release(handle: Any) -> None:
    try:
        handle.release()
    except Exception as refused:  # noqa: BLE001 - NIXL's own; it keeps the handle and frees it with the agent
        log.debug("a transfer's handle could not be released: %s", refused)


def _is_over(state: str) -> bool:
    if state not in ("PROC", "DONE"):
        raise BrokenError("NIXL could not read the peer's memory")
    return state == "DONE"


atexit.register(Agent.stop_all)
os.register_at_fork(after_in_child=Agent.forget_all)
