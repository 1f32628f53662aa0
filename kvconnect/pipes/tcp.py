"""Tensors and blocks over TCP sockets, also between hosts.

Tensors go on the callers' threads: a header and the tensor's own memory out in
one call, and straight into the final tensor at the other end. Blocks go over a
second connection (`kvconnect.pipes.tcp_blocks`), which one thread of the process
serves for all pipes. The asking end makes both connections. Unless neither end
wants them, everything carries checksums, which are compared where it has landed.
Or both ends have certificates, and everything travels in TLS (`kvconnect.pipes.tcp_tls`).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, ClassVar, Final, NoReturn

import torch

from kvconnect.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    ConfigError,
    DeadlineError,
    EndOfPipe,
    IntegrityError,
    KVConnectError,
    TensorRejectedError,
)
from kvconnect.pipes import reactor, tcp_meeting, wire
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.base import Channel, Pipe, PipeSpec, Reach, Traits, Transfer
from kvconnect.pipes.landing import Landing
from kvconnect.pipes.tcp_blocks import BlockConnection
from kvconnect.pipes.tcp_farewell import hang_up
from kvconnect.pipes.tcp_handshake import Met
from kvconnect.pipes.tcp_link import Link
from kvconnect.pipes.tcp_meeting import Asking, Serving, TcpOptions
from kvconnect.pipes.wire import Kind, Meta

if TYPE_CHECKING:
    from torch import Tensor

    from kvconnect.paging import BlockIds, PagedLayout, PagedMemory

_MESSAGES: Final = frozenset({Kind.TENSOR, Kind.NONE, Kind.END})


class _Turn(Alone):
    """The same, with a last turn that nobody follows."""

    _closed = False

    def __enter__(self) -> None:
        try:
            super().__enter__()
        except BusyError:
            if self._closed:
                raise ClosedError("this end was closed") from None
            raise

    def take(self) -> bool:
        """Take the last turn for good, unless somebody is at it."""
        self._closed = self.lock.acquire(blocking=False)
        return self._closed


class TcpPipe(Pipe):
    """One end of a pipe over TCP."""

    name: ClassVar[str] = "tcp"
    traits: ClassVar[Traits] = Traits(reach=Reach.NETWORK, zero_copy=True)

    def __init__(self, spec: PipeSpec) -> None:
        """Open this end.

        Raises:
            ConfigError: a wrong option, a certificate that cannot be read, or an address that cannot be bound.
            HandshakeError: the other end's message is not one of a TCP pipe, or one end refuses the other's
                certificate (a serving end learns of this in its first send or receive).
            BrokenError, DeadlineError: the other end cannot be reached.

        """
        self._options = TcpOptions.parse(spec.options)
        self._timeout_s = spec.timeout_s
        self._loop = reactor.shared()
        self._sending, self._receiving = _Turn("send"), _Turn("receive")
        self._state = threading.Lock()
        self._landing = Landing(self._loop)
        self._closed = self._aborted = False
        self._failure: KVConnectError | None = None
        self._peer_ended = False
        self._link: Future[Link] = Future()
        self._ready: Link | None = None
        self._blocks: BlockConnection | None = None
        meeting = Serving if spec.side == "serves" else Asking
        try:
            self._meeting: Serving | Asking = meeting(self._loop, spec, self._options, self._joined)
        except BaseException:
            self._turn_away()
            raise

    # -- tensors --------------------------------------------------------------------------

    def send_tensor(self, tensor: Tensor | None) -> None:
        """Send header and memory in one call, without a copy of a contiguous tensor."""
        self._check_usable()
        with self._sending:
            header, dense = wire.encode(tensor)
            nbytes = 0 if dense is None else dense.nbytes
            if nbytes > self._options.max_message_bytes:
                raise TensorRejectedError(
                    f"a tensor of {nbytes} bytes is larger than pipe.max_message_bytes "
                    f"({self._options.max_message_bytes})"
                )
            if self._peer_ended:
                raise BrokenError("the other end was closed and receives no more")
            link = self._connected()
            self._send(link, header, dense, nbytes)

    def _send(self, link: Link, header: bytes, dense: Tensor | None, nbytes: int) -> None:
        try:
            self._meeting.messages.send(link, header, dense.data_ptr() if dense is not None else 0, nbytes)
        except BaseException as error:  # noqa: BLE001 - raised again; part of a message may have gone
            self._fail(error, link)

    def recv_tensor(self) -> Tensor | None:
        """Receive straight into a new CPU tensor."""
        self._check_usable()
        with self._receiving:
            return self._receive(self._landing.empty)[1]

    def recv_tensor_into(self, out: Tensor) -> None:
        """Receive straight into ``out`` if its memory is the message's."""
        self._check_usable()
        plain = out.device.type == "cpu" and out.is_contiguous() and not (out.is_conj() or out.is_neg())
        plain = plain and not out.requires_grad

        def fits(meta: Meta) -> bool:
            return meta.kind is Kind.TENSOR and meta.shape == tuple(out.shape) and meta.dtype == out.dtype

        with self._receiving:
            meta, tensor = self._receive(lambda meta: out if plain and fits(meta) else self._landing.empty(meta))
        if tensor is None or not fits(meta):
            what = "None" if tensor is None else f"{meta.shape} {meta.dtype}"
            raise TensorRejectedError(f"received {what}, expected {tuple(out.shape)} {out.dtype}")
        if tensor is not out:
            with torch.no_grad():
                out.copy_(tensor)

    def _receive(self, place: Callable[[Meta], Tensor]) -> tuple[Meta, Tensor | None]:
        """Receive a message, a tensor to where ``place`` says."""
        if self._peer_ended:
            raise EndOfPipe("the other end was closed")
        link, tensor = self._connected(), None
        try:
            meta = self._recv_meta(link)
            if meta is not None and meta.kind is Kind.TENSOR:
                tensor = place(meta)
                self._meeting.messages.recv_body(link, tensor.data_ptr(), meta.nbytes)
        except BaseException as error:  # noqa: BLE001 - raised again; part of a message may have come
            self._fail(error, link)
        if meta is None:
            # Nothing of a message has come, so the pipe stays usable.
            raise DeadlineError(f"no message within {self._timeout_s} s")
        if meta.kind is Kind.END:
            self._peer_ended = True
            raise EndOfPipe("the other end was closed")
        return meta, tensor

    def _recv_meta(self, link: Link) -> Meta | None:
        """Receive a header; ``None`` if none came in time."""
        header = self._meeting.messages.recv_head(link)
        if header is None:
            return None
        meta = wire.decode(header, self._options.max_message_bytes)
        if meta.kind not in _MESSAGES:
            raise BrokenError(f"the peer sent a {meta.kind.name} frame among tensors")
        return meta

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("this end was closed")
        if self._failure is not None:
            raise BrokenError(str(self._failure)) from self._failure

    def _connected(self) -> Link:
        """Return the link; the serving end waits for the asking end's connection here."""
        self._check_usable()
        if self._ready is not None:
            return self._ready
        try:
            return self._link.result(self._timeout_s)
        except TimeoutError:
            raise DeadlineError(f"the other end did not connect within {self._timeout_s} s") from None

    def _fail(self, error: BaseException, link: Link) -> NoReturn:
        """Let the pipe be dead, and the error reach the caller."""
        if not isinstance(error, KVConnectError):
            # Such as a signal's handler that raised: nobody knows how far the message is.
            self._failure = BrokenError(f"a message was cut short by {error!r}")
            link.end(reset=False)
        elif self._closed:
            raise ClosedError("this end was closed") from error
        elif isinstance(error, ClosedError):  # the other direction failed and shut the link
            raise BrokenError(str(self._failure)) from self._failure
        elif self._failure is None:
            self._failure = error
            if isinstance(error, IntegrityError):
                link.end(reset=False)  # a message is lost, and whoever sent it must hear of that
        raise error

    # -- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Say that no more comes, and end once the peer has what was sent.

        Raises:
            DeadlineError: the blocks that this end was attached to may still be in use.

        """
        if not self._begin_end(at_once=False):
            return
        link = self._link_or_none()
        if link is not None:
            link.stop_receiving()  # first: telling the peer may take a while
        try:
            if self._blocks is not None:
                self._blocks.close(wait=True)
        finally:
            if link is not None:
                self._say_end(link)

    def _say_end(self, link: Link) -> None:
        if self._failure is not None:
            link.end(reset=False)
            return
        # In the middle of another thread's message there is no place for an end mark.
        if self._sending.take():
            try:
                self._meeting.messages.send(link, wire.control(Kind.END))
            except (BrokenError, DeadlineError, ClosedError):
                link.end(reset=False)  # nobody is left to be told
                return
        link.linger(self._loop)

    def abort(self) -> None:
        """End at once; what the peer has not received is lost."""
        self._begin_end(at_once=True)
        if self._blocks is not None:
            self._blocks.close(wait=False)
        link = self._link_or_none()
        if link is not None:
            link.end(reset=True)

    def _begin_end(self, *, at_once: bool) -> bool:
        with self._state:
            first, self._closed = not self._closed, True
            if first and not self._link.done():
                self._link.set_exception(ClosedError("this end was closed"))
            self._aborted = self._aborted or at_once
        self._landing.close()
        if first:
            self._meeting.end(at_once=at_once)
        return first

    def _link_or_none(self) -> Link | None:
        return None if self._link.exception() is not None else self._link.result()

    # -- blocks -----------------------------------------------------------------------------

    def attach(self, local: PagedMemory, remote: PagedLayout, channel: Channel) -> None:
        """Serve ``local`` over a connection of its own. The channel is not needed."""
        if torch.device(local.device).type != "cpu":
            raise ConfigError(f"the tcp pipe moves blocks in CPU memory, these are on {local.device!r}")
        checksum, chunk_bytes = self._meeting.checksum, self._options.chunk_bytes
        blocks = BlockConnection(self._loop, local, remote, chunk_bytes, self._timeout_s, checksum=checksum)
        with self._state:
            if self._closed:
                raise ClosedError("this end was closed")
            if self._blocks is not None:
                raise BusyError("this pipe is attached to paged memory already")
            self._blocks = blocks
        self._meeting.meet_blocks(blocks)

    def read_blocks(self, remote: BlockIds, local: BlockIds) -> Transfer:
        """Ask for blocks; they arrive straight in their place."""
        return self._attached_blocks().read(remote, local)

    def write_blocks(self, local: BlockIds, remote: BlockIds) -> Transfer:
        """Send blocks straight from their place into the peer's."""
        return self._attached_blocks().write(local, remote)

    def _attached_blocks(self) -> BlockConnection:
        if self._closed:
            raise ClosedError("this end was closed")
        if self._blocks is None:
            raise ClosedError("attach() this pipe to paged memory before moving blocks")
        return self._blocks

    def _joined(self, sock: socket.socket, met: Met) -> None:
        """Take over the tensors' connection, perhaps on the reactor's thread."""
        if isinstance(met, KVConnectError):
            self._refuse(met, met.__cause__)
            return
        try:
            self._options.tune(sock, same_host=tcp_meeting.same_host(sock))
            link = Link(sock, self._timeout_s, met)
        except OSError as error:
            hang_up(sock)
            self._refuse(BrokenError(f"the connection failed: {error}"), error)
            return
        with self._state:
            if not self._link.done():
                self._ready = link
                self._link.set_result(link)
                return
        if self._aborted:
            link.end(reset=True)
        else:
            self._say_end(link)  # closed before the peer came: it learns so in order

    def _turn_away(self) -> None:
        """End after a meeting that failed; the peer may have come nevertheless, or come later."""
        self._aborted = self._closed = True
        self._refuse(ClosedError("this end was never opened"))
        link = self._link_or_none()
        if link is not None:
            link.end(reset=True)

    def _refuse(self, error: KVConnectError, cause: BaseException | None = None) -> None:
        """Let there be no link, unless there is one."""
        error.__cause__ = cause
        with self._state:
            if not self._link.done():
                self._link.set_exception(error)
